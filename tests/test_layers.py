"""Imports point downwards, Core uses only what upstream has, and accelerate is known in one place."""

import ast
from pathlib import Path

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
    "opensora.models.stdit.stdit3": {"STDiT3Config"},
    "opensora.models.text_encoder.t5": {"text_preprocessing"},
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


def imported_names(file: Path) -> set[tuple[str, str]]:
    """(module, name) of everything a file imports; name is empty for a plain import."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def test_every_module_has_a_layer():
    unplaced = [module for module in imports.modules() if imports.layer_of(module) is None]
    assert not unplaced, f"give these a layer in scripts/figures/imports.py: {unplaced}"


def test_the_table_names_no_module_that_is_gone():
    named = {name for _, names in imports.LAYERS for name in names}
    assert named <= imports.modules().keys() | imports.SOURCES.keys()


def test_imports_point_downwards():
    assert imports.upward_imports() == []


def test_no_modules_import_each_other_in_a_circle():
    assert imports.cycle(imports.graph()) == []


def test_an_upward_import_and_a_circle_are_found(tmp_path, monkeypatch):
    """The two tests above can fail: a planted fault of each kind is reported."""
    for file, text in {
        "modules/lora.py": "def f():\n    from Core.training.trainer import x\n",
        "training/trainer.py": "from Core.modules import lora\nfrom . import setup\n",
        "training/setup.py": "import Core.training.trainer\n",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(imports, "SOURCES", {"Core": tmp_path})
    assert imports.upward_imports() == [
        "Core.modules.lora (modules) imports Core.training.trainer (programs)"
    ]
    circle = ["Core.training.setup", "Core.training.trainer", "Core.training.setup"]
    assert imports.cycle(imports.graph(lazy=False)) == circle


@pytest.mark.parametrize("file", sorted((ROOT / "Core").rglob("*.py")), ids=lambda f: f.stem)
def test_core_uses_only_what_upstream_has(file):
    used = {(module, name) for module, name in imported_names(file) if module.split(".")[0] == "opensora"}
    assert all(name in PUBLIC.get(module, ()) for module, name in used), used


def test_accelerate_is_known_to_the_runtime_alone():
    users = [
        file.name
        for file in (ROOT / "Core").rglob("*.py")
        if any(module.split(".")[0] == "accelerate" for module, _ in imported_names(file))
    ]
    assert users == ["distributed.py"]
