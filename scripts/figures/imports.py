"""Which module imports which, layer by layer: imports.py draws docs/figures/imports.svg, and the tests check it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "Core": ROOT / "Core",
    "opensora": ROOT / "Open-Sora" / "opensora",
    "Open-Sora/scripts": ROOT / "Open-Sora" / "scripts",
    "scripts": ROOT / "scripts",
}
# From the ground up: a module imports from its own layer or from those below. A name stands for its submodules
# too, unless they are named themselves.
LAYERS = (
    ("networks", ("opensora",)),
    (
        "ground",
        ("Core", "Core.utils", "Core.evaluation.charts", "Core.training.ema", "Core.training.signals"),
    ),
    ("modules", ("Core.modules",)),
    ("model families", ("Core.backbones",)),
    ("sampler", ("Core.sampling", "Core.schedulers")),
    ("parts", ("Core.data", "Core.rewards", "Core.training.nan_check")),
    (
        "services",
        (
            "Core.config",
            "Core.training.checkpoint",
            "Core.training.early_stopping",
            "Core.training.metric_logging",
            "Core.training.progress",
            "Core.training.resume",
        ),
    ),
    (
        "programs",
        ("Core.build", "Core.cli", "Core.evaluation", "Core.generation", "Core.training"),
    ),
    ("entry points", ("Open-Sora/scripts", "scripts")),
)
# Face of a layer's nodes, and its arrows.
COLOURS = (
    ("#c9d6df", "#44546a"),
    ("#d9ead3", "#38761d"),
    ("#cfe2f3", "#0b5394"),
    ("#fff2cc", "#bf9000"),
    ("#fce5cd", "#b45f06"),
    ("#ead1dc", "#a64d79"),
    ("#d9d2e9", "#674ea7"),
    ("#eeeeee", "#666666"),
)
SWEEPS = 40


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the project."""
    found = {}
    for name, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((name, *parts))] = file
    return dict(sorted(found.items()))


def layer_of(module: str) -> int | None:
    """Number of a module's layer, from the bottom; None where the table does not place it."""
    placed = {name: number for number, (_, names) in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    # The package "Core" stands in the table for its own __init__ alone, so that a new module must be placed.
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(
        (placed[name] for name in names if name in placed and (name != "Core" or module == "Core")), None
    )


def imports(module: str, file: Path, known: dict[str, Path], *, lazy: bool = True) -> set[str]:
    """Modules of the project that ``module`` imports, with those inside functions if ``lazy``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazy else tree.body
    return {name for node in nodes for name in _targets(node, module, file, known)} - {module}


def _targets(node: ast.AST, module: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    if isinstance(node, ast.ImportFrom):
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        anchor = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*anchor, *([node.module] if node.module else [])])
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            yield from [submodule] if submodule in known else [base] if base in known else []


def graph(*, lazy: bool = True) -> dict[str, set[str]]:
    """Module → the project's modules it imports."""
    known = modules()
    return {module: imports(module, file, known, lazy=lazy) for module, file in known.items()}


def upward_imports() -> list[str]:
    """Imports against the order of the layers, as sentences."""
    return [
        f"{module} ({LAYERS[layer_of(module)][0]}) imports {target} ({LAYERS[layer_of(target)][0]})"
        for module, targets in graph().items()
        for target in sorted(targets)
        if layer_of(target) > layer_of(module)
    ]


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """A chain of modules that import each other in a circle; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges[module]):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := visit(module, []))), [])


def nodes_of_figure() -> dict[str, set[str]]:
    """The graph with packages as one node each, and without what follows from other imports."""
    whole = {name for _, names in LAYERS for name in names} - {"Core"}

    def node(module: str) -> str:
        parts = module.split(".")
        return next(n for k in range(len(parts), 0, -1) if (n := ".".join(parts[:k])) in whole)

    edges: dict[str, set[str]] = {name: set() for name in whole}
    for module, targets in graph().items():
        if module != "Core":
            edges[node(module)] |= {node(target) for target in targets if target != "Core"} - {node(module)}
    return {name: direct(name, edges) for name in edges}


def direct(name: str, edges: dict[str, set[str]]) -> set[str]:
    """Targets that no other target of ``name`` reaches."""
    return {
        target
        for target in edges[name]
        if not any(target in reachable(other, edges, {name}) for other in edges[name] - {target})
    }


def reachable(name: str, edges: dict[str, set[str]], seen: set[str]) -> set[str]:
    found: set[str] = set()
    stack = [name]
    while stack:
        for target in edges[stack.pop()] - found - seen:
            found.add(target)
            stack.append(target)
    return found


def positions(edges: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Where each node stands: in its layer's rows, each near what it is connected to, so that few edges cross."""
    rows, places, y = [], {}, 0.0
    for _, names in LAYERS:
        shown = [name for name in names if name != "Core"]
        layer = [shown] if len(shown) <= 8 else [shown[::2], shown[1::2]]
        for row in layer:
            rows.append((y, row))
            y += 1.15
        y += 0.35
    for _ in range(SWEEPS):
        for height, row in rows:
            row.sort(key=lambda name: (mean_place(name, edges, places), name))
            places |= {name: ((index + 0.5) / len(row), height) for index, name in enumerate(row)}
    return places


def mean_place(name: str, edges: dict[str, set[str]], places: dict[str, tuple[float, float]]) -> float:
    """Mean position across of the nodes that ``name`` imports or that import it."""
    near = edges[name] | {other for other, targets in edges.items() if name in targets}
    across = [places[other][0] for other in near if other in places]
    return sum(across) / len(across) if across else 0.5


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "imports",
        "svg.fonttype": "none",
    }  # small, and the same every time
    import matplotlib.pyplot as plt

    edges = nodes_of_figure()
    places = positions(edges)
    figure, axes = plt.subplots(figsize=(13, 9))
    for number, (title, names) in enumerate(LAYERS):
        face, ink = COLOURS[number]
        ys = [places[name][1] for name in names if name in places]
        bottom, top = min(ys) - 0.45, max(ys) + 0.45
        axes.add_patch(plt.Rectangle((-0.16, bottom), 1.18, top - bottom, color=face, alpha=0.4, lw=0))
        axes.text(-0.15, (bottom + top) / 2, title, va="center", fontsize=11, fontweight="bold", color=ink)
        for name in filter(places.get, names):
            draw_node(axes, name, places[name], face, ink)
            for target in sorted(edges[name]):
                draw_edge(axes, places[name], places[target], ink)
    axes.set_xlim(-0.17, 1.03)
    axes.set_ylim(-0.6, max(y for _, y in places.values()) + 0.6)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", dpi=120, metadata={"Date": None})
    plt.close(figure)


def draw_node(axes, name: str, place: tuple[float, float], face: str, ink: str) -> None:
    box = dict(boxstyle="round,pad=0.35", facecolor=face, edgecolor=ink, linewidth=0.9)
    axes.text(*place, name.removeprefix("Core."), ha="center", va="center", fontsize=9.5, bbox=box, zorder=3)


def draw_edge(axes, start: tuple[float, float], end: tuple[float, float], ink: str) -> None:
    """An arrow; within a row it bends below the nodes between."""
    bend = 0.04 if start[1] != end[1] else -0.3 if start[0] < end[0] else 0.3
    style = dict(arrowstyle="-|>", color=ink, alpha=0.6, lw=0.9, shrinkA=10, shrinkB=11, mutation_scale=9)
    axes.annotate("", end, start, zorder=2, arrowprops={**style, "connectionstyle": f"arc3,rad={bend}"})


if __name__ == "__main__":
    draw(ROOT / "docs" / "figures" / "imports.svg")
