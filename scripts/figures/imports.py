"""Draws docs/figures/imports.svg: which package imports which, in the order of the contract in pyproject.toml.

Rows are the contract's layers; imports that follow from others are left out.
"""

import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]  # this checkout, not an installed one

import grimp  # noqa: E402
import matplotlib  # noqa: E402
from importlinter.api import read_configuration  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch  # noqa: E402

STYLE = {"svg.hashsalt": "imports", "svg.fonttype": "none"}  # small, and the same every time
COLUMNS = 3
WIDTH, HEIGHT = 0.76, 0.66  # of a box; columns and rows are one unit apart
INCHES = (2.5, 0.7)  # a unit across and down
STARTS = 10  # random layouts that the search improves
INK, FACE = "#44546a", "#e3eefb"

Edges = dict[str, set[str]]
Places = dict[str, tuple[float, float]]


def graph() -> grimp.ImportGraph:
    """The project's modules and their imports, those inside functions too."""
    return grimp.build_graph("Core", "opensora", "scripts", cache_dir=None)


def layers() -> list[list[str]]:
    """Names in each layer of the contract, from top to bottom."""
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    contract = next(contract for contract in contracts if contract["id"] == "layers")
    return [re.findall(r"[\w.]+", layer) for layer in contract["layers"]]


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def boxes(modules: set[str]) -> tuple[list[list[str]], dict[str, str]]:
    """Boxes of each row, and module → box: modules of one package share a box if they share a layer."""
    rows, box_of = [], {}
    for layer in layers():
        present = [name for name in layer if name in modules]
        row = []
        for name in present:
            package = ".".join(name.split(".")[:2])
            group = [other for other in present if within(other, package)]
            box = "\n".join(group) if len(group) < 3 else package
            row += [] if box in row else [box]
            box_of |= {module: box for module in sorted(modules) if within(module, name)}
        rows.append(row)
    return rows, box_of


def edges_between(box_of: dict[str, str], imports: grimp.ImportGraph) -> Edges:
    """Box → the boxes it imports, without those it reaches through another."""
    edges: Edges = {box: set() for box in box_of.values()}
    for module, box in box_of.items():
        targets = imports.find_modules_directly_imported_by(module)
        edges[box] |= {box_of[target] for target in targets if target in box_of} - {box}
    for box in edges:
        for target in sorted(edges[box]):
            edges[box].remove(target)
            if target not in reachable(box, edges):
                edges[box].add(target)
    return edges


def reachable(start: str, edges: Edges) -> set[str]:
    found: set[str] = set()
    stack = [start]
    while stack:
        new = edges[stack.pop()] - found
        found |= new
        stack += new
    return found


def layout(rows: list[list[str]], edges: Edges) -> Places:
    """Place of each box: in its layer's row, at the columns where arrows avoid boxes and stay short."""
    chance = random.Random(0)
    best: Places = {}
    for _ in range(STARTS):
        places = {
            box: (float(column), float(y))
            for y, row in enumerate(rows)
            for box, column in zip(row, chance.sample(range(COLUMNS), len(row)), strict=True)
        }
        before = None
        while before != places:
            before = places
            for box in places:
                moved = [{**places, box: (float(column), places[box][1])} for column in range(COLUMNS)]
                places = min(moved, key=lambda option: cost(option, edges))
        best = min(best or places, places, key=lambda option: cost(option, edges))
    return best


def cost(places: Places, edges: Edges) -> float:
    """Boxes that lie on each other or under an arrow, then the way that arrows go sideways."""
    arrows = [(places[box], places[target]) for box in edges for target in edges[box]]
    covered = len(places) - len(set(places.values()))
    covered += sum(passes(*arrow, place) for arrow in arrows for place in places.values())
    return 100 * covered + sum(abs(x1 - x0) for (x0, _), (x1, _) in arrows)


def passes(start: tuple[float, float], end: tuple[float, float], place: tuple[float, float]) -> bool:
    """Whether an arrow runs through a box in a row between, or closely by."""
    (x0, y0), (x1, y1), (x, y) = start, end, place
    if not min(y0, y1) < y < max(y0, y1):
        return False
    xs = [x0 + (x1 - x0) * (edge - y0) / (y1 - y0) for edge in (y - HEIGHT / 2, y + HEIGHT / 2)]
    return min(xs) < x + 0.6 * WIDTH and max(xs) > x - 0.6 * WIDTH


@matplotlib.rc_context(STYLE)
def draw(path: Path) -> None:
    imports = graph()
    rows, box_of = boxes(imports.modules)
    edges = edges_between(box_of, imports)
    places = layout(rows, edges)
    figure, axes = plt.subplots(figsize=(INCHES[0] * COLUMNS, INCHES[1] * len(rows)))
    patches = {}
    for box, (x, y) in places.items():
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        patches[box] = plt.Rectangle(corner, WIDTH, HEIGHT, facecolor=FACE, edgecolor=INK)
        axes.add_patch(patches[box])
        axes.text(x, y, box.replace("Core.", ""), ha="center", va="center", fontsize=9.5)
    for start, target in ((box, target) for box in edges for target in sorted(edges[box])):
        clip = dict(patchA=patches[start], patchB=patches[target], shrinkA=0, shrinkB=0)
        style = dict(arrowstyle="-|>", mutation_scale=12, color=INK)
        axes.add_patch(FancyArrowPatch(places[start], places[target], **clip, **style))
    axes.set(xlim=(-0.5, COLUMNS - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs" / "figures" / "imports.svg")
