"""Compare adapters with the base model, pair by pair: the same prompts and seeds with and without each adapter.

    scripts/evaluate.py CONFIG --adapter A [--adapter B] [--prompts FILE] [--rewards hps,aesthetic] [flags]

Writes videos, videos.csv, prompts.csv, summary.csv and evaluation.json to --out. Other flags are those of
train_t2v_lora.py, such as --num-sample 4 or --seed 7. Run it again to continue where it was interrupted.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The packages of this checkout, wherever the script is started and whether or not they are installed.
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.cli import exit_code, start_log, stop_log  # noqa: E402
from Core.config import Config, ConfigError, load_config  # noqa: E402
from Core.evaluation.compare import compare, read_training_prompts  # noqa: E402
from Core.evaluation.score_videos import check_scorers, refuse  # noqa: E402
from Core.utils.distributed import Distributed  # noqa: E402
from Core.utils.environment import record_environment  # noqa: E402


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """Own flags, and the configuration of inference that the others make.

    Raises:
        ConfigError: with every error found; nothing has been loaded by then.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="mmengine config file, such as the config.py of a run")
    parser.add_argument(
        "--adapter", action="append", required=True, help="adapter to compare; repeat for more"
    )
    parser.add_argument("--prompts", help="file with one prompt a line (default: the config's prompts)")
    parser.add_argument("--rewards", help="names, separated by commas (default: the config's reward)")
    parser.add_argument("--reward-arguments", default="{}", help="JSON: {reward: {argument: value}}")
    parser.add_argument(
        "--training-prompts", help="prompts trained on (default: looked up in the adapters' runs)"
    )
    parser.add_argument(
        "--out", help="folder of the results (default: evaluation in the config's project_dir)"
    )
    own, rest = parser.parse_known_args(argv)
    # A training config is evaluated as it was trained, one clip per video.
    flags = [own.config, *rest, "--is-vader-training", "False", "--lora-ckpt-path", repr(own.adapter)]
    if own.prompts:
        flags += ["--prompt-path", own.prompts, "--prompt", "None"]
    return own, load_config(flags)


def chosen_rewards(own: argparse.Namespace, config: Config) -> dict[str, Mapping[str, Any]]:
    """Rewards by name with their arguments; those of the config hold for the config's own reward."""
    known = config.reward.parts
    names = own.rewards.split(",") if own.rewards else list(known)
    try:
        given = json.loads(own.reward_arguments)
    except json.JSONDecodeError as error:
        raise ConfigError([f"--reward-arguments is no JSON ({error}): {own.reward_arguments!r}"]) from error
    rewards = {name: {**known.get(name, {}), **given.get(name, {})} for name in names}
    refuse(check_scorers(names, rewards | given))
    return rewards


def show(result: Mapping[str, Any]) -> None:
    """The table, on the terminal."""
    widths = "{:<16} {:<16} {:<9} {:>10} {:>10} {:>10}   {:<24} {:>6}"
    print(widths.format("adapter", "measure", "prompts", "before", "after", "gain", "95% interval", "wins"))
    for row in result["summary"]:
        interval = f"{row['low']:+.4g} to {row['high']:+.4g}{' *' if row['significant'] else ''}"
        cells = [f"{row[key]:.4g}" for key in ("before", "after")] + [f"{row['gain']:+.4g}", interval]
        kind = f"{row['prompts']} {row['prompts_are']}"
        print(widths.format(row["adapter"], row["measure"], kind, *cells, f"{row['win_rate']:.0%}"))
    print("* the interval leaves out zero")


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
