"""What each scorer costs a frame, as a table in docs/rewards.md: `python scripts/reward_costs.py`.

Measured: the tests' small twins (scorers without a network as they are), forward and backward, on this machine's CPU.
Predicted: networks of the published sizes in bf16, run on tensors without content, of which PyTorch computes only the
shapes; operations and bytes follow from these.
"""

import argparse
import functools
import gc
import math
import re
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora"), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers as tf  # noqa: E402
from reward_twins import twin_arguments  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from Core.rewards import REGISTRY, Reward, build_reward  # noqa: E402
from Core.rewards.base import freeze  # noqa: E402
from Core.rewards.qwen2_vl import Qwen2VL  # noqa: E402

PAGE = ROOT / "docs" / "rewards.md"
TABLE = re.compile(r"(<!-- costs: [^\n]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)
FRAMES, SIZE = 8, (64, 64)
REPEATS = 3
PROMPT = "a man riding a bike"  # the twins' action classifier knows it
# They cost what the reward inside, or the program, costs.
WRAPPERS = ("relative", "hinge", "command")
COLLECT_EVERY = 20  # new tensors
QWEN_PROMPT = 800  # tokens of the longer of the two authors' texts with a caption, rounded up


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors that operators made since it was entered, while they lived."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given | self.known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.known.add(key)
        self.now += size
        self.made += 1
        if self.now > self.peak and self.made >= COLLECT_EVERY:
            gc.collect()  # under a dispatch mode, what checkpointing recomputed hangs in cycles
            self.made = 0
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Measured:
    """Cost of a twin, per frame."""

    seconds: float
    peak_bytes: float


def backward(reward: Reward, frames: Tensor) -> None:
    frames.grad = None
    reward(frames, [PROMPT]).loss.sum().backward()


def measure(reward: Reward) -> Measured:
    """Forward and backward over one video: the least seconds of a few runs, and the peak bytes beside the weights."""
    frames = (torch.rand(1, FRAMES, 3, *SIZE) * 1.8 - 0.9).requires_grad_()
    with LiveBytes() as live:
        backward(reward, frames)
    seconds = math.inf
    for _ in range(REPEATS):
        started = time.perf_counter()
        backward(reward, frames)
        seconds = min(seconds, time.perf_counter() - started)
    return Measured(seconds / FRAMES, live.peak / FRAMES)


@dataclass(frozen=True)
class Real:
    """A network of published size. shape: of an input. frames: in it. run: input → output."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    frames: int = 1
    run: Callable[[Any, Tensor], Tensor] = lambda model, x: model(pixel_values=x).last_hidden_state


def clip_vision(layers: int, width: int, heads: int, patch: int) -> Real:
    config = tf.CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        patch_size=patch,
    )  # fmt: skip
    return Real(lambda: tf.CLIPVisionModel(config), (1, 3, 224, 224))


def qwen2_vl(width: int, inner: int, layers: int, heads: int, frames: int) -> Real:
    """448×448 pixels a frame: 32×32 patches, of which 4 make a token, for every two frames."""
    text = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 152_000,
        "num_attention_heads": heads, "num_key_value_heads": heads // 6 if width == 1536 else 4,
    }  # fmt: skip
    config = tf.Qwen2VLConfig(
        text_config=text, vision_config={"hidden_size": width}, attn_implementation="sdpa"
    )
    times = math.ceil(frames / 2)

    def run(model: Qwen2VL, patches: Tensor) -> Tensor:
        seen = model.see(patches, (times, 32, 32))
        return model.read(torch.cat([seen, seen.new_zeros(1, QWEN_PROMPT, width)], dim=1))

    def build() -> nn.Module:
        return freeze(Qwen2VL(config)).to_empty(device="cpu")

    return Real(build, (1, times, 1024, 1176), frames, run)


def image_reward() -> Real:
    vision = tf.BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
    )
    text = tf.BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)

    class Blip(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = tf.BlipVisionModel(vision)
            self.text = tf.BlipTextModel(text, add_pooling_layer=False)

        def forward(self, pixel_values: Tensor) -> Any:
            seen = self.vision(pixel_values=pixel_values).last_hidden_state
            ids = torch.zeros(1, 35, dtype=torch.long)
            return self.text(input_ids=ids, encoder_hidden_states=seen)

    return Real(Blip, (1, 3, 224, 224))


CLIP_L14, CLIP_H14 = clip_vision(24, 1024, 16, 14), clip_vision(32, 1280, 16, 14)
SIGLIP = tf.SiglipVisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
    image_size=384,
)  # fmt: skip
YOLOS = tf.YolosConfig(
    hidden_size=384, intermediate_size=1536, num_attention_heads=6, image_size=[512, 864],
    use_mid_position_embeddings=False,
)  # fmt: skip
# The networks that a frame goes through; text features are computed once per prompt and not counted.
REAL = {
    **dict.fromkeys(("aesthetic", "clip_score", "compression", "incompressibility"), CLIP_L14),
    **dict.fromkeys(("rainy", "snowy", "weather"), CLIP_L14),
    **dict.fromkeys(("hps", "pick_score"), CLIP_H14),
    "aesthetic_v2_5": Real(lambda: tf.SiglipVisionModel(SIGLIP), (1, 3, 384, 384)),
    "image_reward": image_reward(),
    "hpsv3": qwen2_vl(3584, 18944, 28, 28, frames=1),
    "videoalign": qwen2_vl(1536, 8960, 28, 12, frames=8),
    "actpred": Real(lambda: tf.VideoMAEModel(tf.VideoMAEConfig()), (1, 16, 3, 224, 224), 16),
    "object_detection": Real(lambda: tf.YolosModel(YOLOS), (1, 3, 512, 864)),
    "subject_consistency": Real(
        lambda: tf.ViTModel(tf.ViTConfig(), add_pooling_layer=False), (1, 3, 224, 224)
    ),
    "background_consistency": clip_vision(12, 768, 12, 32),
}


@dataclass(frozen=True)
class Predicted:
    """Cost of a network of published size: bytes of weights, and per frame operations and peak bytes beside them."""

    weights: float
    operations: float
    peak_bytes: float


@functools.cache
def predict(real: Real) -> Predicted:
    """Forward and backward on tensors without content."""
    with FakeTensorMode():
        with no_init_weights():
            model = freeze(real.build()).to(torch.bfloat16)
        weights = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        x = torch.empty(real.shape, dtype=torch.bfloat16, requires_grad=True)
        with LiveBytes() as live, FlopCounterMode(display=False) as counter:
            real.run(model, x).float().sum().backward()
    return Predicted(weights, counter.get_total_flops() / real.frames, live.peak / real.frames)


def row(name: str, measured: Measured, predicted: Predicted | None) -> list[str]:
    cells = [f"`{name}`", f"{1e3 * measured.seconds:.2g}", f"{measured.peak_bytes / 1e6:.2f}"]
    if predicted is None:
        return [*cells, *["–"] * 3]
    scaled = predicted.weights / 1e9, predicted.operations / 1e12, predicted.peak_bytes / 1e9
    return [*cells, *(f"{value:.2g}" for value in scaled)]


def table(lines: Mapping[str, str]) -> str:
    """The rows of all scorers that do not wrap another, in the order of the registry."""
    header = [
        "| reward | twin: ms a frame | twin: peak MB a frame | weights, GB | TFLOP a frame | peak GB a frame |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*header, *(lines[name] for name in REGISTRY if name in lines)])


def new_lines(names: Sequence[str]) -> dict[str, str]:
    """Rows of ``names``, measured and predicted now."""
    lines = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = twin_arguments(Path(folder))
        for name in names:
            measured = measure(build_reward(name, arguments[name]))
            cells = row(name, measured, predict(REAL[name]) if name in REAL else None)
            lines[name] = f"| {' | '.join(cells)} |"
            print(lines[name], flush=True)
    return lines


def old_lines(page: str) -> dict[str, str]:
    """Rows that the table in ``page`` has."""
    return {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)` \|.*$", TABLE.search(page)[2], re.MULTILINE)}


def render(page: str, lines: Mapping[str, str]) -> str:
    """``page`` with ``lines`` in its table."""
    content = table(old_lines(page) | dict(lines))
    return TABLE.sub(lambda m: f"{m[1]}\n{content}\n\n{m[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    every = [name for name in REGISTRY if name not in WRAPPERS]
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="scorers to renew the rows of (default: all)"
    )
    names = parser.parse_args().names
    if unknown := sorted(set(names) - set(every)):
        parser.error(f"there is no scorer {unknown[0]!r} to measure; there are {', '.join(every)}")
    torch.manual_seed(0)
    lines = new_lines(names or every)
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
