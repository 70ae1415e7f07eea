"""``vader init``: a commented config for a model, a reward and a GPU, from flags or from questions."""

import json
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from Core.commands.catalogue import catalogue
from Core.commands.startup import Parser, importing
from Core.utils.errors import ConfigError
from Core.utils.exit_codes import exit_code
from Core.utils.files import write_whole
from Core.utils.registry import did_you_mean

HELP = """Writes a config to train with, commented: a model, a reward, and what it takes to fit the GPU's memory, which
is predicted in up to a few minutes (`vader estimate`). What is not given as a flag is asked for.

  vader init my_train.py --model wan/t2v_1_3b --reward hps --memory 24"""
# For a reward of motion; the configs' decode_frame gives it too few.
ALL_FRAMES = 'decode_frame = "all"  # every latent frame is decoded, since the reward needs several\n'
CONFIG = '''"""{model} for {reward} on {memory} GB: `vader check {file}`, then `vader train {file}`."""

_base_ = "{model}"  # a config that ships; `vader models` lists them

# What is optimised, see `vader rewards`. Several: {{"hps": 1.0, "aesthetic": 0.1}}; your own: "my_reward.py:MyReward".
reward_fn = {reward_fn}
{frames}
# One prompt per line. Those of the base config are about animals.
{prompts}

# {predicted}
{settings}
# The run's folder. The same command continues an interrupted run.
project_dir = {project}

# The base config has values of its own for these, and docs/options.md has all other keys:
# max_train_steps, lr, lora_rank, train_batch_size, gradient_accumulation_steps, backprop_steps, decode_frame,
# validation_steps, checkpointing_steps, resolution, num_frames
'''


def main(argv: Sequence[str]) -> int:
    parser = Parser("init", HELP)
    parser.add_argument(
        "file", nargs="?", default="my_train.py", help="config to write (default: my_train.py)"
    )
    parser.add_argument("--model", help="a config of `vader models`")
    parser.add_argument("--reward", help="a reward of `vader rewards`, or your own, FILE.py:CLASS")
    parser.add_argument("--memory", metavar="GB", help="memory of one GPU")
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts, one per line (default: the base config's)"
    )
    flags = parser.parse_args(argv)
    return exit_code(lambda: write(flags))


