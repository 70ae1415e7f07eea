"""The ``vader`` command: what each of its commands does before anything heavy is imported, and what it hands on."""

import ast
import contextlib
import errno
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

import Core
from Core.backbones import own_opensora
from Core.commands import completion, evaluate, init, launch, listing, run, torchrun
from Core.commands.catalogue import FILE, catalogue
from Core.commands.main import COMMANDS, main
from Core.config import ConfigError, load_config
from Core.estimate import advice
from Core.estimate.fake_run import FakeRun, Phase
from Core.utils import terminal
from Core.utils.files import replacing, replacing_folder
from Core.utils.hub import Weight
from Core.utils.shipped import find_config, shipped_configs
from Core.utils.synonyms import SYNONYMS
from Core.utils.words import counted, duration
from scripts import write_catalogue

ROOT = Path(__file__).resolve().parents[1]
VADER = [sys.executable, str(ROOT / "Core" / "__main__.py")]
LIGHT = """
import contextlib, io, sys
from Core.commands.main import COMMANDS, main
shells = [["completion", shell] for shell in ("bash", "zsh", "fish")]
for words in (["--version"], ["--help"], ["rewards"], *shells, *([name, "--help"] for name in COMMANDS)):
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        assert main(words) == 0, words
    assert said.getvalue().strip(), words
    if words[1:] == ["--help"]:
        assert said.getvalue().startswith(f"usage: vader {words[0]}"), words
assert "torch" not in sys.modules
"""


def vader(*words: str, **extra) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | extra
    return subprocess.run([*VADER, *words], env=environment, capture_output=True, text=True, timeout=300)


