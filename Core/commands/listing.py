"""``vader models`` and ``vader rewards``: what there is, its licence and size, and whether it is on this machine."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from Core.commands.catalogue import catalogue
from Core.commands.startup import Parser, importing
from Core.utils.exit_codes import exit_code
from Core.utils.words import counted

if TYPE_CHECKING:
    from Core.utils.hub import Weight

WIDTH = 100  # where the output is no terminal, which would have a width
MODELS = """Lists the configs that ship, for `vader train` by name: the model of each, its video, the size and licence
of its weights (denoiser, decoder, text encoder), and whether they are on this machine."""
REWARDS = """Lists the rewards, for `reward_fn` and `vader score --rewards`: what each scores, its usual range, whether
it has a gradient to train by, the size and licence of its weights, and whether they are on this machine."""


def models(argv: Sequence[str]) -> int:
    Parser("models", MODELS).parse_args(argv)
    return exit_code(list_models)


def rewards(argv: Sequence[str]) -> int:
    Parser("rewards", REWARDS).parse_args(argv)
    return exit_code(list_rewards)


def list_models() -> None:
    with importing():
        from Core.config import load_config
        from Core.needs import model_needs
        from Core.utils.shipped import WITHOUT_USERS_FILES, shipped_configs

    rows = {}
    for name, file in shipped_configs().items():
        config = load_config([str(file), *WITHOUT_USERS_FILES])
        weights = [need.weight for need in model_needs(config.models.backbone, config.family)]
        size = config.video.image_size
        frame = "×".join(map(str, size)) if size else config.video.resolution
        source = catalogue()["models"][name]["source"]
        length = config.video.num_frames
        frames = length if isinstance(length, str) else counted(length, "frame")
        rows[name] = (source, f"{frame}, {frames}; {weight_words(weights)}")
    show(rows)


def list_rewards() -> None:
    from Core.utils.hub import Weight

    rows = {}
    for name, reward in catalogue()["rewards"].items():
        weights = [
            Weight(**{**weight, "parts": tuple(weight.get("parts", ()))}) for weight in reward["weights"]
        ]
        gradient = "" if reward["gradient"] else "; without a gradient"
        better = "" if reward["better"] == "higher" else "; lower is better"
        rows[name] = (reward["summary"], f"{reward['range']}{better}{gradient}; {weight_words(weights)}")
    show(rows)


def weight_words(weights: Sequence["Weight"]) -> str:
    """Size and licences of the weights, and whether they are on this machine."""
    from Core.utils.hub import human_size

    published = [weight for weight in weights if not weight.is_local]
    if not published:
        return "no download"
    licences = ", ".join(dict.fromkeys(weight.licence or "licence not stated" for weight in published))
    found = [is_here(weight) for weight in published]
    here = "on this machine" if all(found) else "in part on this machine" if any(found) else "not fetched"
    return f"{human_size(sum(weight.size for weight in published))}, {licences}; {here}"


def is_here(weight: "Weight") -> bool:
    """Whether a run would find the published weight without the network."""
    from Core.utils.hub import present

    if weight.source.startswith("https://"):
        return any((folder / weight.name).is_file() for folder in address_folders())
    folder = present(weight)
    return bool(folder and not weight.lacks(folder))


def address_folders() -> Iterable[Path]:
    """Where files from an address lie: the current folder, and that of ``torch.hub``, which takes long to import."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", f"{cache}/torch")
    return Path(), Path(home).expanduser() / "hub" / "checkpoints"


def show(rows: Mapping[str, tuple[str, str]]) -> None:
    """Print each name beside its two lines."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, (first, second) in rows.items():
        table.add_row(name, Text.assemble(first, "\n", (second, "dim")))
    console.print(table)
