"""The estimate: a training step without weights is the real one, operator by operator and byte by byte."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import twins
from diffusers.image_processor import VaeImageProcessor
from torch import nn
from transformers.initialization import no_init_weights
from twin_runs import built_trainer

from Core.cli import memory_advice
from Core.commands.estimate import main
from Core.config import ConfigError, build_config
from Core.estimate import advice, command
from Core.estimate.card_kernels import IN_FLOAT32, CudaArithmetic, attention_workspace
from Core.estimate.cards import CARDS, EFFICIENCY, device_bytes
from Core.estimate.fake_run import FakeRun, Phase, fake_run
from Core.estimate.live_bytes import LiveBytes
from Core.estimate.memory_savers import MEMORY_SAVERS, unused_savers
from Core.estimate.operations import Work, WorkCounter, operations_in
from Core.estimate.published import PIPELINES, write_pipeline
from Core.estimate.stand_ins import StandInTokens, tokens_of
from Core.estimate.values import tensors_without_content
from scripts import write_memory_table

GIB = 1 << 30


def a_run(step: int, text: int = 1) -> FakeRun:
    work = Counter({Work(1e12, 10**9, (torch.bfloat16, False)): 2})
    return FakeRun({"text": Phase(text * GIB), "prefix": Phase(step * GIB, work)}, GIB)


@pytest.fixture(scope="module")
def twin_config(twin, tmp_path_factory):
    return build_config(twins.settings(twin, tmp_path_factory.mktemp("run")))


def test_a_step_without_weights_is_the_real_one(twin, twin_config, tmp_path):
    estimated = fake_run(twin_config, on_card=False, whole=True, validate=False)
    trainer = built_trainer(twin, tmp_path / "run")
    trainer.train_step()
    live, work = LiveBytes(), WorkCounter()
    with live, work:
        for network in (trainer.backbone.denoiser, trainer.backbone.vae, trainer.objective.reward):
            live.add(network)
        trainer.train_step()
    work.lap("step")
    assert sum(phase.operations for phase in estimated.step.values()) == operations_in(work.phases["step"])
    peak = max(phase.peak for phase in estimated.step.values())
    assert peak == pytest.approx(live.peak, rel=0.1)
    assert estimated.networks < peak


def test_backward_passes_that_repeat_are_counted_without_being_run(twin_config):
    """Twice as many are twice the work; sampling steps that repeat are in the test before."""

    def prefix(passes: int) -> float:
        optimizer = replace(twin_config.optimizer, gradient_accumulation_steps=passes)
        run = fake_run(replace(twin_config, optimizer=optimizer), validate=False)
        return run.phases["prefix"].operations

    assert prefix(2) == 2 * prefix(1)


def test_small_tensors_keep_their_values_and_others_read_as_one():
    with tensors_without_content():
        mask = torch.arange(5)[None] < torch.tensor([2, 5])[:, None]
        assert mask.sum(1).tolist() == [2, 5]
        assert torch.zeros(2, 5)[:, mask.any(0)].shape == (2, 5)
        assert torch.ones_like(torch.empty(3)).sum().item() == 3
        assert (sound := torch.empty(3).isfinite()).tolist() == [True] * 3
        assert torch.empty(3, 2)[sound].shape == (3, 2) and sound.nonzero().shape == (3, 1)
        layer = nn.Linear(8, 4).to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16


def on_cuda(function) -> torch.dtype:
    """Of the result under CUDA's own autocast, which needs no card where there is no gradient."""
    with torch.no_grad(), torch._subclasses.FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)
        try:
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            return function(torch.empty(4, 8, 6, device="cuda", dtype=torch.bfloat16)).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)


def test_no_warning_is_given_about_values_that_are_not_there(recwarn):
    with tensors_without_content():
        VaeImageProcessor().preprocess(torch.rand(1, 3, 64, 64))
        F.layer_norm(torch.zeros(1, 0, 8), (8,), torch.empty(8), torch.empty(8))
    assert not recwarn.list


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.layer_norm(x, (6,)),
        lambda x: F.rms_norm(x, (6,)),
        lambda x: F.group_norm(x, 2),
        lambda x: x.softmax(-1),
        lambda x: x**2,
        lambda x: x.sum(),
        torch.rsqrt,
        F.silu,
        lambda x: x + x,
    ],
)
def test_autocast_widens_what_that_of_cuda_widens(function):
    with CudaArithmetic(), torch.autocast("cpu", torch.bfloat16):
        assert function(torch.ones(4, 8, 6, dtype=torch.bfloat16)).dtype == on_cuda(function)
    assert len(IN_FLOAT32) > 20


