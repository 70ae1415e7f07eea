"""Generate parts of docs/rewards.md from the registry: `python scripts/write_reward_table.py`.

Everything between a line `<!-- NAME: generated … -->` and the next `<!-- end -->` is replaced.
"""

import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.rewards import REGISTRY, Reward, Weight, resolve_reward  # noqa: E402
from Core.utils.hub import human_size  # noqa: E402

DOCS = ROOT / "docs"
PAGE = DOCS / "rewards.md"


def table(header: str, rows: list[list[str]]) -> str:
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def weight_cell(weight: Weight) -> str:
    """Location, size and licence of the weights."""
    if weight.source.startswith("https://"):
        place = f"[{weight.name}]({weight.source})"
    elif weight.is_local:
        place = f"`{weight.name}`, your copy"
    else:
        place = f"[{weight.source}](https://huggingface.co/{weight.source})"
    return f"{place}, {human_size(weight.size)}, licence {weight.licence or 'not stated'}"


def overview() -> str:
    rows = []
    for name in REGISTRY:
        cls = resolve_reward(name)
        weights = "<br>".join(map(weight_cell, cls.info.weights.values()))
        if not weights:
            parts = cls.scorers()
            listed = ", ".join(f"`{part}`" for part in parts) or "the reward inside"
            weights = "none" if parts == (name,) else f"those of {listed}"
        better = "higher" if cls.info.higher_is_better else "lower"
        rows.append([f"`{name}`", cls.info.summary, cls.info.range, better, weights, cls.info.paper or "own"])
    return table("reward | what it scores | range | better | weights | source", rows)


def arguments_cell(cls: type[Reward]) -> str:
    """Constructor arguments with their defaults, in the order of the signature."""
    cells = []
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            required = parameter.default is parameter.empty
            cells.append(f"`{parameter.name}`" if required else f"`{parameter.name}={parameter.default!r}`")
    return ", ".join(cells).replace("|", "\\|") or "none"


def details() -> str:
    sections = []
    for name in REGISTRY:
        cls = resolve_reward(name)
        text, _, explained = (inspect.getdoc(cls) or "").replace("``", "`").partition("Args:\n")
        listed = re.sub(r"^(\w+):", r"- `\1`:", textwrap.dedent(explained), flags=re.MULTILINE)
        parts = [
            f"### `{name}`",
            text.rstrip(),
            f"Arguments: {arguments_cell(cls)}.",
            *filter(None, [listed]),
        ]
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


def render(page: str) -> str:
    """``page`` with its generated parts renewed."""
    for name, content in (("overview", overview()), ("details", details())):
        pattern = rf"(<!-- {name}: generated[^\n]*-->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda m, text=content: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
