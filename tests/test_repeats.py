"""What repeats in an estimate is run once and counted: the same work and the same bytes as running everything."""

import gc
import weakref

import pytest
import torch
from families import MAKERS
from pipelines import config_for
from torch import nn

from Core.estimate.fake_run import FakeRun, fake_run
from Core.estimate.live_bytes import LiveBytes
from Core.estimate.operations import WorkCounter
from Core.estimate.repeats import RepeatedBlock, RepeatedChunk, RepeatedPrediction, Repeats

REWARD = """
from Core.rewards import ImageReward, RewardInfo


class Brightness(ImageReward):
    info = RewardInfo(name="brightness", summary="mean of all pixels", range="0 to 1")

    def score_images(self, images, prompts):
        return images.mean(dim=(1, 2, 3))
"""


COMMON = {
    **dict(is_vader_training=True, lora_rank=2, mixed_precision="bf16", dtype="bf16", resume="never"),
    **dict(image_size=(32, 64), num_frames=5, num_sampling_steps=6),
}


def run_all(self, key, function, *args, **kwargs):
    return function(*args, **kwargs)


def run_chunk(self, z, cache, last=False):
    return self.step(z, cache, last=last)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("wan", {"num_frames": 29, "vae_tiling": True}),
        ("wan", {"stream_blocks": True}),
        # The reference's prediction runs without the fused adapter, and without guidance on the same shapes.
        ("wan", {"guidance_scale": 1, "kl_weight": 0.1, "mixed_precision": "no", "dtype": "fp32"}),
        ("wan a14b", {}),
    ],
    ids=["tiles", "streamed", "reference", "experts"],
)
def test_an_estimate_is_that_of_running_everything(tmp_path, monkeypatch, kind, keys):
    def estimated() -> FakeRun:
        config = config_for(kind.split()[0], tmp_path / "pipeline", **keys)
        return fake_run(config, validate="vae_tiling" in keys)

    MAKERS[kind](tmp_path / "pipeline")
    (tmp_path / "reward.py").write_text(REWARD)
    keys = {**COMMON, "reward_fn": f"{tmp_path / 'reward.py'}:Brightness", **keys}
    counted = estimated()
    monkeypatch.setattr(Repeats, "call", run_all)
    monkeypatch.setattr(RepeatedChunk, "__call__", run_chunk)
    whole = estimated()
    assert list(counted.phases) == list(whole.phases)
    for name, phase in whole.phases.items():
        assert counted.phases[name].work == phase.work, name
        assert counted.phases[name].peak == pytest.approx(phase.peak, rel=0.001), name


def test_a_step_that_reaches_no_adapter_has_no_estimate(tmp_path):
    MAKERS["wan a14b"](tmp_path / "pipeline")
    (tmp_path / "reward.py").write_text(REWARD)
    keys = {**COMMON, "reward_fn": f"{tmp_path / 'reward.py'}:Brightness", "train_experts": "high_noise"}
    with pytest.raises(ValueError, match="no evaluation of the estimated step reached the adapter"):
        fake_run(config_for("wan", tmp_path / "pipeline", **keys, backprop_steps=1), validate=False)


class Block(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.layer, self.runs = nn.Linear(width, width), []

    def forward(self, x):
        self.runs.append(None)
        return self.layer(x).exp().log()


def test_blocks_that_are_alike_run_once_after_their_first_time():
    def three_times(blocks, live, work):
        with torch.no_grad(), live, work:
            for _ in range(3):
                for block in blocks:
                    block(torch.ones(2, block.layer.in_features))
        return live.peak, work.now

    plain, blocks = [Block(), Block(), Block(8)], [Block(), Block(), Block(8)]
    live, work = LiveBytes(), WorkCounter()
    repeats = Repeats(live, work)
    for block in blocks:
        block.forward = RepeatedBlock(block, repeats)
    assert three_times(blocks, live, work) == three_times(plain, LiveBytes(), WorkCounter())
    # The first time, and one of each kind the second.
    assert [len(block.runs) for block in blocks] == [2, 1, 2]
    blocks[1](torch.ones(2, 4))
    with torch.no_grad():
        blocks[0](torch.ones(3, 4))
    assert [len(block.runs) for block in blocks[:2]] == [3, 2], (
        "a graph, or other shapes, are not a repetition"
    )


def test_what_is_counted_reaches_as_high_from_where_it_starts():
    live, work = LiveBytes(), WorkCounter()
    repeats, x = Repeats(live, work), torch.ones(1000)
    with torch.no_grad(), live, work:
        first = repeats.call("sum", lambda x: x.exp().exp().sum(), x)
        live.lap("run")
        held = torch.ones(500)
        repeats.call("sum", lambda x: x.exp().exp().sum(), x)
        live.lap("counted")
    assert live.phases["counted"] == live.phases["run"] + held.nbytes + first.nbytes


def test_what_is_recorded_keeps_nothing_of_a_prediction_alive():
    class Holder:
        def __call__(self, z, t, generated=None):
            return z + 1

    predict, repeats = Holder(), Repeats(LiveBytes(), WorkCounter())
    gone = weakref.ref(predict)
    prediction = RepeatedPrediction(predict, repeats, lambda t: 0)
    with torch.no_grad():
        for _ in range(4):
            prediction(torch.ones(2), torch.ones(1))
    assert repeats.recorded
    del predict, prediction
    gc.collect()
    assert gone() is None