def test_help_version_and_lists_do_without_pytorch(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", LIGHT], env=environment, check=True, timeout=60)


def test_help_of_a_command_is_also_asked_for_in_words(capsys):
    assert main(["help", "train"]) == 0
    assert capsys.readouterr().out.startswith("usage: vader train CONFIG")
    assert main(["help", "trian"]) == 2


def test_the_version_is_that_of_the_package():
    assert vader("--version").stdout == f"vader {Core.__version__}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "there is no command 'trian': did you mean 'train'?"),
        (["train"], "name a config, such as `vader train vader_demo`; see `vader train --help`"),
        (["sample", "vader_dmo"], "config file 'vader_dmo' does not exist; did you mean 'vader_demo'?"),
        (["train", "t2v_1_3b"], "config file 't2v_1_3b' does not exist; did you mean 'wan/t2v_1_3b'?"),
        (
            ["train", "vader_demo", "--is-vader-training", "False"],
            "vader train with --is-vader-training False: use `vader sample`",
        ),
        (["report"], "the following arguments are required: run; see `vader report --help`"),
        (["score", "nowhere"], "there is no folder 'nowhere'; give one with videos"),
    ],
)
def test_slips_are_answered_in_a_sentence(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert f"error: {sentence}\n" in capsys.readouterr().err


@pytest.fixture
def handed_on(monkeypatch) -> list:
    """The configurations that commands would run."""
    found: list = []
    monkeypatch.setattr("Core.cli.run", found.append)
    for name in ("NUM_PROCESSES", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize("said", [True, False, None])
def test_the_command_decides_what_is_done(said, handed_on, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('_base_ = "vader_demo"\n' + (f"is_vader_training = {said}\n" if said is not None else ""))
    assert main(["train", str(file)]) == main(["sample", str(file)]) == 0
    assert [config.run.is_vader_training for config in handed_on] == [True, False]


def test_check_looks_at_what_the_config_does(handed_on, capsys):
    assert main(["check", "vader_demo"]) == main(["check", "vader_inference"]) == 0
    assert [config.run.is_vader_training for config in handed_on] == [True, False]
    assert all(config.run.check_only for config in handed_on)
    assert "nothing stands in the way" in capsys.readouterr().out


def test_several_adapters_in_one_flag_or_in_several():
    for flags in (["--adapter", "A", "B"], ["--adapter", "A", "--adapter", "B"]):
        assert evaluate.parser().parse_known_args(["CONFIG", *flags])[0].adapter == ["A", "B"]
        given = run.task_flags("sample", ["CONFIG", *flags, "--seed", "3"])
        assert given == [
            "CONFIG", "--seed", "3", "--lora-ckpt-path", "['A', 'B']", "--is-vader-training", "False"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "gpus", "processes"), [(None, 0, 1), (None, 4, 4), ("2", 4, 2), ("3", 0, 3), ("1", 8, 1)]
)
def test_one_process_for_each_gpu_or_as_many_as_asked_for(asked, gpus, processes):
    environment = {} if asked is None else {"NUM_PROCESSES": asked}
    assert launch.processes_to_start(environment, gpus) == processes


@pytest.mark.parametrize(
    ("asked", "gpus", "sentence"),
    [
        ("0", 1, "NUM_PROCESSES='0' is not a number of processes; give 1 or more"),
        ("two", 1, "NUM_PROCESSES='two' is not a number of processes; give 1 or more"),
        ("8", 4, "NUM_PROCESSES=8, but the visible GPUs number 4; give at most that"),
    ],
)
def test_no_fewer_processes_start_than_asked_for(asked, gpus, sentence):
    with pytest.raises(ConfigError, match=sentence):
        launch.processes_to_start({"NUM_PROCESSES": asked}, gpus)


def test_several_processes_are_checked_once_and_then_launched(handed_on, monkeypatch):
    launched: list = []
    monkeypatch.setattr(run, "launch", lambda *call: launched.append(call))
    monkeypatch.setenv("NUM_PROCESSES", "2")
    assert main(["train", "vader_demo", "--seed", "3"]) == 0
    assert [config.run.check_only for config in handed_on] == [2]
    flags = ["train", "vader_demo", "--seed", "3", "--is-vader-training", "True"]
    assert launched == [(2, flags)]

    monkeypatch.setenv("RANK", "1")  # one of those that were launched
    assert main(flags) == 0
    assert len(launched) == 1 and not handed_on[-1].run.check_only


def test_each_launched_process_runs_the_command():
    code = "from Core.commands.launch import launch; launch(2, ['--version'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    # A line's end is written by itself, and may come after the other process's line.
    assert done.stdout.replace("\n", "") == 2 * f"vader {Core.__version__}", done.stderr


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("sys.exit(3 * (os.environ['RANK'] == '1'))", 3, ""),
        (
            "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)",
            4,
            "error: a process of the run was ended by SIGKILL; ",
        ),
    ],
)
def test_a_launched_process_that_fails_gives_the_exit_code_and_no_traceback(tmp_path, script, code, said):
    package = tmp_path / "Core"
    package.mkdir()
    (package / "__main__.py").write_text(f"import os, signal, sys, time\n{script}\n")
    program = (
        "import pathlib, sys; from Core.commands import torchrun; "
        f"torchrun.PACKAGE = pathlib.Path({str(package)!r}); sys.exit(torchrun.main(['2']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr and done.stderr.count("error: ") == bool(said), done.stderr


WORKER = """import os, pathlib, signal, time
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
pathlib.Path(os.environ["READY"] + os.environ["RANK"]).touch()
while len(got) < 3:
    time.sleep(0.05)
time.sleep(3)
print("saved", flush=True)
"""
UNPREPARED = """import os, pathlib, time
pathlib.Path(os.environ["READY"] + os.environ["RANK"]).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("worker", "numbers", "code"),
    [
        (WORKER, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), 0),
        (UNPREPARED, (signal.SIGUSR1,), 128 + signal.SIGUSR1),
    ],
    ids=["prepared", "unprepared"],
)
def test_signals_reach_launched_processes(tmp_path, worker, numbers, code):
    """They may take longer than torchrun would wait, and the exit code is theirs; without handlers they end."""
    package = tmp_path / "Core"
    package.mkdir()
    (package / "__main__.py").write_text(worker)
    program = (
        "import pathlib, sys; from Core.commands import torchrun; "
        f"torchrun.PACKAGE = pathlib.Path({str(package)!r}); sys.exit(torchrun.main(['2']))"
    )
    added = {"PYTHONPATH": str(ROOT), "READY": str(tmp_path / "ready"), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | added, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    for number in numbers:
        launcher.send_signal(number)
        time.sleep(0.2)
    out, told = launcher.communicate(timeout=60)
    assert launcher.returncode == code and out.count("saved") == 2 * (code == 0), told
    assert "was ended by" not in told and "Traceback" not in told


def test_of_several_exit_codes_that_of_a_process_that_has_spoken_counts(capsys):
    assert torchrun.explained([-signal.SIGTERM, 3]) == 3 and not capsys.readouterr().err
    assert torchrun.explained([-signal.SIGTERM, -signal.SIGSEGV]) == 4
    assert "SIGSEGV" in capsys.readouterr().err
    assert torchrun.explained([-40]) == 4 and "ended by signal 40; " in capsys.readouterr().err


@pytest.mark.parametrize("file", ["Core/__main__.py", "Core/commands/torchrun.py"])
@pytest.mark.parametrize("safe", [{}, {"PYTHONSAFEPATH": "1"}], ids=["with its folder", "safe path"])
def test_a_program_started_by_its_path_finds_core_alone(file, safe, tmp_path):
    """Nothing of the paths is lost but its own folder, whose modules have common names."""
    shown = "import atexit, sys; atexit.register(lambda: print(sys.path))"
    (tmp_path / "sitecustomize.py").write_text(shown)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), **safe}
    done = subprocess.run(
        [sys.executable, str(ROOT / file), "--version"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    paths = ast.literal_eval(done.stdout.splitlines()[-1])
    assert paths[0] == str(ROOT) and str(tmp_path) in paths and str((ROOT / file).parent) not in paths
    assert "No module named" not in done.stderr


def test_configs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = ROOT / "Open-Sora/configs/opensora-v1-2/vader/vader_demo.py"
    for path in ("vader_demo", "vader_demo.py", "configs/opensora-v1-2/vader/vader_demo.py", str(demo)):
        assert Path(find_config(path)).samefile(demo)
    wan = ROOT / "configs/wan/t2v_1_3b.py"
    for path in ("wan/t2v_1_3b", "configs/wan/t2v_1_3b.py", "configs/wan/t2v_1_3b"):
        assert Path(find_config(path)).samefile(wan)
    (tmp_path / "vader_demo.py").write_text('_base_ = "wan/t2v_1_3b"\nlr = 3e-4\n')
    assert find_config("vader_demo.py") == "vader_demo.py"  # what lies in the current directory comes first
    config = load_config(["vader_demo.py"])
    assert (config.models.backbone, config.optimizer.lr) == ("wan", 3e-4)
    assert find_config("neither") == "neither" and find_config("") == ""


def test_every_shipped_config_is_listed():
    own = {path.stem for path in (ROOT / "configs").rglob("*.py")} | {
        "vader_demo",
        "vader_quickstart",
        "vader_inference",
        "vader_train",
    }
    assert {name.rpartition("/")[2] for name in shipped_configs()} == own - {"training"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--learning-rate", "--lr"),
        ("--lerning-rate", "--lr"),
        ("--batch-size", "--train-batch-size"),
        ("--steps", "--max-train-steps"),
        ("--output-dir", "--project-dir"),
        ("--rank", "--lora-rank"),
        ("--prompts", "--prompt-path"),
        ("--max-train-step", "--max-train-steps"),
        ("--lane", ""),  # two letters of --lr are no meaning
    ],
)
def test_suggestions_are_near_in_meaning(given, meant):
    with pytest.raises(ConfigError) as refused:
        load_config(["vader_demo", given, "1"])
    said = f"unknown flag {given}" + (f": did you mean {meant!r}?" if meant else "; see --help")
    assert str(refused.value) == said


def test_every_synonym_means_a_key():
    keys = set(catalogue()["keys"])
    assert not {name for name, meant in SYNONYMS.items() if not keys & set(meant)}
    assert not keys & set(SYNONYMS), "a key is itself"


def test_the_catalogue_is_current():
    assert FILE.read_text(encoding="utf-8") == write_catalogue.catalogue(), "run scripts/write_catalogue.py"


def test_rewards_are_listed_with_what_is_on_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pinned = Weight(
        source="https://example.org/head.pth", kind="file", file="head.pth", size=2_000_000, licence="MIT"
    )
    assert listing.weight_words([pinned]) == "2.0 MB, MIT; not fetched"
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "head.pth").touch()
    assert listing.weight_words([pinned]) == "2.0 MB, MIT; on this machine"
    assert main(["rewards"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in catalogue()["rewards"])
    assert "lower is better" in printed and "without a gradient" in printed


def test_models_are_listed(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in shipped_configs())
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in printed and "28.9 GB, Apache-2.0" in printed


def predicted_gib(config, processes=1, tell=None) -> FakeRun:
    """A prediction in no time: what each of these settings saves of 30 GiB."""
    saved = {"activation_offloading": 5, "stream_blocks": 10}
    needed = 30 - sum(gib for key, gib in saved.items() if config.flat()[key] is True)
    text = 0 if config.models.text_encoding == "cpu" else 18
    return FakeRun({"text": Phase(text << 30), "backward": Phase(needed << 30)}, 1 << 30)


@pytest.mark.parametrize(
    ("memory", "offloads", "streams"), [(80, 0, 0), (30, 1, 0), (24, 1, 1), (19, 1, 1), (8, 1, 1)]
)
@pytest.mark.parametrize(("model", "reward"), [("vader_train", "hps"), ("cogvideox/2b", "motion_smoothness")])
def test_init_writes_a_config_that_fits(
    model, reward, memory, offloads, streams, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(advice, "fake_run", predicted_gib)
    Path("my prompts.txt").write_text("a fox\n")
    flags = ["--model", model, "--reward", reward, "--memory", str(memory), "--prompts", "my prompts.txt"]
    assert main(["init", "mine.py", *flags]) == 0
    config = load_config(["mine.py"])
    assert (config.reward.reward_fn, config.run.project_dir) == (reward, "runs/mine")
    assert [prompt.reward_text for prompt in config.prompt_list] == ["a fox"]
    assert (config.models.activation_offloading, config.models.stream_blocks) == (offloads, streams)
    assert (config.models.text_encoding == "cpu") == (memory < 20), "the text encoder needs the most then"
    fits = predicted_gib(config).peak < memory * 10**9
    text = Path("mine.py").read_text()
    assert fits == (memory > 8) and ("Predicted to need" if fits else f"Does not fit {memory} GB") in text
    assert main(["init", "mine.py", *flags]) == 2 and "exists already" in capsys.readouterr().err


def test_init_writes_a_config_although_nothing_can_be_predicted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise ValueError("its size is not published")

    monkeypatch.setattr(advice, "fake_run", refuse)
    flags = ["--model", "vader_train", "--reward", "hps", "--memory", "24"]
    assert main(["init", "mine.py", *flags]) == 0
    assert "is not known: its size is not published" in Path("mine.py").read_text()
    assert load_config(["mine.py"]).reward.reward_fn == "hps"


def test_init_leaves_a_config_when_the_prediction_is_cut_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(advice, "fake_run", interrupted)
    flags = ["--model", "vader_train", "--reward", "hps", "--memory", "24"]
    with contextlib.suppress(KeyboardInterrupt):
        assert main(["init", "mine.py", *flags]) != 0
    assert "was not predicted" in Path("mine.py").read_text()
    assert load_config(["mine.py"]).reward.reward_fn == "hps"


def test_init_writes_a_config_for_every_model_and_reward(tmp_path):
    file = tmp_path / "mine.py"
    models = [name for name, model in catalogue()["models"].items() if model["for_init"]]
    rewards = [name for name, reward in catalogue()["rewards"].items() if not reward["required"]]
    assert len(models) > 8 and len(rewards) > 15
    for model, reward in [
        *((model, "hps") for model in models),
        *(("vader_train", name) for name in rewards),
    ]:
        chosen = {"model": model, "reward": reward, "memory": "24"}
        file.write_text(init.config_text(file, chosen, None, "Predicted.", {}))
        load_config([str(file)])


def test_init_asks_for_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--reward", "hps"]) == 2
    missing = "error: --model is missing (vader models), such as --model vader_train\n"
    assert capsys.readouterr().err == missing
    monkeypatch.setattr(advice, "fake_run", predicted_gib)
    answers = iter(["ltx/ltx_vidoe", "ltx/ltx_video", "", "many", "24"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert main(["init", "configs/my_train.py"]) == 0
    told = capsys.readouterr().out
    assert "there is no model 'ltx/ltx_vidoe'" in told and "got 'many'" in told, "it asks again"
    assert '_base_ = "ltx/ltx_video"' in Path("configs/my_train.py").read_text()
    assert 'reward_fn = "hps"' in Path("configs/my_train.py").read_text()

    def close(question: str) -> str:  # Ctrl-D
        raise EOFError

    monkeypatch.setattr("builtins.input", close)
    assert main(["init"]) == 2 and capsys.readouterr().err == missing


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--model", "wan/t2v_13b", "--reward", "hps"],
            "there is no model 'wan/t2v_13b': did you mean 'wan/t2v_1_3b'?",
        ),
        (["--model", "vader_train", "--reward", "hsp"], "there is no reward 'hsp': did you mean 'hps'?"),
        (
            ["--model", "vader_train", "--reward", "hinge"],
            "reward 'hinge' needs reward, target in reward_args",
        ),
        (["my.yaml"], "give a name that ends in .py, not 'my.yaml'"),
        (["--memory", "-3"], "memory must be a whole number of GB above 0, got '-3'"),
        (["--memory", "0"], "memory must be a whole number of GB above 0, got '0'"),
        (["--reward", "my_reward.py:Mine"], "there is no file 'my_reward.py' for --reward"),
        (["--reward", "my_reward.py"], "lacks its class: write my_reward.py:CLASS"),
        (["--reward", f"{__file__}:"], f"lacks its class: write {__file__}:CLASS"),
        (["--prompts", "prompts.txt"], "there is no file 'prompts.txt' for --prompts"),
    ],
)
def test_init_refuses_what_does_not_exist(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sound = ("--model", "vader_train", "--reward", "hps", "--memory", "24")
    assert main(["init", *sound, *flags]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


class Full(io.RawIOBase):
    """A file on a full disk: writing to an open one fails without a name."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_cannot_be_written_is_said_without_numbers_and_hidden_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    sound = ("--model", "vader_train", "--reward", "hps", "--memory", "24")
    assert main(["init", "taken/my.py", *sound]) == 2
    assert capsys.readouterr().err == "error: 'taken': file exists\n"
    with pytest.raises(NotADirectoryError) as refused, replacing(Path("taken/my.py")) as partial:
        partial.touch()
    assert refused.value.filename == "taken/my.py"
    with pytest.raises(OSError, match="No space left") as full, replacing(Path("my.py")):
        Full().write(b"")
    assert full.value.filename == "my.py" and full.value.errno == errno.ENOSPC and not Path("my.py").exists()


COMPLETE = """eval "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vader; printf '%s\\n' "${COMPREPLY[@]}" """


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_completes_commands_configs_and_keys(tmp_path):
    script = completion.script("bash")

    def completed(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", COMPLETE, "-", script, "vader", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done.stdout.split()

    (tmp_path / "wandering.py").touch()
    assert completed("sc") == ["score"]
    assert completed("train", "wan") == [
        *(n for n in shipped_configs() if n.startswith("wan/")),
        "wandering.py",
    ]
    assert completed("train", "vader_demo", "--lora-r") == ["--lora-rank"]
    assert completed("estimate", "vader_demo", "--gp") == ["--gpu"]
    assert completed("rewards", "--lora-r") == []
    assert completed("quickstart", "--lora-r") == ["--lora-rank"]
    assert completed("help", "tr") == ["train"] and completed("completion", "b") == ["bash"]
    assert completed("train", "vader_demo", "--reward-fn", "hp") == ["hps", "hpsv3"]
    assert completed("export", "A", "B", "--to", "com") == ["comfyui"]
    (tmp_path / "my prompts.txt").touch()
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "-", script, "vader", "score", "my"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "my prompts.txt\n"


def test_other_shells_complete_the_same():
    assert completion.script("zsh").endswith(completion.script("bash"))
    fish = completion.script("fish")
    assert all(f"-a {name} " in fish for name in COMMANDS) and "-l lora-rank" in fish
    download = [line for line in fish.splitlines() if "from download'" in line]
    assert [line.rpartition(" -l ")[2] for line in download if " -r" not in line] == ["help", "list"]
    assert any("from quickstart' -l lora-rank -r" in line for line in fish.splitlines())
    assert [line for line in fish.splitlines() if line.replace(r"\'", "").count("'") % 2] == []


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes(tmp_path):
    typed = {
        "vader sc": "score",
        "vader train x --reward-fn hpsv": "hpsv3",
        "vader export a b --to com": "comfyui",
        "vader help tr": "train",
        "vader completion b": "bash",
    }
    asked = "\n".join(f'complete -C "{line}"' for line in typed)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"{completion.script('fish')}\n{asked}"],
        env=os.environ | {"HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == list(typed.values())


@pytest.mark.parametrize(
    ("files", "library", "command"),
    [
        ([], "own", "own"),
        (["__init__.py", own_opensora.OF_1_2], "installed", "installed"),
        (["__init__.py"], "installed", "own"),  # another version
    ],
)
def test_an_installed_opensora_is_not_shadowed(files, library, command, tmp_path, monkeypatch):
    for name in files:
        file = tmp_path / "opensora" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.delitem(sys.modules, "opensora")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    places = {tmp_path / "opensora": "installed", ROOT / "Open-Sora" / "opensora": "own"}

    def found() -> str:
        return places[Path(importlib.util.find_spec("opensora").origin).parent]

    own_opensora.offer_copy()
    assert found() == library
    own_opensora.prefer_copy_to_other_versions()
    assert found() == command


@pytest.mark.parametrize(
    ("code", "file", "named"),
    [
        (errno.ENOSPC, None, "adapter"),
        (errno.ENOSPC, "inside", "adapter"),
        (errno.ECONNREFUSED, None, None),
        (errno.ENOENT, "../elsewhere", "elsewhere"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(tmp_path, code, file, named):
    with pytest.raises(OSError) as fault:
        with replacing_folder(tmp_path / "adapter") as folder:
            raise OSError(code, os.strerror(code), file and os.path.normpath(folder / file))
    assert fault.value.filename == (named and str(tmp_path / named)) and not any(tmp_path.iterdir())


def test_what_is_written_has_the_permissions_of_the_umask(tmp_path):
    """safetensors gives its files to their owner alone."""
    umask = os.umask(0o027)
    try:
        with replacing(tmp_path / "one.safetensors") as partial:
            save_file({"a": zeros(1)}, partial)
        with replacing_folder(tmp_path / "adapter") as folder:
            save_file({"a": zeros(1)}, folder / "adapter_model.safetensors")
    finally:
        os.umask(umask)
    for file in ("one.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o640


def test_what_lasts_is_said_where_nothing_can_be_drawn(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "console", terminal.Console(stderr=True))
    with terminal.status("loading …"):
        assert capsys.readouterr().err == "loading …\n"
    with terminal.status("loading …", shown=False):
        assert capsys.readouterr().err == ""


def test_one_is_no_plural():
    assert [counted(n, "video") for n in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]


def test_a_time_is_said_in_its_two_largest_units():
    times = {5: "5 s", 59.7: "1 min 00 s", 65: "1 min 05 s", 3700: "1 h 01 min", 500_000: "5 d 18 h"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_the_catalogue_is_data():
    assert json.loads(FILE.read_text(encoding="utf-8")) == catalogue()
