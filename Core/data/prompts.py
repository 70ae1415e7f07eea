"""Prompts of a run: configuration keys and files in, ``Prompt`` objects out. What a line means, its family says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from Core.backbones.base import Prompt
from Core.utils.options import TEXT_LIMIT, free_option, option

# Lines of prompts → prompts; a model family's own grammar.
Parse = Callable[[Sequence[str]], Sequence[Prompt]]


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Which prompts a run uses."""

    prompt: list[str] | None = option(None, "list of prompts; replaces prompt_path")
    prompt_path: str | None = option(None, "file with one prompt per line", path=True)
    start_index: int | None = option(None, "first line of prompt_path to use", minimum=0)
    end_index: int | None = option(None, "line of prompt_path to stop before", minimum=0)
    val_prompt_path: str | None = free_option(
        None, "validation prompts; None uses the first training prompts", path=True
    )


def read_lines(path: str | Path) -> list[str]:
    """Prompts of a UTF-8 file, one per line, without blank lines.

    Raises:
        FileNotFoundError, ValueError: no such file, not UTF-8, or no prompts in it.
    """
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(
            f"prompt file {str(path)!r} does not exist; set prompt_path to a file of one prompt a line"
        )
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"prompt file {str(path)!r} is not UTF-8 text; save it as UTF-8") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"prompt file {str(path)!r} holds no prompts; write one a line")
    if (longest := max(map(len, lines))) > TEXT_LIMIT:
        raise ValueError(
            f"prompt file {str(path)!r} has a line of {longest} characters; use at most {TEXT_LIMIT} for a prompt"
        )
    return lines


def prompt_file_errors(settings: PromptSettings, training: bool) -> list[str]:
    """What is wrong with the prompt keys and the files they name; validation prompts are for training alone."""
    if settings.prompt is None and settings.prompt_path is None:
        return ["no prompts: set prompt_path to a file with one prompt a line, or prompt to a list"]
    errors = []
    paths = {} if settings.prompt is not None else {"prompt_path": settings.prompt_path}
    paths["val_prompt_path"] = settings.val_prompt_path if training else None
    for key, path in paths.items():
        try:
            if path is not None:
                read_lines(path)
        except (OSError, ValueError) as error:
            errors.append(f"{key}: {error}")
    if settings.prompt is not None:
        errors += [
            f"{key} counts lines of prompt_path, which prompt replaces; remove {key} or prompt"
            for key in ("start_index", "end_index")
            if getattr(settings, key) is not None
        ]
    start, end = settings.start_index or 0, settings.end_index
    if end is not None and end <= start:
        errors.append(f"end_index ({end}) must be above start_index ({start})")
    return errors


def read_prompts(settings: PromptSettings, parse: Parse) -> list[Prompt]:
    """The run's prompts: ``prompt``, or those of ``prompt_path`` from ``start_index`` to before ``end_index``.

    Raises:
        FileNotFoundError, ValueError: no file, no prompts in the range, or a line that ``parse`` refuses.
    """
    if settings.prompt is not None:
        return list(parse(settings.prompt))
    lines = read_lines(str(settings.prompt_path))
    chosen = lines[settings.start_index : settings.end_index]
    if not chosen:
        raise ValueError(
            f"no prompts between start_index ({settings.start_index}) and end_index ({settings.end_index}) of "
            f"{len(lines)}; change them"
        )
    return list(parse(chosen))


def read_validation_prompts(
    settings: PromptSettings, parse: Parse, training: Sequence[Prompt], count: int
) -> list[Prompt]:
    """The first ``count`` prompts of the validation file, or of the training prompts."""
    if settings.val_prompt_path is None:
        return list(training[:count])
    return list(parse(read_lines(settings.val_prompt_path)[:count]))