def write(flags: Namespace) -> None:
    """Write the config, after asking for what is missing.

    Raises:
        ConfigError: the name or the prompts' file will not do, a choice does not exist, or one is missing and nobody is
            there to answer.
        OSError: the file cannot be written.
    """
    file = Path(flags.file)
    given = {name: getattr(flags, name) for name in QUESTIONS}
    errors = file_errors(file, flags.prompts)
    errors += [
        error for name, text in given.items() if text is not None for error in QUESTIONS[name].errors(text)
    ]
    refuse(errors)
    chosen = {name: ask(name) if text is None else text for name, text in given.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    # It is there before the prediction, which can be cut short.
    write_whole(
        file, config_text(file, chosen, flags.prompts, "How much memory it needs was not predicted.", {})
    )
    predicted, settings = fitting(file, int(chosen["memory"]))
    write_whole(file, config_text(file, chosen, flags.prompts, predicted, settings))
    print("".join(f"{setting_line(*one)}\n" for one in settings.items()) + predicted)
    print(f"wrote {file}: `vader check {file}` looks for what would stop it, `vader train {file}` starts it")


def file_errors(file: Path, prompts: str | None) -> list[str]:
    """What is wrong with the paths that were given."""
    errors = []
    if file.suffix != ".py":
        errors.append(f"the config is written in Python: give a name that ends in .py, not {str(file)!r}")
    if file.exists():
        errors.append(f"{str(file)!r} exists already; remove it, or give another name")
    if prompts and not Path(prompts).expanduser().is_file():
        errors.append(f"there is no file {prompts!r} for --prompts")
    return errors


def ask(name: str) -> str:
    """The answer to a question, which is repeated until it can be used; an empty answer takes the default.

    Raises:
        ConfigError: nobody is there to answer.
    """
    question = QUESTIONS[name]
    missing = ConfigError([f"--{name} is missing ({question.hint}), such as --{name} {question.default}"])
    if not sys.stdin.isatty():
        raise missing
    while True:
        try:
            answer = input(f"{name} ({question.hint}) [{question.default}]: ").strip() or question.default
        except EOFError:
            raise missing from None
        errors = question.errors(answer)
        if not errors:
            return answer
        print("\n".join(errors))


def model_errors(given: str) -> list[str]:
    models = [name for name, model in catalogue()["models"].items() if model["for_init"]]
    return choice_errors("model", given, models)


def card_errors(given: str) -> list[str]:
    if given.isdecimal() and int(given) > 0:
        return []
    return [f"memory must be a whole number of GB above 0, got {given!r}"]


def choice_errors(name: str, given: str, known: Collection[str]) -> list[str]:
    """One sentence where there is no such choice."""
    if given in known:
        return []
    meant = did_you_mean(given, known) or f"choose one of {', '.join(known)}"
    return [f"there is no {name} {given!r}: {meant}"]


def reward_errors(given: str) -> list[str]:
    file, own, name = given.rpartition(".py:")
    if name and own:
        file += ".py"
        return [] if Path(file).expanduser().is_file() else [f"there is no file {file!r} for --reward"]
    if given.endswith((".py", ".py:")):
        return [f"the reward {given!r} lacks its class: write {given.removesuffix(':')}:CLASS"]
    rewards = catalogue()["rewards"]
    if given in rewards and (needs := rewards[given]["required"]):
        return [
            f"reward {given!r} needs {', '.join(needs)} in reward_args; write these lines yourself, as the page on "
            "rewards shows"
        ]
    return choice_errors(
        "reward", given, [name for name, reward in rewards.items() if not reward["required"]]
    )


def refuse(errors: list[str]) -> None:
    if errors:
        raise ConfigError(errors)


class Question(NamedTuple):
    """What one is asked: where to find the answers, the one to an empty line, and what is wrong with an answer."""

    hint: str
    default: str
    errors: Callable[[str], list[str]]


QUESTIONS = {
    "model": Question("vader models", "vader_train", model_errors),
    "reward": Question("vader rewards", "hps", reward_errors),
    "memory": Question("GB of one GPU", "24", card_errors),
}


def fitting(file: Path, memory: int) -> tuple[str, dict[str, Any]]:
    """What is predicted of the config on a GPU of so many GB, and the settings that it takes to fit.

    Where nothing makes it fit, the settings are those with which it needs least.
    """
    with importing():
        from Core.config import load_config
        from Core.estimate.advice import best_for
        from Core.estimate.command import GIB, progress
    room = memory * 10**9  # cards of a nominal size have at least so many bytes
    try:
        best = best_for(load_config([str(file)]), room, progress())
    except ValueError as error:
        return f"How much memory it needs is not known: {error}", {}
    needed = f"{best.needed / GIB:.1f} GiB"
    if best.needed <= room:
        return f"Predicted to need {needed} of {memory} GB, which are {room / GIB:.1f} GiB.", best.changes
    return (
        f"Does not fit {memory} GB, which are {room / GIB:.1f} GiB: predicted to need {needed}, most of it in "
        f"{best.run.fullest}. Use a smaller resolution, fewer num_frames, or shard_frozen on several GPUs.",
        best.changes,
    )


def setting_line(key: str, value: Any) -> str:
    from Core.estimate.memory_savers import EFFECTS

    return f"{key} = {literal(value)}  # {EFFECTS.get((key, value), 'needed beside the others')}"


def config_text(
    file: Path, chosen: Mapping[str, str], prompts: str | None, predicted: str, settings: Mapping[str, Any]
) -> str:
    """The config file: Python, every setting with its reason."""
    reward = chosen["reward"]
    several = catalogue()["rewards"].get(reward, {}).get("several_frames")
    return CONFIG.format(
        **chosen,
        file=file,
        reward_fn=literal(reward),
        frames=ALL_FRAMES if several else "",
        prompts=f"prompt_path = {literal(prompts)}" if prompts else '# prompt_path = "prompts.txt"',
        predicted="\n# ".join(textwrap.wrap(predicted, 118)),
        settings="".join(f"{setting_line(*one)}\n" for one in settings.items()),
        project=literal(f"runs/{file.stem}"),
    )


def literal(value: object) -> str:
    """As a config has it: texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
