"""The proof on a GPU: its parts, their limits, the file it writes, and the page made of it."""

import importlib
import json
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pipelines
import pytest
import torch

from Core.backbones.base import ModelSettings
from Core.backbones.wan import Wan
from Core.config.files import read_file
from Core.rewards.hps import HPS
from scripts.bench import page
from scripts.bench.networks import RandomHPS, RandomWan
from scripts.bench.presets import PRESETS
from scripts.gpu import carry, predictor, prove, steps, tables
from scripts.gpu.part import Report
from scripts.gpu.part import main as run_part
from scripts.gpu.parts import LEAST_SECONDS, PARTS, TOTAL_SECONDS, Part
from scripts.gpu.parts import PRESETS as PRESET_OF

ROOT = Path(__file__).parents[1]
GIB = 2**30
# Stands in for the program of a part: NAME FILE as arguments.
PROGRAM = """
import json, pathlib, subprocess, sys, time
name, file = sys.argv[1], pathlib.Path(sys.argv[2])
file.write_text(json.dumps({"said": name}))
if name == "fails":
    sys.exit("error: on purpose")
if name == "hangs":
    touch = "import time, pathlib, sys; path = pathlib.Path(sys.argv[1]); path.with_name('begun').touch(); "
    subprocess.Popen([sys.executable, "-c", touch + "time.sleep(3); path.touch()", sys.argv[3]])
    time.sleep(60)
"""


def part(name: str, limit: float = 30) -> Part:
    return Part(name, limit, "", f"what {name} shows")


def proof(file: Path, *arguments: str, total: float = 60) -> prove.Proof:
    program = PROGRAM.replace("sys.argv[3]", repr(arguments[0])) if arguments else PROGRAM
    return prove.Proof(file, False, total, [sys.executable, "-c", program])


def test_each_part_has_a_function_and_time_to_run():
    assert [p.name for p in PARTS][0] == "machine" and len({p.name for p in PARTS}) == len(PARTS)
    for p in PARTS:
        module, _, function = p.function.partition(":")
        assert callable(getattr(importlib.import_module(f"scripts.gpu.{module}"), function))
        assert LEAST_SECONDS < p.limit < TOTAL_SECONDS <= 540


def test_each_test_of_a_gpu_is_run_by_one_part():
    names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_cuda.py").read_text(), re.MULTILINE)
    wanted = [p.arguments for p in PARTS if p.function == "checks:run"]
    for name in names:
        assert sum(any(word in name for word in words) for words in wanted) == 1, name
    for word in (word for words in wanted for word in words):
        assert any(word in name for name in names), word


def test_every_size_that_a_part_measures_has_a_preset():
    sized = [p for p in PARTS if p.function in ("steps:phases", "steps:cost")]
    assert {p.arguments[0] for p in sized} == PRESET_OF.keys()
    assert set(PRESET_OF.values()) <= PRESETS.keys()
    assert set(tables.SIZED) == {p.name for p in PARTS if p.function.startswith("steps:")} - {"plain"}
    assert set(predictor.COMPARED) == set(tables.SIZED) - {"streamed"}  # which no estimate knows


def test_a_part_that_fails_keeps_its_results_and_does_not_stop_the_next(tmp_path):
    file = tmp_path / "new" / "gpu.json"
    result = proof(file).run([part("fails"), part("works")])
    assert json.loads(file.read_text()) == result
    failed, worked = result["parts"].values()
    assert (failed["status"], failed["result"]) == ("failed", {"said": "fails"})
    assert failed["log"][-1] == "error: on purpose"
    assert (worked["status"], worked["result"]["said"], "log" in worked) == ("done", "works", False)


def test_a_part_past_its_limit_is_stopped_with_what_it_started(tmp_path):
    touched = tmp_path / "touched"
    started = time.monotonic()
    result = proof(tmp_path / "gpu.json", str(touched)).run([part("hangs", 2), part("works")])
    assert time.monotonic() - started < 40  # it would take 60
    hung, worked = result["parts"].values()
    assert (hung["status"], hung["result"], worked["status"]) == ("stopped", {"said": "hangs"}, "done")
    time.sleep(2)
    assert (tmp_path / "begun").exists() and not touched.exists(), "the child of a stopped part lived on"