def test_attention_takes_a_float32_buffer_in_its_backward_pass():
    query = torch.zeros(2, 4, 15, 72, dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes(attention_workspace) as live:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    with LiveBytes() as plain:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    assert live.peak - plain.peak <= 2 * 4 * 128 * (96 + 1) * 4 < live.peak


def test_seconds_are_the_longer_of_operations_and_bytes():
    card = CARDS["h100"]
    product, copy = (
        Work(2 * card.half, 1, (torch.bfloat16, False)),
        Work(0, int(3 * card.bandwidth), (torch.float32, False)),
    )
    assert card.seconds(Counter({product: 1, copy: 2})) == pytest.approx((2 + 6) / EFFICIENCY)
    assert card.rate(torch.float32, True) == card.tf32 > card.rate(torch.float32, False) == card.float32
    assert device_bytes(100 * GIB) > 105 * GIB
    assert all(card.source for card in CARDS.values())


def test_what_is_expanded_is_read_once():
    weight, rows = torch.ones(4, 6), torch.ones(10, 3, 4)
    with WorkCounter() as work:
        rows @ weight.expand(10, 4, 6)
    ((product, times),) = work.now.items()
    assert (times, product.operations) == (1, 2 * 10 * 3 * 4 * 6)
    assert product.bytes == 4 * (10 * 3 * 4 + 4 * 6 + 10 * 3 * 6)


def test_savers_are_tried_in_order_until_one_fits(twin_config, monkeypatch):
    """Each on top of those that helped; a batch that is cut is made up for by more backward passes."""
    peaks = {"grad_checkpoint": 60, "train_batch_size": 40, "decode_frame": 22}
    made = []

    def run(config, processes):
        values = config.flat()
        set_now = [key for key, value in MEMORY_SAVERS if key in peaks and values[key] == value]
        made.append(values)
        return a_run(min(peaks[key] for key in set_now) if set_now else 70)

    monkeypatch.setattr(advice, "fake_run", run)
    config = build_config({**twin_config.flat(), "grad_checkpoint": False, "decode_frame": "all"})
    assert unused_savers(config)[:2] == [("grad_checkpoint", True), ("train_batch_size", 1)]
    found = list(advice.trials(config, advice.Trial({}, a_run(70)), 1, lambda what: None))
    assert [trial.run.peak // GIB for trial in found] == [60, 40, 22]
    assert found[-1].changes == {
        "grad_checkpoint": True, "train_batch_size": 1, "gradient_accumulation_steps": 2, "decode_frame": -1
    }  # fmt: skip
    assert advice.first_fitting(found, CARDS["a6000"]) is found[1]


@pytest.mark.parametrize("flags", [["--grad-checkpoint", "False"], ["--compile-blocks", "True"]])
def test_savers_are_tried_with_what_they_need_where_nothing_helps(monkeypatch, capsys, flags):
    tried = []
    monkeypatch.setattr(command, "fake_run", lambda config, processes, tell: a_run(50))
    monkeypatch.setattr(
        advice, "fake_run", lambda config, processes: tried.append(config.models) or a_run(50)
    )
    assert main(["vader_demo", "--gpu", "l4", *flags]) == 0
    assert "l4 (22 GiB): does not fit" in capsys.readouterr().out
    offloaded = [models for models in tried if models.activation_offloading]
    assert len(offloaded) == (not tried[-1].compile_blocks)
    assert all(models.grad_checkpoint is True for models in offloaded)


def test_advice_names_what_has_to_be_set_beside_a_saver(twin_config):
    advised = memory_advice(build_config({**twin_config.flat(), "grad_checkpoint": False}), "out of memory")
    assert "set grad_checkpoint=True, " in advised
    assert ", activation_offloading=True with grad_checkpoint=True, " in advised


def test_the_command_prints_what_fits_and_what_would_make_it_fit(twin, tmp_path, monkeypatch, capsys):
    values = twins.settings(twin, tmp_path / "run", grad_checkpoint=False)
    path = str(twins.config_file(tmp_path / "config.py", values))
    monkeypatch.setattr(command, "fake_run", lambda config, processes, tell: a_run(50))
    monkeypatch.setattr(advice, "fake_run", lambda config, processes: a_run(30))
    flags = ["--gpu", "a6000", "h100", "l4", "--json", str(tmp_path / "out.json"), "--lr", "0.1"]
    assert main([path, *flags]) == 0
    out = capsys.readouterr().out
    assert "h100 (80 GiB): fits, a step of 2 videos in 0.0 s, 3 steps in 0 s\n" in out
    assert (
        "a6000 (48 GiB): does not fit; grad_checkpoint=True does, with 32.0 GiB, a step of 2 videos in" in out
    )
    assert "l4 (22 GiB): does not fit; grad_checkpoint=True needs 32.0 GiB, most of it in prefix" in out
    assert '"with": null' in (tmp_path / "out.json").read_text()
    assert main([path, "--gpu", "h1000"]) == 2
    assert "--gpu must be one of rtx3090" in capsys.readouterr().err


def test_published_pipelines_have_all_files_a_family_reads(tmp_path):
    from Core.backbones import BACKBONES

    for name in ("wan", "cogvideox", "ltx", "hunyuan_video15", "modelscope"):
        family = BACKBONES.resolve(name)
        for source in family.published:
            folder = tmp_path / source.replace("/", "--")
            folder.mkdir()
            write_pipeline(source, folder)
            settings = family.settings_class(model_path=source)
            video = smallest_video(family)
            assert not family.folder_errors(folder, settings, video), source
    assert set(PIPELINES) == {path.name.replace("--", "/") for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="the sizes of 'a/b' are not known"):
        write_pipeline("a/b", tmp_path)


def test_published_networks_have_the_size_of_their_downloads(tmp_path):
    """In 16 or 32 bits, as the files are."""
    import diffusers

    from Core.backbones import BACKBONES

    for name in ("wan", "cogvideox", "ltx", "hunyuan_video15", "modelscope"):
        for source, known in BACKBONES.resolve(name).published.items():
            folder = tmp_path / source.replace("/", "--")
            folder.mkdir()
            write_pipeline(source, folder)
            parameters = 0
            for part in ("transformer", "transformer_2", "unet", "vae"):
                if (file := folder / part / "config.json").is_file():
                    config = json.loads(file.read_text())
                    with torch.device("meta"), no_init_weights():
                        network = getattr(diffusers, config.pop("_class_name")).from_config(config)
                    parameters += sum(p.numel() for p in network.parameters())
            assert min(abs(known.size / (size * parameters) - 1) for size in (2, 4)) < 0.02, source


def parts_of_a_step(config, processes: int = 1) -> FakeRun:
    return fake_run(config, processes, on_card=False, validate=False)


def test_frozen_weights_that_are_elsewhere_take_no_memory(twin_config):
    """Split over processes a part of them is here; streamed, two blocks at most."""
    whole, pair = parts_of_a_step(twin_config), parts_of_a_step(twin_config, 2)
    assert whole.networks <= pair.networks < 1.01 * whole.networks
    sharded = build_config({**twin_config.flat(), "shard_frozen": True})
    halves, quarters = parts_of_a_step(sharded, 2), parts_of_a_step(sharded, 4)
    assert whole.networks - halves.networks == pytest.approx(
        2 * (halves.networks - quarters.networks), rel=0.05
    )
    streamed = parts_of_a_step(build_config({**twin_config.flat(), "stream_blocks": True}))
    assert streamed.networks < halves.networks and streamed.peak < whole.peak
    assert operations(halves) == operations(streamed) == operations(whole)
    with pytest.raises(ConfigError, match="start several"):
        fake_run(sharded)


def test_captions_that_are_encoded_on_the_cpu_take_none_of_the_card(twin_config):
    on_cpu = build_config({**twin_config.flat(), "text_encoding": "cpu"})
    plain, without = (fake_run(config, validate=False) for config in (twin_config, on_cpu))
    assert plain.phases["text"].peak > 10 * without.phases["text"].peak
    assert {name: phase.work for name, phase in plain.phases.items()} == {
        name: phase.work for name, phase in without.phases.items()
    }


def operations(run: FakeRun) -> float:
    return sum(phase.operations for phase in run.step.values())


def smallest_video(family):
    from Core.backbones import VideoSpec

    height, width = next(iter(next(iter(family.sizes.values())).values()))
    return VideoSpec(height, width, 17, 24)


def test_a_tokenizer_that_counts_letters():
    tokens = StandInTokens()(["a red fox", "two boats on a lake"], padding="max_length", max_length=8)
    assert tokens.attention_mask.sum(1).tolist() == [tokens_of("a red fox"), tokens_of("two boats on a lake")]
    assert tokens.to("cpu")["input_ids"].shape == (2, 8)


def test_the_page_has_the_savers_in_the_order_in_which_they_are_tried():
    page = (write_memory_table.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    _, _, listed = page.partition("First those that leave the training as it is")
    places = [
        listed.index(f"`{key}={json.dumps(value)}`".replace("true", "True")) for key, value in MEMORY_SAVERS
    ]
    assert places == sorted(places)


def test_every_config_has_a_row_in_the_table():
    found = {flags[0] for flags in write_memory_table.RUNS.values()}
    configs = {
        str(path.relative_to(write_memory_table.ROOT))
        for path in write_memory_table.ROOT.glob("configs/*/*.py")
    }
    assert configs <= found


def test_a_card_that_is_there_is_compared_with_the_need(twin_config, monkeypatch, capsys):
    from Core import cli

    asked = []
    monkeypatch.setattr(
        command, "fake_run", lambda config, processes: asked.append(processes) or a_run(50 // processes)
    )
    cli.say_whether_it_fits(twin_config, 80 * GIB, 2)
    cli.say_whether_it_fits(twin_config, 50 * GIB, 2)
    sharded = build_config({**twin_config.flat(), "shard_frozen": True})
    cli.say_whether_it_fits(sharded, 50 * GIB, 2)
    assert asked == [1, 1, 2]

    def refuse(config, processes):
        raise ValueError("sizes are not known")

    monkeypatch.setattr(command, "fake_run", refuse)
    cli.say_whether_it_fits(twin_config, 50 * GIB, 1)
    fits, not_fits, shared, unknown = capsys.readouterr().out.splitlines()
    assert shared == "predicted need 26.8 GiB: fits the card's 50.0 GiB"
    assert fits == "predicted need 53.0 GiB: fits the card's 80.0 GiB"
    assert "does not fit" in not_fits and unknown == "no estimate of the memory: sizes are not known"
