"""The benchmark: the plain path computes the same, counts are right, tables and the page come from the files."""

import json
from pathlib import Path

import pytest
import torch
import twins
from torch import nn

from Core.backbones import BACKBONES
from Core.modules import lora
from Core.utils.timing import Stopwatch
from scripts import benchmark
from scripts.bench import meter, page
from scripts.bench.bench import Bench
from scripts.bench.meter import OperationCounter
from scripts.bench.plain import score_matrix_attention
from scripts.bench.presets import PRESETS, Setting

TINY = (
    ";image_size=(32,32);scheduler.num_sampling_steps=2;dtype=fp32;mixed_precision=no"
    ";model.hidden_size=192;model.num_heads=3;model.caption_channels=256;text_encoder.d_model=256"
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """The twin's plain setting at a small size."""
    torch.manual_seed(0)
    return Bench("cpu-twin", Setting.parse("plain" + TINY), tmp_path_factory.mktemp("bench") / "run")


def outcome(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """Final latent and the adapter's gradient of the first video."""
    trainer = bench.trainer
    lora.set_dropout(trainer.backbone.denoiser, False)
    rollout, timer = trainer.objective.rollout, Stopwatch(torch.device("cpu"))
    z, _ = rollout.sample(trainer.prompts_of([0]), [0], 1, timer)
    frames = trainer.backbone.decode_frames(z, rollout.frame_numbers([0]))
    gradient = torch.autograd.grad(
        trainer.objective.reward(frames, ["a fox"]).loss.mean(), trainer.parameters
    )
    return z.detach(), torch.cat([g.flatten() for g in gradient])


def test_the_plain_path_computes_what_the_default_does(bench):
    for name, parameter in bench.trainer.named_parameters.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    with bench.path():
        plain = outcome(bench)
    default = outcome(bench)
    for bound, one, other in zip((1e-5, 1e-4), default, plain, strict=True):
        assert (one - other).norm() <= bound * other.norm()


def test_a_measurement_has_every_phase_with_its_cost(bench):
    with bench.path():
        measured = bench.measure(1)
    assert {"text", "prefix", "gradient_steps", "decode", "reward", "backward", "optimizer"} <= measured[
        "phases"
    ].keys()
    for name in ("text", "prefix", "backward"):
        phase = measured["phases"][name]
        assert (
            min(phase[key] for key in ("seconds", "operations", "bytes", "roofline_seconds", "peak_bytes"))
            > 0
        )
    printed = page.table({"kind": "run", **measured})
    assert "gradient steps" in printed
    assert "of the ceiling" in page.roofline(measured)


def test_operations_of_products_convolutions_and_attention_are_counted():
    counter = OperationCounter(ceiling=1e9, bandwidth=1e9)
    x, y, image = torch.randn(4, 8), torch.zeros(4, 8), torch.randn(1, 2, 6, 6)
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 7, 16)
    expected = {
        "product": (lambda: x @ x.T, 2 * 4 * 8 * 4),
        "in place": (lambda: torch.zeros(4, 4).addmm_(x, x.T), 2 * 4 * 8 * 4),
        "convolution": (lambda: nn.functional.conv2d(image, torch.randn(3, 2, 3, 3)), 2 * 3 * 2 * 9 * 16),
        "attention": (lambda: nn.functional.scaled_dot_product_attention(q, k, k), 4 * 2 * 5 * 7 * 16),
        "view": (lambda: x.T, 0),
        "allocation": (lambda: torch.empty(9), 0),
        "copy": (lambda: y.copy_(x), 0),
    }
    with counter:
        for name, (action, _) in expected.items():
            action()
            counter.lap(name)
    assert {name: phase["operations"] for name, phase in counter.phases.items()} == {
        name: operations for name, (_, operations) in expected.items()
    }
    moved = {name: phase["bytes"] for name, phase in counter.phases.items()}
    assert moved["product"] == 4 * (32 + 32 + 16) and moved["copy"] == 4 * (32 + 32)
    assert moved["view"] == moved["allocation"] == 0


def operations_of(action) -> float:
    counter = OperationCounter(ceiling=1e9, bandwidth=1e9)
    with counter:
        action()
    counter.lap("all")
    return counter.phases["all"]["operations"]


def test_a_forward_pass_counts_the_same_with_and_without_a_gradient():
    """Whatever operators the two run as."""
    model = twins.stdit()
    inputs = (torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 1, 5, twins.TEXT_WIDTH))
    sizes = {key: torch.tensor([32.0]) for key in ("fps", "height", "width")}
    with_gradient = operations_of(lambda: model(*inputs, **sizes))
    with torch.no_grad():
        assert operations_of(lambda: model(*inputs, **sizes)) == with_gradient > 0


