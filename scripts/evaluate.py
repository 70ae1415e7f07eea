"""Paired comparison of adapters with the base model: the same prompts and seeds with and without each adapter.

    scripts/evaluate.py CONFIG --adapter A [--adapter B] [--prompts FILE] [--rewards hps,aesthetic] [flags]

Writes videos, videos.csv, prompts.csv, summary.csv and evaluation.json to --out. Other flags are those of
train_t2v_lora.py, such as --num-sample 4 or --seed 7. Run it again to resume an interrupted evaluation.

For VBench's own tool, give its list by --prompts VBench_full_info.json, or --vbench with any other prompts: the videos
then also stand in OUT/vbench/<variant>/ under the names it expects, and the commands to run it are printed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Import this checkout's packages from any working directory, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.build import refuse_machine  # noqa: E402
from Core.cli import exit_code, start_log, stop_log  # noqa: E402
from Core.config import BASE, Config, ConfigError, load_config  # noqa: E402
from Core.evaluation.compare import compare, read_training_prompts  # noqa: E402
from Core.evaluation.report import number, signed  # noqa: E402
from Core.evaluation.score_videos import check_scorers, parse_reward_arguments, refuse  # noqa: E402
from Core.evaluation.vbench_files import (  # noqa: E402
    COPIES,
    name_errors,
    read_vbench_prompts,
    vbench_command,
    write_vbench_folder,
)
from Core.generation.jobs import plan_of  # noqa: E402
from Core.utils.distributed import Distributed  # noqa: E402
from Core.utils.environment import record_environment  # noqa: E402

# VBench's dimensions that have a reward here, and that its tool takes for any prompts.
MONITORS = ("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """This script's flags, and the inference config built from the others.

    Raises:
        ConfigError: listing every error, before anything loads.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="config file, or the folder of a run")
    parser.add_argument(
        "--adapter", action="append", required=True, help="adapter to compare; repeat for more"
    )
    parser.add_argument(
        "--prompts",
        help="file with one prompt per line, or VBench's VBench_full_info.json (default: the config's prompts)",
    )
    parser.add_argument(
        "--dimensions",
        default="",
        help="comma-separated: of VBench's list, only the prompts of these dimensions",
    )
    parser.add_argument("--vbench", action="store_true", help="also lay the videos out for VBench's own tool")
    parser.add_argument("--rewards", help="comma-separated names (default: the config's reward)")
    parser.add_argument("--reward-arguments", default="{}", help="JSON: {reward: {argument: value}}")
    parser.add_argument(
        "--training-prompts", help="training prompts (default: looked up in the adapters' runs)"
    )
    parser.add_argument("--out", help="results folder (default: evaluation in the config's project_dir)")
    own, rest = parser.parse_known_args(argv)
    # A training config is evaluated the way it was trained: one clip per video.
    flags = [own.config, *rest, "--is-vader-training", "False", "--lora-ckpt-path", repr(own.adapter)]
    own.vbench_list = Path(own.prompts).expanduser() if (own.prompts or "").endswith(".json") else None
    own.dimensions = [name for name in own.dimensions.split(",") if name]
    if own.dimensions and not own.vbench_list:
        raise ConfigError(
            ["--dimensions chooses from VBench's list; give it by --prompts VBench_full_info.json"]
        )
    if own.vbench_list:
        flags += ["--prompt", repr(read_vbench_prompts(own.vbench_list, own.dimensions))]
        flags += ["--start-index", "None", "--end-index", "None"]  # lines of the config's prompt file
    elif own.prompts:
        flags += ["--prompt-path", own.prompts, "--prompt", "None"]
    config = load_config(flags)
    own.vbench = own.vbench or own.vbench_list is not None
    if own.vbench:
        refuse(name_errors([prompt.reward_text for prompt in config.prompt_list]))
    return own, config


def chosen_rewards(own: argparse.Namespace, config: Config) -> dict[str, Mapping[str, Any]]:
    """Rewards by name with their arguments; those of the config hold for the config's own reward."""
    known = config.reward.parts
    names = own.rewards.split(",") if own.rewards else list(known)
    given = parse_reward_arguments(own.reward_arguments)
    rewards = {name: {**known.get(name, {}), **given.get(name, {})} for name in names}
    refuse(check_scorers(names, rewards | given))
    return rewards


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    widths = "{:<16} {:<16} {:<9} {:>10} {:>10} {:>10}   {:<24} {:>6}"
    print(widths.format("adapter", "measure", "prompts", "before", "after", "gain", "95% interval", "wins"))
    for row in result["summary"]:
        interval = f"{signed(row['low'])} to {signed(row['high'])}{' *' if row['significant'] else ''}"
        cells = [number(row[key]) for key in ("before", "after")] + [signed(row["gain"]), interval]
        kind = f"{row['prompts']} {row['prompts_are']}"
        print(widths.format(row["adapter"], row["measure"], kind, *cells, f"{row['win_rate']:.0%}"))
    print("* the interval excludes zero")


def lay_out_for_vbench(own: argparse.Namespace, config: Config, names: Sequence[str], folder: Path) -> None:
    """Write a folder of videos for each variant as VBench's tool expects it, and print how to run that."""
    dimensions = own.dimensions or MONITORS
    if config.run.num_sample < COPIES:
        print(f"VBench scores {COPIES} videos of a prompt: set --num-sample {COPIES}")
    print("to score the videos by VBench's own tool (pip install vbench):")
    for name in names:
        target = folder / "vbench" / name
        write_vbench_folder(folder / "videos" / name, plan_of(config), target)
        print(f"  {vbench_command(target, own.vbench_list, dimensions)}")


def evaluate(argv: Sequence[str] | None) -> None:
    own, config = parse(argv)
    rewards = chosen_rewards(own, config)
    training = read_training_prompts(own.training_prompts, config) if own.training_prompts else None
    folder = Path(own.out or f"{config.run.project_dir}/evaluation").expanduser()
    distributed = Distributed()
    refuse_machine(config, distributed)
    start_log(folder, distributed, config.run.verbose)
    try:
        if distributed.is_main:
            record_environment(folder)
        result = compare(config, distributed, own.adapter, rewards, folder, training)
        if distributed.is_main:
            show(result)
            if own.vbench:
                names = [BASE, *(adapter["name"] for adapter in result["adapters"])]
                lay_out_for_vbench(own, config, names, folder)
            print(f"written to {folder}")
    finally:
        stop_log()
    distributed.close()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: evaluate(None)))
