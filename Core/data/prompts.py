"""The only prompt pipeline: config keys → prompts with their segments, references and mask strategies."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from opensora.utils.inference_utils import extract_json_from_prompts, load_prompts, merge_prompt, split_prompt

# What `append_score_to_prompts` adds for the denoiser; a reward must not read it.
SCORE_SUFFIX = re.compile(r"\s*(aesthetic score|motion score|camera motion):[^.]*(\.\d+)?\.", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """One prompt as the user wrote it.

    segments: (first loop it holds for, text); a plain prompt has one, from loop 0.
    reference: paths to condition on, separated by ``;``; empty for none.
    mask_strategy: which of their frames go where; empty for none.
    """

    segments: tuple[tuple[int, str], ...]
    reference: str = ""
    mask_strategy: str = ""

    def text(self, loop: int = 0) -> str:
        """The text that holds in a loop."""
        held = [text for start, text in self.segments if start <= loop]
        return held[-1] if held else self.segments[0][1]

    @property
    def merged(self) -> str:
        """All segments in the notation they were written in."""
        starts, texts = zip(*self.segments, strict=True)
        return merge_prompt(texts, starts if len(texts) > 1 else None)

    @property
    def reward_text(self) -> str:
        """What a reward model reads: the first segment without score suffixes."""
        return SCORE_SUFFIX.sub("", self.text()).strip()


def parse_prompts(
    texts: Sequence[str],
    references: Sequence[str] | None = None,
    strategies: Sequence[str] | None = None,
) -> list[Prompt]:
    """Prompts from raw lines: JSON suffixes and ``|0|…|1|…`` segments taken apart.

    Raises:
        ValueError: a malformed suffix or segment, or lists of unequal length.
    """
    columns = [list(column or [""] * len(texts)) for column in (references, strategies)]
    for name, column in zip(("reference_path", "mask_strategy"), columns, strict=True):
        if len(column) != len(texts):
            raise ValueError(
                f"{name} needs one entry per prompt: {len(texts)} prompts, {len(column)} entries"
            )
    prompts, references, strategies = extract_json_from_prompts(list(texts), *columns)
    parsed = []
    for text, reference, strategy in zip(prompts, references, strategies, strict=True):
        segments, starts = split_prompt(text)
        parsed.append(Prompt(tuple(zip(starts or [0], segments, strict=True)), reference, strategy))
    return parsed


def read_lines(path: str) -> list[str]:
    """Prompts of a file, without the blank lines that upstream's reader keeps."""
    return [text for text in load_prompts(path) if text]


def check_prompt_file(key: str, path: str) -> list[str]:
    """What is wrong with a prompt file, as sentences that name the config key."""
    try:
        return [] if read_lines(path) else [f"{key}: {path!r} holds no prompts; write one a line"]
    except (OSError, ValueError) as error:
        return [f"{key}: {error}"]


def read_prompts(config) -> list[Prompt]:
    """The run's prompts: ``prompt``, or those of ``prompt_path`` from ``start_index`` to before ``end_index``.

    ``reference_path`` and ``mask_strategy`` have an entry for each of these, as upstream has it.
    """
    texts = config.prompt
    if texts is None:
        lines = read_lines(config.prompt_path)
        texts = lines[config.start_index : config.end_index]
        if not texts:
            raise ValueError(
                f"no prompts between start_index ({config.start_index}) and end_index ({config.end_index}) of "
                f"{len(lines)}; change them"
            )
    return parse_prompts(texts, config.reference_path, config.mask_strategy)


def read_validation_prompts(config, training: Sequence[Prompt]) -> list[Prompt]:
    """``num_val_runs`` × ``val_batch_size`` prompts, from the validation file or the first training prompts."""
    count = config.val_batch_size * (1 if config.debug else config.num_val_runs)
    if config.val_prompt_path is None:
        return list(training[:count])
    return parse_prompts(read_lines(config.val_prompt_path)[:count])