def test_the_file_is_whole_after_every_part(tmp_path, monkeypatch):
    kept = []
    save = prove.save

    def noted(file, result):
        save(file, result)
        kept.append(list(json.loads(file.read_text())["parts"]))

    monkeypatch.setattr(prove, "save", noted)
    proof(tmp_path / "gpu.json").run([part("one"), part("two")])
    assert kept == [["one"], ["one", "two"]]


def test_parts_that_find_no_time_left_are_named(tmp_path):
    result = proof(tmp_path / "gpu.json", total=5).run([part("late")])
    assert result["parts"]["late"]["status"] == "no time left"


def test_a_proof_that_is_ended_leaves_no_part_behind(tmp_path):
    """As at the time limit of a queue."""
    touched = tmp_path / "touched"
    program = PROGRAM.replace("sys.argv[3]", repr(str(touched)))
    code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from scripts.gpu import prove
from scripts.gpu.parts import Part
prove.end_on_sigterm()
command = [sys.executable, "-c", {program!r}]
prove.Proof(Path({str(tmp_path / "gpu.json")!r}), False, 60, command).run([Part("hangs", 60, "", "")])
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(10) == 143
    time.sleep(2)
    assert not touched.exists()


def test_a_part_writes_what_it_measures(tmp_path):
    file = tmp_path / "result.json"
    run_part(["machine", str(file), "--small"])
    measured = json.loads(file.read_text())
    assert min(measured["ceilings"].values()) > 0 and measured["bandwidth"] > 0
    assert measured["versions"]["torch"] == torch.__version__ and measured["hardware"]["cpu"]


def test_a_report_keeps_what_was_added_before(tmp_path):
    report = Report(tmp_path / "result.json")
    report.add(first=1)
    report.add(second=2)
    assert json.loads(report.file.read_text()) == {"first": 1, "second": 2}


def test_a_missing_package_is_said_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    report = Report(tmp_path / "result.json")
    steps.stored(report, True, "base_quant=nf4")
    assert report.values == {"missing": "bitsandbytes is not installed"}


def test_the_file_is_not_part_of_the_recorded_command():
    assert prove.recorded(["--only", "plain", "--json", "/x/gpu.json", "--total", "9"]) == [
        *("--only", "plain", "--total", "9")
    ]
    assert prove.recorded(["--small"]) == ["--small"]


def test_a_part_is_added_to_what_the_file_holds(tmp_path, measured, monkeypatch):
    """Without a GPU, one that needs none."""
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(measured))
    monkeypatch.setattr(prove, "has_gpu", lambda: False)
    monkeypatch.setattr(
        prove.Proof, "run_part", lambda proof, part, limit: {"status": "done", "small": proof.small}
    )
    assert prove.main(["--json", str(file), "--add", "--only", "predictor"]) == 0
    found = json.loads(file.read_text())
    assert found["parts"]["predictor"]["status"] == "done" and found["parts"]["predictor"]["small"] is False
    assert found["parts"]["phases"] == measured["parts"]["phases"] and found["command"] == measured["command"]


def test_a_part_that_needs_a_gpu_is_not_added_without_one(tmp_path, measured, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(measured))
    monkeypatch.setattr(prove, "has_gpu", lambda: False)
    assert prove.main(["--json", str(file), "--add", "--only", "predictor", "720p"]) == 2
    assert "720p cannot be added without a GPU" in capsys.readouterr().err
    assert json.loads(file.read_text()) == measured
    file.write_text("{}")
    assert prove.main(["--json", str(file), "--add", "--only", "predictor"]) == 2
    assert "holds no proof to add to" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--only", "nosuch"], ["--total", "0"], ["--add", "--json", "nosuch.json"]])
def test_wrong_calls_are_refused(argv):
    with pytest.raises(SystemExit):
        prove.parse(argv)