def test_a_backward_pass_counts_two_products_for_one_and_five_for_attentions_two():
    x, weight = (torch.randn(6, 6, requires_grad=True) for _ in range(2))
    product = operations_of(lambda: (x @ weight).sum().backward())
    assert product == 3 * 2 * 6**3
    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    attend = lambda: nn.functional.scaled_dot_product_attention(q, q, q)  # noqa: E731
    assert operations_of(lambda: attend().sum().backward()) == 3.5 * operations_of(attend)


@pytest.mark.skipif(not meter.CLEAR.exists(), reason="Linux alone lets the high-water mark start anew")
def test_the_peak_starts_anew_each_time():
    memory = meter.PeakMemory(torch.device("cpu"))
    held = torch.ones(2**28, dtype=torch.uint8)
    with_it = memory.take()
    del held
    memory.take()
    assert memory.take() < with_it - 2**27


def test_two_settings_are_stepped_in_turns_in_processes_of_their_own(tmp_path, capsys):
    settings, file = ["default" + TINY, "plain" + TINY], tmp_path / "compare.json"
    command = ["cpu-twin", "--compare", *settings, "--steps", "1", "--json", str(file)]
    assert benchmark.main(command) == 0
    assert f"| `{settings[1]}` | " in capsys.readouterr().out
    result = json.loads(file.read_text())
    (first, second), ratios = result["sides"], result["ratios"]
    assert ratios["seconds"] == [second["seconds"][0] / first["seconds"][0]]
    assert min(first["peak_bytes"], second["peak_bytes"]) > 2**26


@pytest.mark.parametrize(("ceiling", "code"), [(10.0, 0), (1.0, 1)])
def test_a_step_above_the_ceiling_is_refused(ceiling, code, monkeypatch, tmp_path, capsys):
    phase = {"seconds": 1.0, "operations": 2.0, "bytes": 1.0, "roofline_seconds": 0.5}

    class Worker:
        def __init__(self, *_):
            self.close = lambda: None

        def measure(self, steps):
            return {"phases": {"prefix": phase}, "ceiling": ceiling}

    monkeypatch.setattr("scripts.bench.bench.Worker", Worker)
    monkeypatch.setattr(page, "table", lambda result: "")
    assert benchmark.main(["cpu-twin", "--json", str(tmp_path / "run.json")]) == code
    refused = code == 1
    assert ("repeat the command" in capsys.readouterr().err) == refused
    assert (tmp_path / "run.json").exists() != refused


def test_score_matrices_give_the_same_attention():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) < 0.7
    mask[..., 0] = True
    for chosen in (None, mask):
        fused = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=chosen)
        torch.testing.assert_close(score_matrix_attention(q, k, v, attn_mask=chosen), fused)


def test_the_family_of_random_weights_is_offered_to_nobody_else(bench):
    assert bench.config.models.backbone == "benchmark" and "benchmark" not in BACKBONES


def test_a_setting_reaches_into_entries_and_says_what_is_wrong_with_it():
    values = Setting.parse("plain;scheduler.num_sampling_steps=5;lora_rank=4").values(PRESETS["cpu-twin"])
    assert values["scheduler"]["num_sampling_steps"] == 5 and values["scheduler"]["cfg_scale"] == 7.0
    assert (values["lora_rank"], values["dtype"]) == (4, "fp32")
    assert PRESETS["cpu-twin"].values["scheduler"]["num_sampling_steps"] == 10
    with pytest.raises(ValueError, match="a setting is default or plain"):
        Setting.parse("fast")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("fast", "a setting is default or plain"),
        ("default;nosuch=1", "unknown key 'nosuch'"),
        ("default;nosuch.inner=1", "no entry 'nosuch'"),
        ("plain;dtype=fp7", "dtype must be"),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(setting, said, capsys):
    assert benchmark.main(["cpu-twin", "--setting", setting]) == 2
    assert said in capsys.readouterr().err


