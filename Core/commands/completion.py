"""``vader completion``: a script that has the shell complete commands, configs, flags, rewards and formats.

Shells run it whenever they start, so it is made from the catalogue, and nothing heavy is imported.
"""

from collections.abc import Iterable, Sequence

from Core.commands.catalogue import catalogue
from Core.commands.main import COMMANDS
from Core.commands.startup import Parser
from Core.generation.formats import FORMATS
from Core.utils.exit_codes import exit_code

HELP = """Prints a script that has the shell complete commands, configs, flags, rewards and formats:

  eval "$(vader completion bash)"          # in ~/.bashrc
  eval "$(vader completion zsh)"           # in ~/.zshrc, after compinit
  vader completion fish > ~/.config/fish/completions/vader.fish"""
# A config is the first argument of these; every key of the configuration is a flag of theirs, and of the demo's.
TAKE_CONFIG = ("train", "sample", "check", "evaluate", "estimate")
TAKE_KEYS = (*TAKE_CONFIG, "quickstart")
REWARD_FLAGS = ("--reward-fn", "--rewards", "--reward", "--monitors")
CONFIG_FLAGS = ("--config", "--model")
FORMAT_FLAGS = ("--to", "--format")
SHELLS = ("bash", "zsh", "fish")
# zsh runs it as well, where each word of a list may hold a space.
BASH = """_vader() {{
    local command=${{COMP_WORDS[1]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} word=${{COMP_WORDS[COMP_CWORD]}}
    local keys='{keys}' words= found
    if [ "$COMP_CWORD" -eq 1 ]; then
        words='{commands}'
    else
        case "$command:$before:$word" in
{flags}
            {rewards}) words='{reward_names}' ;;
            {formats}) words='{format_names}' ;;
            {configs}) words='{config_names}' ;;
            help:help:*) words='{commands}' ;;
            completion:completion:*) words='{shells}' ;;
        esac
    fi
    COMPREPLY=()
    while IFS= read -r found; do
        COMPREPLY+=("$found")
    done < <(compgen -W "$words" -- "$word"; [ "$COMP_CWORD" -eq 1 ] || compgen -f -- "$word")
}}
complete -o filenames -F _vader vader
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def main(argv: Sequence[str]) -> int:
    parser = Parser("completion", HELP)
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(argv).shell
    return exit_code(lambda: print(script(shell), end=""))


def script(shell: str) -> str:
    """The script for a shell."""
    if shell == "fish":
        return "".join(f"{line}\n" for line in fish_lines())
    return (ZSH if shell == "zsh" else "") + bash_script()


def flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def bash_script() -> str:
    known = catalogue()
    lines = []
    for command, own in known["flags"].items():
        words = [*own, *(["$keys"] if command in TAKE_KEYS else [])]
        lines.append(f'            {command}:*:-*) words="{" ".join(words)}" ;;')
    return BASH.format(
        commands=" ".join(COMMANDS),
        shells=" ".join(SHELLS),
        keys=" ".join(map(flag, known["keys"])),
        flags="\n".join(lines),
        rewards="|".join(f"*:{name}:*" for name in REWARD_FLAGS),
        reward_names=" ".join(known["rewards"]),
        formats="|".join(f"export:{name}:*" for name in FORMAT_FLAGS),
        format_names=" ".join(FORMATS),
        configs="|".join((*(f"*:{name}:*" for name in CONFIG_FLAGS), *(f"{c}:*" for c in TAKE_CONFIG))),
        config_names=" ".join(known["models"]),
    )


def fish_lines() -> Iterable[str]:
    known = catalogue()
    values = {name: known["rewards"] for name in REWARD_FLAGS}
    values |= {name: known["models"] for name in CONFIG_FLAGS}
    yield "complete -c vader -n __fish_use_subcommand -f"
    for name, command in COMMANDS.items():
        summary = command.summary.replace("'", r"\'")
        yield f"complete -c vader -n __fish_use_subcommand -f -a {name} -d '{summary}'"
    for name, own in known["flags"].items():
        seen = f"complete -c vader -n '__fish_seen_subcommand_from {name}'"
        if name in TAKE_CONFIG:
            yield f"{seen} -a '{' '.join(known['models'])}'"
        keys = dict.fromkeys(map(flag, known["keys"]) if name in TAKE_KEYS else (), True)
        for word, takes_value in (keys | own).items():
            taken = FORMATS if name == "export" and word in FORMAT_FLAGS else values.get(word, ())
            listed = f" -a '{' '.join(taken)}'" if taken else ""
            yield f"{seen} -l {word.removeprefix('--')}{' -r' if takes_value else ''}{listed}"
    yield f"complete -c vader -n '__fish_seen_subcommand_from help' -f -a '{' '.join(COMMANDS)}'"
    yield f"complete -c vader -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'"
