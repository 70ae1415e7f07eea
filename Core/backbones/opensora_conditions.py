"""Whether Open-Sora's references, mask strategies and prompt segments hold together, before anything loads."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from opensora.datasets.utils import read_from_path
from opensora.utils.inference_utils import apply_mask_strategy, parse_mask_strategy

PROBE_SIZE = (8, 8)  # references are decoded to count their frames; their content does not matter here


def conditioning_errors(
    prompts: Sequence,
    *,
    loops: int,
    align: int | None,
    clip_latents: int,
    count_latents: Callable[[int], int],
) -> list[str]:
    """Sentences on what is wrong, each problem once.

    Args:
        prompts: with ``segments``, ``reference`` and ``mask_strategy``.
        loops: clips per video.
        clip_latents: latent frames of a clip.
        count_latents: pixel frames of a reference → its latent frames.
    """
    stubs: dict[str, Tensor] = {}
    errors = []
    for prompt in prompts:
        errors += _segment_errors(prompt, loops)
        if not prompt.reference and not prompt.mask_strategy:
            continue
        try:
            references = list(_reference_stubs(prompt.reference, count_latents, stubs))
            _try_strategy(prompt, references, loops, align, clip_latents)
        except (ValueError, FileNotFoundError) as error:
            errors.append(str(error))
    return list(dict.fromkeys(errors))


def _segment_errors(prompt, loops: int) -> list[str]:
    """A prompt that says what happens in which loop must say it for exactly the loops there are."""
    last = prompt.segments[-1][0]
    if len(prompt.segments) == 1 or last == loops - 1:
        return []
    fault = "is never reached" if last >= loops else f"leaves the loops up to {loops - 1} without a text"
    return [
        f"the prompt {prompt.merged!r} ends with the segment of loop {last}, which {fault} with loop={loops}; "
        f"set loop={last + 1} or change the segments"
    ]


def _reference_stubs(
    paths: str, count_latents: Callable[[int], int], known: dict[str, Tensor]
) -> Iterator[Tensor]:
    """[1, T, 1, 1] for each of the paths joined by ``;``, of the reference's length in latent frames."""
    for path in filter(None, paths.split(";")):
        if path not in known:
            frames = read_from_path(path, PROBE_SIZE).shape[1]
            known[path] = torch.zeros(1, count_latents(frames), 1, 1)
        yield known[path]


def _try_strategy(
    prompt, references: Sequence[Tensor], loops: int, align: int | None, clip_latents: int
) -> None:
    """Apply the mask strategy to stubs; raises the ValueError that sampling would end in."""
    strategy = prompt.mask_strategy
    if not strategy:
        raise ValueError(
            f"the prompt {prompt.merged!r} has a reference_path but no mask_strategy, so the reference would "
            "not be used; set mask_strategy, such as '0' for its first frame"
        )
    late = [group[0] for group in parse_mask_strategy(strategy) if group[0] >= loops]
    if late:
        raise ValueError(
            f"mask_strategy={strategy!r} names loop {late[0]}, but loop={loops} makes loops 0 to {loops - 1}; "
            "raise loop or lower the number"
        )
    for loop in range(loops):
        apply_mask_strategy(torch.zeros(1, 1, clip_latents, 1, 1), [references], [strategy], loop, align)
