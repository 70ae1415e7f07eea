"""What each scorer costs a frame, as a table in docs/rewards.md: `python scripts/reward_costs.py`.

Measured: the tests' small twins (scorers without a network as they are), forward and backward, on this machine's CPU.
Predicted: networks of the published sizes in bf16, run on tensors without content, of which PyTorch computes only the
shapes; operations and bytes follow from these.
"""

import argparse
import functools
import math
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora"), str(ROOT / "tests")]

import torch  # noqa: E402
from reward_twins import twin_arguments  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from Core.estimate.live_bytes import LiveBytes  # noqa: E402
from Core.estimate.scorers import SIZES, Real  # noqa: E402
from Core.rewards import REGISTRY, Reward, build_reward  # noqa: E402
from Core.rewards.base import freeze  # noqa: E402

PAGE = ROOT / "docs" / "rewards.md"
TABLE = re.compile(r"(<!-- costs: [^\n]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)
FRAMES, SIZE = 8, (64, 64)
REPEATS = 3
PROMPT = "a man riding a bike"  # the twins' action classifier knows it
# They cost what the reward inside, or the program, costs.
WRAPPERS = ("relative", "hinge", "command")


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


REAL = {name: size() for name, size in SIZES.items()}


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
