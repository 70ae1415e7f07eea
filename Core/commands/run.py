"""``vader train``, ``vader sample`` and ``vader check``: a config with flags, and the processes of its run."""

import argparse
import os
from collections.abc import Sequence

from Core.commands.launch import is_launched, launch, processes_to_start
from Core.commands.startup import importing
from Core.utils.errors import ConfigError
from Core.utils.exit_codes import answer, exit_code
from Core.utils.process import end_with_launcher

CONFIG = """CONFIG is a file, the folder of a run, or the name of a config that ships (`vader models`). Every key of the
config is a flag too; `vader {command} CONFIG --help` lists them."""
PROCESSES = "One process starts for each visible GPU; NUM_PROCESSES=N in the environment sets another number."
HELP = {
    "train": f"""usage: vader train CONFIG [flags]

Trains an adapter with a reward, into the config's project_dir. The same command continues an interrupted run.
{CONFIG}
{PROCESSES}

  vader train vader_demo --max-train-steps 20
  vader train wan/t2v_1_3b --reward-fn pick_score --project-dir runs/pick
  vader train my_train.py --cfg-options model.from_pretrained=/data/stdit""",
    "sample": f"""usage: vader sample CONFIG [--adapter A [B …]] [flags]

Generates videos of the config's prompts into its project_dir; with several adapters, into a folder for each, from the
same noise. `base` stands for the model without an adapter.
{CONFIG}
{PROCESSES}

  vader sample vader_demo --adapter base runs/demo/adapter --end-index 4 --project-dir runs/videos
  vader sample wan/t2v_1_3b --prompt "a red fox in the snow" --project-dir runs/fox""",
    "check": f"""usage: vader check CONFIG [flags]

Finds what would stop a run before a model is loaded, and fetches the weights it lacks.
{CONFIG}

  vader check my_train.py""",
}


def train(argv: Sequence[str]) -> int:
    return start("train", argv)


def sample(argv: Sequence[str]) -> int:
    return start("sample", argv)


def check(argv: Sequence[str]) -> int:
    return start("check", argv)


def start(command: str, argv: Sequence[str]) -> int:
    """Run a command; returns its exit code."""
    usage = HELP[command].format(command=command)
    if list(argv) in (["-h"], ["--help"]):
        print(usage)
        return 0
    if not argv:
        return answer(
            2, [f"name a config, such as `vader {command} vader_demo`; see `vader {command} --help`"]
        )
    return exit_code(lambda: run(command, argv))


def run(command: str, argv: Sequence[str]) -> None:
    """Check, or train or sample in as many processes as are wanted; several take the place of this one.

    Raises:
        ConfigError: with every error found.
    """
    end_with_launcher()
    flags = task_flags(command, argv)
    with importing(shown=os.environ.get("LOCAL_RANK", "0") == "0"):
        import torch

        from Core.cli import run as run_config
        from Core.config import load_config

    processes = 1
    if not (is_launched(os.environ) or any(flag.startswith("--check-only") for flag in flags)):
        processes = processes_to_start(os.environ, torch.cuda.device_count())
    config_file, *others = flags
    if command == "check" or processes > 1:  # several processes would each say the same of an error
        run_config(load_config([config_file, "--check-only", str(processes), *others]))
    if command == "check":
        print("nothing stands in the way of this run, and its weights are on this machine")
    elif processes > 1:
        launch(processes, [command, *flags])
    else:
        run_config(load_config(flags))


def task_flags(command: str, argv: Sequence[str]) -> list[str]:
    """``argv`` as flags of the configuration: the command decides what is done, whatever the config says.

    Raises:
        ConfigError: a flag says otherwise.
    """
    if command == "check" or {"-h", "--help"} & set(argv):
        return list(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--is-vader-training", nargs="?", const="True")
    if command == "sample":
        parser.add_argument("--adapter", nargs="+", action="extend")
    own, flags = parser.parse_known_args(argv)
    training = str(command == "train")
    if own.is_vader_training not in (None, training):
        other = "sample" if command == "train" else "train"
        raise ConfigError(
            [f"vader {command} with --is-vader-training {own.is_vader_training}: use `vader {other}`"]
        )
    if getattr(own, "adapter", None):
        flags += ["--lora-ckpt-path", repr(own.adapter)]
    return [*flags, "--is-vader-training", training]
