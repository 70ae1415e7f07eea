"""``vader completion``: a script that has the shell complete commands, configs and keys."""

from collections.abc import Iterable, Sequence

from Core.commands.catalogue import catalogue
from Core.commands.main import COMMANDS
from Core.commands.startup import Parser, importing
from Core.utils.exit_codes import exit_code

HELP = """Prints a script that has the shell complete commands, names of configs and keys:

  eval "$(vader completion bash)"          # in ~/.bashrc
  eval "$(vader completion zsh)"           # in ~/.zshrc, after compinit
  vader completion fish > ~/.config/fish/completions/vader.fish"""
TAKE_CONFIG = ("train", "sample", "check", "evaluate")
BASH = """_vader() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words='{commands}'
    else
        case "${{COMP_WORDS[1]}}:$word" in
            {take_config}) words='{flags}' ;;
            *) words='{configs}' ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word") $([ "$COMP_CWORD" -eq 1 ] || compgen -f -- "$word"))
}}
complete -o filenames -F _vader vader
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def main(argv: Sequence[str]) -> int:
    parser = Parser("completion", HELP)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(argv).shell
    return exit_code(lambda: print(script(shell), end=""))


def script(shell: str) -> str:
    """The script for a shell."""
    with importing():
        flags = [f"--{key.replace('_', '-')}" for key in config_keys()]
    configs = catalogue()["models"]
    if shell == "fish":
        return "".join(f"{line}\n" for line in fish_lines(flags, configs))
    bash = BASH.format(
        commands=" ".join(COMMANDS),
        configs=" ".join(configs),
        flags=" ".join(flags),
        take_config="|".join(f"{command}:-*" for command in TAKE_CONFIG),
    )
    return (ZSH if shell == "zsh" else "") + bash


def config_keys() -> list[str]:
    """Keys of the configuration, of every family and objective."""
    from Core.backbones import BACKBONES
    from Core.config.schema import keys_of, sections_of
    from Core.training.objectives import OBJECTIVES

    schemas = [sections_of({"backbone": family}) for family in BACKBONES]
    schemas += [sections_of({"objective": objective}) for objective in OBJECTIVES]
    return list(dict.fromkeys(key for schema in schemas for key in keys_of(schema)))


def fish_lines(flags: Iterable[str], configs: Iterable[str]) -> Iterable[str]:
    for name, command in COMMANDS.items():
        yield f"complete -c vader -n __fish_use_subcommand -f -a {name} -d '{command.summary}'"
    taking = f"'__fish_seen_subcommand_from {' '.join(TAKE_CONFIG)}'"
    yield f"complete -c vader -n {taking} -a '{' '.join(configs)}'"
    for flag in flags:
        yield f"complete -c vader -n {taking} -l {flag.removeprefix('--')} -r"
