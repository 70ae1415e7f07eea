"""``vader evaluate``: adapters and their base model on the same prompts and seeds."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from Core.commands.startup import Parser, importing
from Core.utils.errors import ConfigError
from Core.utils.exit_codes import exit_code

if TYPE_CHECKING:
    from Core.config import Config

HELP = """Compares adapters with the base model, on the same prompts and seeds with and without each adapter: writes
videos, videos.csv, prompts.csv, summary.csv and evaluation.json to --out, and prints the gains. Run it again to resume
an interrupted evaluation. Every key of the config is a flag too, such as --num-sample 4 or --seed 7.

  vader evaluate runs/demo --adapter runs/demo/adapter
  vader evaluate CONFIG --adapter A B --prompts FILE --rewards hps,aesthetic

For VBench's own tool, give its list as --prompts VBench_full_info.json, or add --vbench to any other prompts: the
videos are then also placed in OUT/vbench/<variant>/ under the names it expects, and the commands that run it are
printed."""
# VBench's dimensions that have a reward here, and that its tool takes for any prompts.
MONITORS = ("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree")


def main(argv: Sequence[str]) -> int:
    return exit_code(lambda: evaluate(argv))


def parser() -> Parser:
    """The flags that are not keys of the configuration."""
    parser = Parser("evaluate", HELP, "CONFIG --adapter A [B …] [flags]")
    parser.add_argument("config", help="config file, folder of a run, or name of a config that ships")
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        required=True,
        metavar="A",
        help="adapters to compare; the flag may be repeated",
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
    return parser


def parse(argv: Sequence[str]) -> tuple[Namespace, "Config"]:
    """The flags of this command, and the inference config built from the others.

    Raises:
        ConfigError: listing every error, before anything loads.
    """
    own, rest = parser().parse_known_args(argv)
    with importing():
        from Core.config import load_config
        from Core.evaluation.score_videos import refuse
        from Core.evaluation.vbench_files import name_errors, read_vbench_prompts

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


def chosen_rewards(own: Namespace, config: "Config") -> dict[str, Mapping[str, Any]]:
    """Rewards by name with their arguments; those of the config hold for the config's own reward."""
    from Core.evaluation.score_videos import check_scorers, parse_reward_arguments, refuse

    known = config.reward.parts
    names = own.rewards.split(",") if own.rewards else list(known)
    given = parse_reward_arguments(own.reward_arguments)
    rewards: dict[str, Mapping[str, Any]] = {
        name: {**known.get(name, {}), **given.get(name, {})} for name in names
    }
    refuse(check_scorers(names, rewards | given))
    return rewards


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    from Core.evaluation.report import number, signed

    widths = "{:<16} {:<16} {:<9} {:>10} {:>10} {:>10}   {:<24} {:>6}"
    print(widths.format("adapter", "measure", "prompts", "before", "after", "gain", "95% interval", "wins"))
    for row in result["summary"]:
        interval = f"{signed(row['low'])} to {signed(row['high'])}{' *' if row['significant'] else ''}"
        cells = [number(row[key]) for key in ("before", "after")] + [signed(row["gain"]), interval]
        kind = f"{row['prompts']} {row['prompts_are']}"
        print(widths.format(row["adapter"], row["measure"], kind, *cells, f"{row['win_rate']:.0%}"))
    print("* the interval excludes zero")


def lay_out_for_vbench(own: Namespace, config: "Config", names: Sequence[str], folder: Path) -> None:
    """Write a folder of videos for each variant as VBench's tool expects it, and print how to run that."""
    from Core.evaluation.vbench_files import COPIES, vbench_command, write_vbench_folder
    from Core.generation.jobs import plan_of

    dimensions = own.dimensions or MONITORS
    if config.run.num_sample < COPIES:
        print(f"VBench scores {COPIES} videos of a prompt: set --num-sample {COPIES}")
    print("to score the videos by VBench's own tool (pip install vbench):")
    for name in names:
        target = folder / "vbench" / name
        write_vbench_folder(folder / "videos" / name, plan_of(config), target)
        print(f"  {vbench_command(target, own.vbench_list, dimensions)}")


def evaluate(argv: Sequence[str]) -> None:
    own, config = parse(argv)
    from Core.build import refuse_machine
    from Core.cli import start_log, stop_log
    from Core.config import BASE
    from Core.evaluation.compare import compare, read_training_prompts
    from Core.utils.distributed import Distributed
    from Core.utils.environment import record_environment

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