# Networks


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("wan-1.3b-480p", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("wan-ti2v-5b-480p", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    ],
)
def test_wan_has_the_size_of_the_published_files(preset, published):
    """In float32, as they are."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    components = PRESETS[preset].values["components"]
    with torch.device("meta"):
        networks = [
            WanTransformer3DModel.from_config(components["transformer"]),
            AutoencoderKLWan.from_config(components["vae"]),
        ]
    size = sum(4 * p.numel() for network in networks for p in network.parameters())
    assert size == pytest.approx(Wan.published[published].size, rel=0.01)


@pytest.mark.parametrize("part", ["wan-1.3b", "wan-ti2v-5b"])
def test_wan_is_measured_with_the_keys_that_are_predicted(part):
    config, changes = predictor.COMPARED[part]
    predicted = {**read_file(str(config)), "gradient_accumulation_steps": 1, **changes}
    measured = PRESETS[PRESET_OF[part]].values
    apart = {"backbone", "components", "negative_prompt", "prompt", "reward_fn", "verbose"}
    defaults = {field.name: field.default for field in fields(ModelSettings)}
    for key in (measured.keys() | defaults.keys()) - apart:
        default = defaults.get(key)
        assert measured.get(key, default) == predicted.get(key, default), key


def test_the_scorer_of_full_size_has_the_size_of_the_published_file():
    """In float32, as it is."""
    preset = PRESETS["xl2-240p"]
    with torch.device("meta"):
        scorer = RandomHPS(preset.vit, preset.vit_text)
    size = sum(4 * tensor.numel() for tensor in (*scorer.parameters(), *scorer.buffers()))
    assert size == pytest.approx(HPS.info.weights["model"].size, rel=0.01)


def test_random_networks_have_the_dtypes_of_loaded_ones(tmp_path):
    folder = pipelines.save_wan(tmp_path / "wan")
    (loaded, _) = pipelines.loaded("wan", folder, dtype="bf16")
    names = {"index": "model_index.json", "transformer": "transformer/config.json", "vae": "vae/config.json"}
    components = {name: json.loads((folder / file).read_text()) for name, file in names.items()}
    random = RandomWan(
        type("Settings", (), {"components": components, "vae_dtype": "fp32"})(),
        loaded.models,
        loaded.video,
        loaded.device,
    )
    for ours, theirs in ((random.load_denoiser(), loaded.denoiser), (random.load_vae(), loaded.vae)):
        wanted = {name: (p.shape, p.dtype) for name, p in theirs.named_parameters()}
        assert {name: (p.shape, p.dtype) for name, p in ours.named_parameters()} == wanted


# The page


def step_cost(seconds: float, peak: float) -> dict:
    phase = {"seconds": seconds, "peak_bytes": int(peak * GIB), "operations": 6e14, "bytes": 1e9}
    return {
        "latent": [4, 15, 34, 46],
        "sampling_steps": 30,
        "step_seconds": [seconds],
        "phase_seconds": {"prefix": 29 * 0.02},
        "peak_bytes": int(peak * GIB),
        "reserved_bytes": int((peak + 1) * GIB),
        "phases": {"prefix": {**phase, "roofline_seconds": 1.0}},
        "ceiling": 8e14,
        "bandwidth": 4e12,
        "dtype": "bfloat16",
    }


@pytest.fixture
def measured() -> dict:
    """A proof that was cut off after some parts, another of which failed."""
    sides = [{"setting": s, "seconds": [1.0], "cpu_seconds": [1.0], "peak_bytes": GIB} for s in "ab"]
    results = {
        "machine": {"ceilings": {"bfloat16": 8e14}, "bandwidth": 4e12}
        | {"card": {"name": "Card", "memory": 80 * GIB, "cuda": "13.0", "driver": "580"}},
        "phases": step_cost(1.25, 12),
        "plain": {"sides": sides, "ratios": {"seconds": [5.0], "cpu_seconds": [5.0]}},
        "360p": step_cost(3.0, 30),
        "graph": {"eager_seconds": 1.0, "graph_seconds": 0.8},
        "kernels": {
            "tests": [
                {"name": "test_x", "outcome": "passed", "recorded": {"error": 0.0012345}, "message": ""},
                {"name": "test_y", "outcome": "failed", "recorded": {}, "message": "it broke"},
            ]
        },
        "nf4": {"missing": "bitsandbytes is not installed"},
        "predictor": {
            "predictions": {
                "phases": {
                    "phases": {"text": {"peak_bytes": 20 * GIB}, "prefix": {"peak_bytes": 12.6 * GIB}}
                },
                "360p": {"error": "x"},
            }
        },
    }
    parts = {name: {"status": "done", "seconds": 9.0, "result": result} for name, result in results.items()}
    parts["720p"] = {"status": "failed", "seconds": 3.0, "result": {}, "log": ["a", "error: out | of memory"]}
    parts["fp8"] = {"status": "no time left"}
    top = {"kind": "proof", "small": False, "preset": "full size", "command": "python scripts/gpu/prove.py"}
    hardware = {"gpus": ["Card, 80 GB"], "cpu": "CPU", "cores": 16}
    return top | {"hardware": hardware, "versions": {"torch": "2.11"}, "parts": parts}


def test_the_page_shows_what_was_measured_and_what_was_not(measured):
    shown = tables.text(measured)
    for line in (
        "Card, 80 GiB, CUDA 13.0, driver 580. A large matrix product reaches 800.0 TFLOP/s in bfloat16",
        "| 240p, times as fast as `plain` | ≥ 3 | 5.0 | yes |",
        "| 240p, steps without a gradient | ≥ 50% of the ceiling | 60.0% of the ceiling | yes |",
        "| 240p, memory | ≤ 16 GiB | 13.0 GiB | yes |",
        "| 360p, memory | ≤ 24 GiB | 31.0 GiB | no |",
        "| 720p, memory | ≤ 80 GiB | not measured |  |",
        "| 240p in 4 bits, memory | ≤ 10 GiB | not measured |  |",
        "| xl2-360p | 4 × 15 × 34 × 46 | 30 | 3.00 | 0.020 | 30.00 | 31.00 |",
        "| graph | 1.000 | 0.800 | 1.25 |",
        "| `test_x` | passed | error 0.00123 |",
        "| `test_y` | failed | it broke |",
        "| phases | 12.60 | 12.00 | +5.0% |",
        "| nf4 | done | 9 | bitsandbytes is not installed |",
        "| 720p | failed | 3 | error: out \\| of memory |",
        "| fp8 | no time left | 0 |  |",
    ):
        assert line in shown
    assert page.KINDS["proof"].bars(measured) == {"xl2-240p": 1.25, "xl2-360p": 3.0}


def test_a_proof_without_results_still_makes_a_page(measured):
    measured["parts"] = {"machine": measured["parts"]["machine"]}
    assert "| machine | done |" in tables.text(measured)


@pytest.fixture
def docs(tmp_path, monkeypatch) -> Path:
    """An empty folder of results, and a page of one line."""
    (tmp_path / "page.md").write_text(f"Prose.\n\n{page.BEGIN}\n")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "FOLDER", tmp_path / "benchmarks")
    page.FOLDER.mkdir()
    return page.FOLDER


def test_without_a_proof_the_page_says_so(docs):
    assert page.NO_GPU in page.text()


def test_the_page_is_written_from_the_file(docs, measured):
    (docs / "gpu.json").write_text(json.dumps(measured))
    page.write()
    written = page.PAGE.read_text()
    assert written.startswith(
        f"Prose.\n\n{page.BEGIN}\n\n### gpu\n\n`python scripts/gpu/prove.py` on Card, 80 GB"
    )
    assert page.NO_GPU not in written and (docs / "gpu.svg").exists()


@pytest.mark.parametrize("change", [{"small": True}, {"hardware": {"gpus": []}}])
def test_figures_of_a_cpu_are_not_taken_for_a_proof(docs, measured, change):
    (docs / "gpu.json").write_text(json.dumps(measured | change))
    with pytest.raises(ValueError, match="is no proof on a GPU at full size"):
        page.text()


def test_the_readme_says_where_the_figures_are_from():
    proven = (page.ROOT / "docs" / "benchmarks" / "gpu.json").exists()
    said = "All measurements are from CPUs." in " ".join((ROOT / "README.md").read_text().split())
    assert said != proven, "mend the sentence under Hardware in README.md"


# Packages


def test_packages_are_those_of_the_requirements():
    text = 'av==18.1.0; python_version >= "3.11"\nav==17.1.0; python_version < "3.11"\nftfy==6.3.1\n'
    assert carry.pinned(["av", "ftfy", "addict"], text) == ["av==18.1.0", "ftfy==6.3.1", "addict"]


def test_what_travels_has_a_limit():
    good, said = carry.fits(30 * 2**20, 26 * 2**20)
    assert good and said == "30.0 MiB of packages and 26.0 MiB of checkout are 56.0 MiB, within 64"
    assert carry.fits(40 * 2**20, 26 * 2**20)[0] is False


def test_an_archive_holds_the_files_of_all_wheels(tmp_path):
    import tarfile
    import zipfile

    for name in ("one", "two"):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    carry.pack(sorted(tmp_path.glob("*.whl")), tmp_path / carry.ARCHIVE)
    with tarfile.open(tmp_path / carry.ARCHIVE) as packed:
        assert {"./one/__init__.py", "./two/__init__.py"} <= set(packed.getnames())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.whl", carry.ARCHIVE, "two.whl"]
