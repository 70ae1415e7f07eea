"""Open-Sora's given frames: references with mask strategies, and clips that continue the one before.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, H, W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from Core.sampling.euler import DenoisingStep, Step
from Core.sampling.kept_frames import keep_frames
from opensora.datasets.utils import read_from_path
from opensora.utils.inference_utils import (
    append_generated,
    apply_mask_strategy,
    collect_references_batch,
    parse_mask_strategy,
)

from .base import Conditions
from .opensora_prompts import OpenSoraPrompt

PROBE_SIZE = (8, 8)  # references are decoded to count their frames; their content does not matter here


class OpenSoraConditions(Conditions):
    """References of a batch of videos, to which each finished clip adds its end.

    Args:
        image_size: (height, width) in pixels.
        align: positions of given frames are rounded to this many latent frames.
        length: latent frames that a clip takes over from the one before; ``overlap``: the pixel frames they make.
        edit: how far they may change, 0 to 1.
    """

    def __init__(
        self,
        vae: Any,
        prompts: Sequence[OpenSoraPrompt],
        *,
        image_size: tuple[int, int],
        align: int | None,
        length: int,
        overlap: int,
        edit: float,
    ):
        self.vae, self.align, self.length, self.overlap, self.edit = vae, align, length, overlap, edit
        self.references = collect_references_batch([p.reference for p in prompts], vae, image_size)
        self.strategies = [prompt.mask_strategy for prompt in prompts]

    def condition(
        self, step: DenoisingStep, z: Tensor, clip: int, noise_like: Callable[[Tensor], Tensor]
    ) -> Step:
        mask = apply_mask_strategy(z, self.references, self.strategies, clip, self.align)
        return keep_frames(step, mask, noise_like)

    def follow(self, clip: Tensor, number: int) -> None:
        # The VAE codes whole clips and chunks on their own, so the tail is coded as the start of a clip is.
        tail = clip[:, :, -self.overlap :].to(self.vae.dtype)
        self.references, self.strategies = append_generated(
            self.vae, tail, self.references, self.strategies, number, self.length, self.edit
        )

    def join(self, clips: Sequence[Tensor]) -> Tensor:
        return torch.cat([clips[0], *(clip[:, :, self.overlap :] for clip in clips[1:])], dim=2)


def conditioning_errors(
    prompts: Sequence[OpenSoraPrompt],
    *,
    loops: int,
    align: int | None,
    clip_latents: int,
    count_latents: Callable[[int], int],
) -> list[str]:
    """Sentences on what is wrong, each problem once.

    Args:
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


def _segment_errors(prompt: OpenSoraPrompt, loops: int) -> list[str]:
    """A prompt that says what happens in which loop must say it for exactly the loops there are."""
    last = prompt.segments[-1][0]
    if len(prompt.segments) == 1 or last == loops - 1:
        return []
    fault = "is never reached" if last >= loops else f"leaves the loops up to {loops - 1} without a text"
    return [
        f"the prompt {prompt.written!r} ends with the segment of loop {last}, which {fault} with loop={loops}; "
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
    prompt: OpenSoraPrompt, references: Sequence[Tensor], loops: int, align: int | None, clip_latents: int
) -> None:
    """Apply the mask strategy to stubs; raises the ValueError that sampling would end in."""
    strategy = prompt.mask_strategy
    if not strategy:
        raise ValueError(
            f"the prompt {prompt.written!r} has a reference_path but no mask_strategy, so the reference would "
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