def test_wrong_calls_are_refused():
    twice = ["--compare", "default", "plain"]
    for argv in (
        [],
        ["cpu-twin", "--write-docs"],
        ["cpu-twin", "--steps", "0"],
        ["cpu-twin", "--threads", "0"],
        ["cpu-twin", *twice, "--sweep", "rank"],
        ["cpu-twin", *twice, "--setting", "plain"],
    ):
        with pytest.raises(SystemExit):
            benchmark.parse(argv)


def test_a_line_is_fitted_to_a_sweep():
    points = [{"value": n, "seconds": 2 + 3 * n, "peak_bytes": 2**30} for n in (1, 2, 4)]
    line = page.fit_line(points, "seconds")
    assert line == pytest.approx({"slope": 3, "intercept": 2, "r2": 1})
    lines = {key: page.fit_line(points, key) for key in ("seconds", "peak_bytes")}
    shown = page.table(
        {"kind": "sweep", "quantity": "steps", "unit": "sampling step", "points": points, "lines": lines}
    )
    assert "2.000 s + 3 s per sampling step" in shown


def test_a_comparison_gives_the_ratio_with_its_spread():
    sides = [
        {"setting": s, "seconds": [1.0], "cpu_seconds": [1.0], "peak_bytes": 2**30}
        for s in ("default", "plain")
    ]
    shown = page.table(
        {"kind": "compare", "sides": sides, "ratios": {"seconds": [2.0, 2.5, 3.0], "cpu_seconds": [2.0]}}
    )
    assert "`plain` takes 2.50 times as long (2.00 to 3.00, 3 rounds) in wall time" in shown


def test_options_are_shown_with_the_range_of_their_ratios():
    row = {"option": "prefix_cache=2", "seconds": 1.0, "times_as_fast": [1.5, 1.25, 2.0]}
    row |= {"latent_distance": 0.125, "velocity_error": 0.0, "gradient_cosine": 0.5}
    result = {"kind": "options", "rows": [row], "preset": "demo"}
    assert "| `prefix_cache=2` | 1.00 | 1.50 (1.25 to 2.00) | 12.50% | 0.00% | 0.500 |" in page.table(result)
    assert page.KINDS["options"].bars(result) == {"prefix_cache=2": 1.0}


def test_paths_are_compared_by_reward_and_video_by_video():
    gain = {"gain": 10.0, "low": 5.0, "high": 15.0}
    over = {"gain": 0.25, "low": -1.0, "high": 1.5}
    row = {"path": "default", "seconds": 99.6, "reward": 61.0, "gain": gain, "over_plain": over}
    shown = page.table({"kind": "paths", "rows": [row], "prompts": 128})
    assert "| `default` | 100 | 61.0 | +10.00 (+5.00 to +15.00) | +0.25 (-1.00 to +1.50) |" in shown
    assert "on 128 held-out prompts" in shown


def test_efficiency_is_half_the_ratio():
    one, two = ([{"seconds": s, "all_reduce_share": 0.01}] * 2 for s in (2.0, 1.25))
    result = {"kind": "scaling", "one": one, "two": two}
    assert "Efficiency of two processes: 80.0% (80.0% to 80.0%, 2 rounds)." in page.table(result)
    assert page.KINDS["scaling"].bars(result) == {"one process": 2.0, "two processes": 1.25}


def test_the_page_is_current():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), (
        "run python scripts/benchmark.py --write-docs"
    )


def test_the_committed_results_name_their_machine_and_no_folder_of_it():
    paths = list(page.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        python, *words = result["command"].split()
        script = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        assert python == "python" and (page.ROOT / script).is_file() and result["hardware"]["cpu"]
        assert not any("/" in word and Path(word.split("=")[-1]).is_absolute() for word in words)


def test_the_pictures_are_those_of_the_committed_results(tmp_path):
    for path in page.FOLDER.glob("*.json"):
        redrawn = tmp_path / f"{path.stem}.svg"
        page.picture(json.loads(path.read_text(encoding="utf-8")), redrawn)
        assert redrawn.read_bytes() == path.with_suffix(".svg").read_bytes(), path.stem
