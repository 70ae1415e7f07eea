"""``vader init``: a commented config for a model, a reward and a GPU, from flags or from questions."""

import json
import sys
from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path

from Core.commands.catalogue import catalogue
from Core.commands.startup import Parser
from Core.utils.errors import ConfigError
from Core.utils.exit_codes import exit_code
from Core.utils.files import write_whole
from Core.utils.registry import did_you_mean

HELP = """Writes a config to train with, commented: a model, a reward, and settings that suit the GPU's memory. What
is not given as a flag is asked for.

  vader init my_train.py --model wan/t2v_1_3b --reward hps --memory 24"""
# From so many GB on: settings, each with its reason. docs/training.md has the recipes, which were not measured.
RECIPES: dict[int, dict[str, tuple[object, str]]] = {
    0: {
        "dtype": ("fp8", "stores the frozen denoiser in 8 bits, computes in bf16"),
        "guidance_grad": ("cond", "no gradient through the guidance's second prediction"),
        "use_AdamW8bit": (True, "the optimiser's state in 8 bits"),
        "train_batch_size": (1, "videos of a forward pass"),
        "gradient_accumulation_steps": (8, "forward passes of a step: 8 videos on one GPU"),
        "backprop_steps": (1, "sampling steps that the gradient goes through"),
        "decode_frame": (-1, "one latent frame, drawn anew each time, is decoded and scored"),
        "grad_checkpoint": (True, "recomputes activations in the backward pass"),
    },
    40: {
        "dtype": ("bf16", "of the frozen denoiser"),
        "train_batch_size": (1, "videos of a forward pass"),
        "gradient_accumulation_steps": (8, "forward passes of a step: 8 videos on one GPU"),
        "backprop_steps": (1, "sampling steps that the gradient goes through"),
        "decode_frame": (-1, "one latent frame, drawn anew each time, is decoded and scored"),
        "grad_checkpoint": (True, "recomputes activations in the backward pass"),
    },
    80: {
        "dtype": ("bf16", "of the frozen denoiser"),
        "train_batch_size": (2, "videos of a forward pass"),
        "gradient_accumulation_steps": (4, "forward passes of a step: 8 videos on one GPU"),
        "backprop_steps": (3, "sampling steps that the gradient goes through"),
        "decode_frame": ("fml", "the first, middle and last latent frame are decoded and scored"),
        "grad_checkpoint": (True, "recomputes activations in the backward pass"),
    },
}
# Of a reward of motion; the recipes' decode_frame gives it too few.
ALL_FRAMES = ("all", "every latent frame is decoded, since the reward needs several")
CONFIG = '''"""{model} for {reward} on {memory} GB: `vader check {file}`, then `vader train {file}`."""

_base_ = "{model}"  # a config that ships; `vader models` lists them

# What is optimised, see `vader rewards`. Several: {{"hps": 1.0, "aesthetic": 0.1}}; your own: "my_reward.py:MyReward".
reward_fn = {reward_fn}

# One prompt per line. Those of the base config are about animals.
{prompts}

# Memory: settings for {memory} GB.
{recipe}

# The run's folder. The same command continues an interrupted run.
project_dir = {project}

# The base config has values of its own for these, and docs/options.md has all other keys:
# max_train_steps, lr, lora_rank, validation_steps, checkpointing_steps, resolution, num_frames
'''


def main(argv: Sequence[str]) -> int:
    parser = Parser("init", HELP)
    parser.add_argument(
        "file", nargs="?", default="my_train.py", help="config to write (default: my_train.py)"
    )
    parser.add_argument("--model", help="a config of `vader models`")
    parser.add_argument("--reward", help="a reward of `vader rewards`, or your own, FILE.py:CLASS")
    parser.add_argument("--memory", type=int, metavar="GB", help="memory of one GPU")
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts, one per line (default: the base config's)"
    )
    flags = parser.parse_args(argv)
    return exit_code(lambda: write(flags))


def write(flags: Namespace) -> None:
    """Write the config, after asking for what is missing.

    Raises:
        ConfigError: a file is there already, or a choice does not exist.
    """
    file = Path(flags.file)
    if file.exists():
        raise ConfigError([f"{str(file)!r} exists already; remove it, or give another name"])
    models = [name for name, model in catalogue()["models"].items() if model["for_init"]]
    rewards = [name for name, reward in catalogue()["rewards"].items() if not reward["required"]]
    model = flags.model or ask("model", "vader models", "vader_train")
    reward = flags.reward or ask("reward", "vader rewards", "hps")
    memory = flags.memory or whole_number(ask("memory", "GB of one GPU", "24"))
    refuse([*choice_errors("model", model, models), *reward_errors(reward, rewards)])
    write_whole(file, config_text(file, model, reward, memory, flags.prompts))
    print(f"wrote {file}: `vader check {file}` looks for what would stop it, `vader train {file}` starts it")


def ask(name: str, hint: str, default: str) -> str:
    """The answer to a question; an empty one takes the default.

    Raises:
        ConfigError: nobody is there to answer.
    """
    if not sys.stdin.isatty():
        raise ConfigError([f"--{name} is missing ({hint}), such as --{name} {default}"])
    return input(f"{name} ({hint}) [{default}]: ").strip() or default


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError([f"memory must be a number of GB, got {text!r}"])
    return int(text)


def choice_errors(name: str, given: str, known: Collection[str]) -> list[str]:
    """One sentence where there is no such choice."""
    if given in known:
        return []
    meant = did_you_mean(given, known) or f"choose one of {', '.join(known)}"
    return [f"there is no {name} {given!r}: {meant}"]


def reward_errors(given: str, known: Collection[str]) -> list[str]:
    if ".py:" in given:
        return []
    if given in catalogue()["rewards"] and given not in known:
        needs = ", ".join(catalogue()["rewards"][given]["required"])
        return [
            f"reward {given!r} needs {needs} in reward_args: docs/rewards.md says how to write such a config"
        ]
    return choice_errors("reward", given, known)


def refuse(errors: list[str]) -> None:
    if errors:
        raise ConfigError(errors)


def config_text(file: Path, model: str, reward: str, memory: int, prompts: str | None) -> str:
    """The config file: Python, every setting with its reason."""
    recipe = dict(RECIPES[max(least for least in RECIPES if least <= memory)])
    if catalogue()["rewards"].get(reward, {}).get("several_frames"):
        recipe["decode_frame"] = ALL_FRAMES
    return CONFIG.format(
        file=file,
        model=model,
        reward=reward,
        reward_fn=literal(reward),
        memory=memory,
        prompts=f"prompt_path = {literal(prompts)}" if prompts else '# prompt_path = "prompts.txt"',
        recipe="\n".join(f"{key} = {literal(value)}  # {reason}" for key, (value, reason) in recipe.items()),
        project=literal(f"runs/{file.stem}"),
    )


def literal(value: object) -> str:
    """As a config has it: texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
