"""The contracts on imports in pyproject.toml are kept, and Core uses only what upstream has."""

import ast
import os
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from scripts.figures import imports

ROOT = Path(__file__).resolve().parents[1]
# The names of upstream's package that Core may use; the package here has more.
PUBLIC = {
    "opensora": {"models"},
    "opensora.acceleration.checkpoint": {"set_grad_checkpoint"},
    "opensora.datasets": {"is_img", "is_vid", "save_sample"},
    "opensora.datasets.aspect": {"get_image_size", "get_num_frames"},
    "opensora.datasets.utils": {"read_from_path"},
    "opensora.models.stdit.stdit3": {"STDiT3", "STDiT3Config"},
    "opensora.models.text_encoder.t5": {"T5Embedder", "T5Encoder", "text_preprocessing"},
    "opensora.registry": {"MODELS", "SCHEDULERS", "build_module"},
    "opensora.schedulers.rf.rectified_flow": {"RFlowScheduler", "timestep_transform"},
    "opensora.utils.inference_utils": {
        "append_generated",
        "append_score_to_prompts",
        "apply_mask_strategy",
        "collect_references_batch",
        "extract_json_from_prompts",
        "load_prompts",
        "merge_prompt",
        "parse_mask_strategy",
        "prepare_multi_resolution_info",
        "split_prompt",
    },
}


CONTRACTS = ("layers", "opensora", "accelerate")


def lint(root: Path, contract: str) -> subprocess.CompletedProcess:
    """What import-linter says of a contract in the checkout at ``root``."""
    command = [sys.executable, Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    paths = os.pathsep.join((str(root), str(root / "Open-Sora")))
    return subprocess.run(
        [*command, "--contract", contract],
        cwd=root,
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def cycle(graph: grimp.ImportGraph) -> list[str]:
    """Modules of which each imports the next and the last the first; empty where there are none."""
    edges = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


@pytest.mark.parametrize("contract", CONTRACTS)
def test_the_contract_is_kept(contract):
    result = lint(ROOT, contract)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_has_a_layer():
    """All but packages whose parts are placed one by one; those import nothing themselves."""
    graph = imports.graph()
    names = [name for layer in imports.layers() for name in layer]
    unplaced = {m for m in graph.modules if not any(imports.within(m, name) for name in names)}
    above = {m for m in unplaced if any(imports.within(name, m) for name in names)}
    assert not unplaced - above, "give these a layer in pyproject.toml"
    assert not any(graph.find_modules_directly_imported_by(module) for module in above)


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count: they hide a circle, they do not open it."""
    circle = cycle(imports.graph())
    assert not circle, " imports ".join(circle)


def test_a_circle_is_found():
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "d"), ("d", "b")):
        graph.add_import(importer=importer, imported=imported)
    assert " imports ".join(cycle(graph)) in "b imports c imports d imports b imports c imports d"


@pytest.fixture(scope="module")
def faulty_copy(tmp_path_factory):
    """The checkout's Python files with a fault of each kind."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", root)
    for folder in ("Core", "Open-Sora", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, line in {
        "Core/modules/lora.py": "def f():\n    from Core.training.trainer import x",
        "Core/rewards/base.py": "import opensora.registry",
        "Core/training/setup.py": "import accelerate",
        "Open-Sora/opensora/registry.py": "from Core.utils import rng",
    }.items():
        with open(root / file, "a", encoding="utf-8") as handle:
            handle.write(f"\n{line}\n")
    return root


@pytest.mark.parametrize(
    ("contract", "fault"),
    [
        ("layers", "Core.modules.lora -> Core.training.trainer"),
        ("layers", "opensora.registry -> Core.utils.rng"),
        ("opensora", "Core.rewards.base -> opensora.registry"),
        ("accelerate", "Core.training.setup -> accelerate"),
    ],
)
def test_a_planted_fault_is_found(faulty_copy, contract, fault):
    result = lint(faulty_copy, contract)
    assert result.returncode == 1 and fault in result.stdout


def test_the_figure_is_current(tmp_path):
    """Boxes and arrows; where they stand may depend on the fonts."""
    imports.draw(tmp_path / "imports.svg")
    drawn, committed = (
        (folder / "imports.svg").read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs/figures")
    )
    for pattern in (r"<text.*?</text>", r'<g id="patch_\d+">'):
        found, shown = (sorted(re.findall(pattern, text, re.DOTALL)) for text in (drawn, committed))
        strip = [re.sub(r"<[^>]*>", "", one) for one in found], [re.sub(r"<[^>]*>", "", one) for one in shown]
        assert strip[0] == strip[1], "run python scripts/figures/imports.py"


def test_no_arrow_of_the_figure_runs_through_a_box():
    graph = imports.graph()
    rows, box_of = imports.boxes(graph.modules)
    edges = imports.edges_between(box_of, graph)
    assert imports.cost(imports.layout(rows, edges), edges) < 100


def imported_from_opensora(file: Path) -> set[tuple[str, str]]:
    """(module, name) of everything a file imports from upstream's package; name is empty for a plain import."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module, alias.name) for alias in node.names}
    return {(module, name) for module, name in found if imports.within(module, "opensora")}


@pytest.mark.parametrize("file", sorted((ROOT / "Core").rglob("*.py")), ids=lambda f: f.stem)
def test_core_uses_only_what_upstream_has(file):
    used = imported_from_opensora(file)
    assert all(name in PUBLIC.get(module, ()) for module, name in used), used
