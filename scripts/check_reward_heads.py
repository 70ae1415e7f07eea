"""Check the published reward heads: `python scripts/check_reward_heads.py [FOLDER]`.

Loads the heads of aesthetic, compression, rainy and snowy from FOLDER (default: the download cache and the current
folder), checks their SHA-256, and compares the aesthetic head's scores and gradients with tests/golden/. The tests do
not need these files. Exits with 1 if a number differs, 2 if a file is missing.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.rewards.aesthetic import LAION_HEAD  # noqa: E402
from Core.rewards.compression import JPEG_HEAD  # noqa: E402
from Core.rewards.heads import linear_layers  # noqa: E402
from Core.rewards.weather import HEADS  # noqa: E402
from Core.utils.hub import Weight, locate, sha256  # noqa: E402
from Core.utils.state_dict import load_state  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "aesthetic_head.safetensors"
BARS = {"score": 1e-5, "grad_embedding": 1e-4}  # allowed relative errors


def find(weight: Weight, folder: Path | None) -> Path:
    """Path of a published file; raises FileNotFoundError if missing."""
    return locate(Weight(source=str(folder / weight.file), kind="file") if folder else weight)


def relative_errors(layers: list[nn.Linear]) -> dict[str, float]:
    """Relative errors of the aesthetic head's scores and gradients against the golden values."""
    golden = load_file(GOLDEN)
    features = golden["embedding"].clone().requires_grad_()
    score = nn.Sequential(*layers)(features).squeeze(-1)
    measured = {"score": score, "grad_embedding": torch.autograd.grad(score.sum(), features)[0]}
    return {key: relative(measured[key], golden[key]) for key in BARS}


def relative(measured: Tensor, expected: Tensor) -> float:
    return ((measured - expected).norm() / expected.norm()).item()


def check(folder: Path | None) -> bool:
    """Print one line per check; return whether all pass."""
    good = True
    for title, weight in {"aesthetic": LAION_HEAD, "compression": JPEG_HEAD, **HEADS}.items():
        path = find(weight, folder)
        layers = linear_layers(load_state(path), path.name)
        same = sha256(path) == weight.sha256
        widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
        print(f"{title}: {path.name}, widths {widths}, SHA-256 {'as pinned' if same else 'DIFFERS'}")
        good &= same
        if weight is LAION_HEAD:
            for key, error in relative_errors(layers).items():
                print(f"{title}: {key} differs by {error:.1e}, allowed {BARS[key]:.0e}")
                good &= error <= BARS[key]
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="folder with the four files")
    try:
        return 0 if check(parser.parse_args(argv).folder) else 1
    except (ValueError, FileNotFoundError) as error:
        print(f"check_reward_heads: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
