"""The documentation holds: commands run, config snippets load, files shown are the files, links lead somewhere, tables
are current."""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import reward_twins
import torch
import twin_runs
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from Core.backbones import BACKBONES
from Core.commands.main import main as vader
from Core.config import load_config
from Core.config.schema import keys_of, sections_of
from Core.estimate import advice
from Core.estimate.fake_run import FakeRun, Phase
from Core.training.objectives import OBJECTIVES
from scripts import write_command_line, write_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
DEMO = ROOT / "Open-Sora" / "configs" / "opensora-v1-2" / "vader" / "vader_demo.py"
# `<!-- runnable -->`, `<!-- runnable: command to run first -->` or `<!-- runnable: fails -->` before a block of shell.
RUNNABLE = re.compile(r"<!-- runnable(?:: ([^>]*?))? -->\n```sh\n(.*?)```", re.DOTALL)
# A block of shell that is not run as it stands says what it needs: `<!-- needs: weights -->`. What needs nothing is run
# in this process, which is quicker.
KINDS = ("nothing", "weights", "a run", "a GPU", "a cluster", "the network", "minutes")
# On these pages all unmarked blocks need the same.
NEEDED_ON = {
    "families": "weights",
    "objectives": "weights",
    "multi-gpu-and-slurm": "a GPU",
    "memory": "a GPU",
}
BLOCK = re.compile(r"(?:<!-- ([^>]*?) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
SHOWN = re.compile(r"<!-- file: (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The fragments a page's headings can be reached by."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.fixture
def repository(tmp_path):
    """The repository as a user sees it, where what commands write goes to a folder of its own."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "build", ".git", ".venv"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    programs = {"python": "", "vader": f' "{ROOT}/Core/__main__.py"'}
    for name, program in programs.items():
        file = tmp_path / ".venv" / "bin" / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}"{program} "$@"\n', encoding="utf-8")
        file.chmod(0o755)
    return tmp_path


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a block as a user would paste it, stopping at its first failure."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'Open-Sora'}", "OMP_NUM_THREADS": "1"}
    programs = folder / ".venv" / "bin"
    environment |= {"PYTHON": str(programs / "python"), "HOME": str(folder)}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    return subprocess.run(
        ["sh", "-e"], input=command, cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("page", [p for p in PAGES if RUNNABLE.search(read(p))], ids=lambda p: p.stem)
def test_commands_run(page, repository):
    """A page's blocks follow each other in one folder, as a reader types them."""
    for instruction, block in RUNNABLE.findall(read(page)):
        fails = instruction == "fails"
        done = shell(block if fails else f"{instruction}\n{block}", repository)
        assert done.returncode == (2 if fails else 0), f"{block}\n{done.stderr[-3000:]}"


def test_a_wrong_command_is_noticed(repository):
    assert shell("false\ntrue\n", repository).returncode == 1


def needs(page: Path) -> Iterator[tuple[str, str]]:
    """What each block of shell needs that does not run on the demo; '' where nothing says so."""
    default = NEEDED_ON.get(page.stem) or NEEDED_ON.get(page.parent.name, "")
    for marker, language, block in BLOCK.findall(read(page)):
        kind, _, needed = marker.partition(": ")
        if language == "sh" and kind != "runnable":
            yield needed if kind == "needs" else default, block


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_command_runs_or_says_what_it_needs(page):
    unmarked = [block for needed, block in needs(page) if needed not in KINDS]
    assert not unmarked, f"mark them as runnable, or with what they need: {', '.join(KINDS)}"


@pytest.mark.parametrize("page", [p for p in PAGES if any(needs(p))], ids=lambda p: p.stem)
def test_files_that_commands_name_are_there(page):
    """Those of blocks that no test runs."""
    for _, block in needs(page):
        named = re.findall(r"(?:Open-Sora/|scripts/|configs/|\.ci/)[\w./-]+", block)
        assert not [
            name for name in named if not (ROOT / name).exists() and not (ROOT / "Open-Sora" / name).exists()
        ]


def commands(block: str) -> Iterator[list[str]]:
    """Words of each command of a block, without assignments before it and comments."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


def called(words: list[str]) -> list[str]:
    """A command as `vader`, or as a Python script, with its arguments; empty for another program."""
    if Path(words[0]).name == "vader":
        return ["vader", *words[1:]]
    named = [i for i, word in enumerate(words) if (ROOT / word).is_file() and word.endswith((".py", ".sh"))]
    script = ROOT / words[named[0]] if named else ROOT
    arguments = words[named[0] + 1 :] if named else []
    if script.suffix == ".py":
        return [str(script), *arguments]
    launched = re.fullmatch(r"run_text2video_(train|inference)\.sh", script.name)
    if not launched:
        return []
    launcher = ROOT / "Open-Sora"
    if not arguments or arguments[0].startswith("-"):
        arguments = [str(DEMO.with_name(f"vader_{launched[1]}.py")), *arguments]
    elif not Path(arguments[0]).exists() and (launcher / arguments[0]).exists():
        arguments = [str(launcher / arguments[0]), *arguments[1:]]
    return [str(launcher / "scripts" / "train_t2v_lora.py"), *arguments]


def outcome(script: str, *arguments: str) -> int:
    """Exit code of a script, or of `vader`, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            if script == "vader":
                return vader(arguments)
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.fixture(scope="session")
def small_run(twin, tmp_path_factory):
    """A run of one step on the tiny twin; its config lies beside it."""
    folder = tmp_path_factory.mktemp("docs") / "vader"
    assert twin_runs.start(twin, folder, max_train_steps=1) == 0
    return folder


@pytest.fixture
def with_a_run(small_run, repository, monkeypatch):
    """The repository, as the current directory, with that run as ``runs/vader``; without a network."""

    def snapshot_download(*args, **kwargs):
        raise LocalEntryNotFoundError("no hub here") from OSError("no hub here")

    monkeypatch.chdir(repository)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(repository / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", snapshot_download)
    monkeypatch.setattr(advice, "fake_run", lambda config, tell: FakeRun({"step": Phase(1 << 30)}, 1 << 30))
    shutil.copytree(small_run, repository / "runs" / "vader")
    shutil.copy(small_run.with_suffix(".config.py"), repository / "runs")
    (repository / "runs" / "mine").symlink_to("vader")
    for name, family in FAMILY_RUNS.items():
        write_run(repository / "runs" / name, family)
    (repository / "videos").symlink_to(next((repository / "runs" / "vader" / "samples").iterdir()))
    train = DEMO.with_name("vader_train.py")
    (repository / "my_train.py").write_text(f"_base_ = [{str(train)!r}]\n", encoding="utf-8")
    listed = [{"prompt_en": "a fox", "dimension": ["subject_consistency", "dynamic_degree"]}]
    (repository / "VBench_full_info.json").write_text(json.dumps(listed), encoding="utf-8")
    return repository


# Runs whose adapters the pages export, with their families.
FAMILY_RUNS = {"wan": "wan", "wan_t2v_1_3b": "wan", "ltx_video": "ltx", "cogvideox_2b": "cogvideox"}
FAMILY_RUNS |= {"hunyuan_video15_480p": "hunyuan_video15", "modelscope": "modelscope"}


def write_run(folder: Path, family: str) -> None:
    """What exporting reads of a run: its family, and an adapter of one layer, named as in Wan."""
    folder.mkdir()
    said = {"backbone": family, "resolution": "480p", "aspect_ratio": "9:16"}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    layer = "base_model.model.blocks.0.attn1.to_q.lora_{}.weight"
    state = {layer.format("A"): torch.ones(2, 8), layer.format("B"): torch.ones(8, 2)}
    (folder / "adapter").mkdir()
    save_file(state, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


# What stands for the reader's own in commands.
STANDS_FOR = {"CONFIG": "runs/vader.config.py", "RUN": "runs/vader", "FOLDER": "videos"}


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if {"nothing", "weights", "a run"} & {n for n, _ in needs(p)}],
    ids=lambda p: p.stem,
)
def test_marked_commands_lack_just_that(page, with_a_run, capsys):
    """Those that need a run pass on a small one, those that need nothing too; those that need weights fail without
    them, for no other reason."""
    for needed, block in needs(page):
        if needed not in ("nothing", "weights", "a run"):
            continue
        codes = []
        for words in commands(block):
            if call := called([STANDS_FOR.get(word, word) for word in words]):
                runs = Path(call[0]).name == "train_t2v_lora.py" or call[1:2] in (["train"], ["sample"])
                only = ["--check-only"] if runs else []
                codes.append(outcome(*call, *only))
                said = capsys.readouterr().err
                lacking = codes[-1] == 2 and ("cannot be fetched" in said)
                assert codes[-1] == 0 or (needed == "weights" and lacking), f"{words}\n{said[-3000:]}"
        assert codes and (needed != "weights" or 2 in codes), f"needs nothing:\n{block}"


ALL_KEYS = {
    key
    for family in BACKBONES
    for objective in OBJECTIVES
    for key in keys_of(sections_of({"backbone": family, "objective": objective}))
}


def assigned(node: ast.stmt) -> list[str]:
    """Names that a statement binds; "?" for anything else than names."""
    return [getattr(target, "id", "?") for target in node.targets] if isinstance(node, ast.Assign) else ["?"]


def config_snippets(page: Path) -> Iterator[tuple[str, str]]:
    """Suffix and text of each block that is a config; one of Python that sets a key again is several."""
    for _, language, block in BLOCK.findall(read(page)):
        if language in ("yaml", "json") and "_base_" in block:
            yield language, block
        nodes = ast.parse(block).body if language == "python" else []
        if any(name not in {*ALL_KEYS, "_base_"} for node in nodes for name in assigned(node)):
            continue
        lines: list[str] = []
        names: set[str] = set()
        for node in nodes:
            if names & set(assigned(node)):
                yield "py", "\n".join(lines)
                lines, names = [], set()
            lines.append(ast.unparse(node))
            names |= set(assigned(node))
        if lines:
            yield "py", "\n".join(lines)


def on_its_base(text: str) -> str:
    """A snippet whose ``_base_`` is the demo's config, or the config of another family that it names."""

    def absolute(named: re.Match) -> str:
        base = next((ROOT / "configs").rglob(named[2].rpartition("/")[2]), DEMO)
        return f"{named[1]}{base}"

    found, count = re.subn(r"(_base_[\"']?\s*[:=]\s*\[?[\"']?)([\w./-]+)", absolute, text)
    return found if count else f"_base_ = {str(DEMO)!r}\n{text}"


def write_demo_adapter(twins: Path, file: Path) -> None:
    """The twin's adapter with its factors cut or filled up to the demo's layers."""
    with (
        safe_open(twins, "pt") as given,
        safe_open(ROOT / "assets/demo/stdit/model.safetensors", "pt") as demo,
    ):
        state = {}
        for key in given.keys():
            layer, _, side = key.removeprefix("base_model.model.").rpartition(".lora_")
            rows, columns = demo.get_slice(f"{layer}.weight").get_shape()
            factor = given.get_tensor(key)
            state[key] = (
                torch.zeros(len(factor), columns) if side[0] == "A" else torch.zeros(rows, factor.shape[1])
            )
        save_file(state, file, given.metadata())


@pytest.fixture
def readers_files(with_a_run):
    """What the snippets name that a reader would have."""
    (with_a_run / "heldout.txt").write_text("a red circle moves right\n")
    (with_a_run / "prompts_with_pictures.txt").write_text("a boat\n")
    (with_a_run / "my_reward.py").write_text(
        read(ROOT / "docs" / "my_reward.py").replace("Daylight", "MyReward")
    )
    outcome(
        str(ROOT / "scripts" / "export_adapter.py"),
        "runs/vader/adapter",
        "own.safetensors",
        "--format",
        "safetensors",
    )
    for name in ("step_distilled", "style", "wan_4_steps"):
        (with_a_run / "loras").mkdir(exist_ok=True)
        write_demo_adapter(with_a_run / "own.safetensors", with_a_run / "loras" / f"{name}.safetensors")
    data = with_a_run / "data"
    data.mkdir()
    for name, part in (("OpenSora-STDiT-v3", "stdit"), ("OpenSora-VAE-v1.2", "vae"), ("t5-v1_1-xxl", "t5")):
        (data / name).symlink_to(ROOT / "assets" / "demo" / part)
    reward_twins.clip_folder(data / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    (data / "HPSv2").mkdir()
    (data / "HPSv2" / "HPS_v2.1_compressed.pt").touch()
    return with_a_run


@pytest.mark.parametrize("page", [p for p in PAGES if any(config_snippets(p))], ids=lambda p: p.stem)
def test_config_snippets_load_as_a_child_of_the_demos_config(page, readers_files):
    """A snippet of another family loads as a child of that family's config."""
    for suffix, text in config_snippets(page):
        file = readers_files / f"snippet.{suffix}"
        file.write_text(on_its_base(text).replace("/data/", f"{readers_files}/data/"))
        loaded = load_config([str(file)]).flat()
        plain = re.findall(r"^(\w+) = (\d\S*)$", text, re.MULTILINE)
        assert [float(value) for _, value in plain] == [loaded[key] for key, _ in plain]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_are_of_the_language_they_say(page):
    parsers = {"python": ast.parse, "json": json.loads, "yaml": yaml.safe_load, "sh": None, "text": None}
    for _, language, block in BLOCK.findall(read(page)):
        if parse := parsers[language]:
            parse(block)


@pytest.mark.parametrize("page", [p for p in PAGES if SHOWN.search(read(p))], ids=lambda p: p.stem)
def test_files_are_shown_as_they_are(page):
    for name, block in SHOWN.findall(read(page)):
        assert block == read(ROOT / name), name


def test_the_quickstart_s_table_is_the_same_on_both_pages():
    shown = re.compile(r"```text\n256 held-out.*?```", re.DOTALL)
    tables = [shown.search(read(ROOT / page))[0] for page in ("README.md", "docs/quickstart.md")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    dead = []
    for target in LINK.findall(CODE.sub("", read(page))):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in anchors(file)):
            dead.append(target)
    assert not dead


def test_the_tables_of_options_are_current():
    page = read(write_options.PAGE)
    assert write_options.with_table(page) == page, "run python scripts/write_options.py"


def test_the_help_of_the_commands_is_current():
    """But for line breaks, which differ between versions of Python."""
    page = read(write_command_line.PAGE)
    assert write_command_line.with_help(page).split() == page.split(), (
        "run python scripts/write_command_line.py"
    )


def test_every_page_is_on_the_site():
    listed = set(re.findall(r": (\S+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE))
    docs = ROOT / "docs"
    assert listed == {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
