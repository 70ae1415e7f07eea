"""Paired comparison of adapters with the base model: the same prompts and seeds with and without each adapter.

    scripts/evaluate.py CONFIG --adapter A [--adapter B] [--prompts FILE] [--rewards hps,aesthetic] [flags]

Writes videos, videos.csv, prompts.csv, summary.csv and evaluation.json to --out. Other flags are those of
train_t2v_lora.py, such as --num-sample 4 or --seed 7. Run it again to resume an interrupted evaluation.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Import this checkout's packages from any working directory, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.cli import exit_code, start_log, stop_log  # noqa: E402
from Core.config import Config, load_config  # noqa: E402
from Core.evaluation.compare import compare, read_training_prompts  # noqa: E402
from Core.evaluation.score_videos import check_scorers, parse_reward_arguments, refuse  # noqa: E402
from Core.utils.distributed import Distributed  # noqa: E402
from Core.utils.environment import record_environment  # noqa: E402


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
    parser.add_argument("--prompts", help="file with one prompt per line (default: the config's prompts)")
    parser.add_argument("--rewards", help="comma-separated names (default: the config's reward)")
    parser.add_argument("--reward-arguments", default="{}", help="JSON: {reward: {argument: value}}")
    parser.add_argument(
        "--training-prompts", help="training prompts (default: looked up in the adapters' runs)"
    )
    parser.add_argument("--out", help="results folder (default: evaluation in the config's project_dir)")
    own, rest = parser.parse_known_args(argv)
    # A training config is evaluated the way it was trained: one clip per video.
    flags = [own.config, *rest, "--is-vader-training", "False", "--lora-ckpt-path", repr(own.adapter)]
    if own.prompts:
        flags += ["--prompt-path", own.prompts, "--prompt", "None"]
    return own, load_config(flags)


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
        interval = f"{row['low']:+.4g} to {row['high']:+.4g}{' *' if row['significant'] else ''}"
        cells = [f"{row[key]:.4g}" for key in ("before", "after")] + [f"{row['gain']:+.4g}", interval]
        kind = f"{row['prompts']} {row['prompts_are']}"
        print(widths.format(row["adapter"], row["measure"], kind, *cells, f"{row['win_rate']:.0%}"))
    print("* the interval excludes zero")


def evaluate(argv: Sequence[str] | None) -> None:
    own, config = parse(argv)
    rewards = chosen_rewards(own, config)
    training = read_training_prompts(own.training_prompts, config) if own.training_prompts else None
    folder = Path(own.out or f"{config.run.project_dir}/evaluation").expanduser()
    distributed = Distributed()
    start_log(folder, distributed, config.run.verbose)
    try:
        if distributed.is_main:
            record_environment(folder)
        result = compare(config, distributed, own.adapter, rewards, folder, training)
        if distributed.is_main:
            show(result)
            print(f"written to {folder}")
    finally:
        stop_log()
    distributed.close()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: evaluate(None)))
