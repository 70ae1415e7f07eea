"""The training step without this project's savings, as the baseline for the defaults.

Attention score matrices, the text encoder resident and run at every step, text keys and values computed at every
sampling step, per-frame modulation although every frame is generated, nested checkpointing, PEFT's own layer in the
prefix (and autocast, if any), convolutions that store their input, unfused norms, modulation and rotary embedding,
and tokens in the memory layout that the patch embedding's convolution leaves. Each replaces its counterpart while
the context lasts.

Axes: B batch, N heads, Q queries, K keys, d head dimension, T latent frames.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, Features, TextEncoder, opensora
from Core.modules.frozen_conv import forget_conv_inputs
from Core.sampling import no_grad_steps
from Core.training.trainer import Trainer
from opensora.models.layers import blocks
from opensora.models.layers.embeddings import PatchEmbed3D, RotaryEmbedding, at_least_float32
from opensora.models.stdit import stdit3


def score_matrix_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v with the scores [B, N, Q, K] materialised, in float32 or wider."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def separate_rms_norm(norm: blocks.RMSNorm, x: Tensor) -> Tensor:
    """[..., D] → [..., D]; so do the next three."""
    wide = at_least_float32(x)
    return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + blocks.NORM_EPS)).to(
        x.dtype
    )


def separate_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def separate_gated_sum(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return x + gate * branch


def separate_rotary(rope: RotaryEmbedding, x: Tensor) -> Tensor:
    turns = rope._turns(x.shape[-2], x.device)
    cos, sin = (part.repeat_interleave(2, -1) for part in (turns.real, turns.imag))
    wide = at_least_float32(x)
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return (wide * cos + torch.stack([-odd, even], -1).flatten(-2) * sin).to(x.dtype)


def transposed_tokens(
    embed: Callable[[PatchEmbed3D, Tensor], Tensor],
) -> Callable[[PatchEmbed3D, Tensor], Tensor]:
    """The same tokens [B, Q, D], with Q innermost in memory."""
    return lambda self, x: embed(self, x).transpose(1, 2).contiguous().transpose(1, 2)


def encoded_each_time(
    backbone: Backbone, encoder: TextEncoder, lap: Callable[[str], None]
) -> Callable[[Sequence[EncodedPrompt]], list[Features]]:
    """In place of ``Rollout.features``: runs the encoder, caption by caption, which takes longer than a batch would."""

    def features(prompts: Sequence[EncodedPrompt]) -> list[Features]:
        found = [encoder.encode([backbone.caption(text.prompt.text)])[0] for text in prompts]
        lap("text")
        return found

    return features


def with_mask(velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``velocity`` with a frame mask that marks every frame as generated."""

    def masked(z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        return velocity(z, t, torch.ones(z.shape[0], z.shape[2], dtype=torch.bool, device=z.device))

    return masked


def undoing(trainer: Trainer) -> dict[str, list[tuple[Any, str, Any]]]:
    """For each saving (object, attribute, value) that put the plain way in its place."""
    predictor = trainer.backbone.predictor
    functional = SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": score_matrix_attention})
    # Where nothing is checkpointed there is nothing to checkpoint twice.
    doubled = partial(opensora.guided_velocity, checkpoint_steps=bool(trainer.config.models.grad_checkpoint))
    return {
        "fused attention": [(blocks, "F", functional)],
        "text keys and values computed once": [
            (type(trainer.backbone.denoiser.get_base_model()), "accepts_text_context", False)
        ],
        "no frame mask": [
            (trainer.backbone, "predictor", lambda *args, **kwargs: with_mask(predictor(*args, **kwargs)))
        ],
        "checkpointing once": [(opensora, "guided_velocity", doubled)],
        "fused adapter": [(no_grad_steps, "fused_adapter", lambda model: nullcontext())],
        "no autocast in the prefix": [
            (no_grad_steps, "without_needless_autocast", lambda device, dtype: nullcontext())
        ],
        "norms in one operation": [(blocks.RMSNorm, "forward", separate_rms_norm)],
        "rotary position in three operations": [(RotaryEmbedding, "forward", separate_rotary)],
        "modulation in one operation": [(stdit3, "modulate", separate_modulate)],
        "gates in one operation": [(stdit3, "gated_sum", separate_gated_sum)],
        "tokens in one order": [(PatchEmbed3D, "forward", transposed_tokens(PatchEmbed3D.forward))],
    }


@contextmanager
def kept_conv_inputs(trainer: Trainer) -> Iterator[None]:
    """Context in which the VAE uses PyTorch's own convolutions."""
    for module in trainer.backbone.vae.modules():
        vars(module).pop("forward", None)
    try:
        yield
    finally:
        forget_conv_inputs(trainer.backbone.vae)


@contextmanager
def undone(trainer: Trainer, *names: str) -> Iterator[None]:
    """Context in which ``trainer`` takes steps without the named savings."""
    with ExitStack() as stack:
        for name in names:
            for patch in undoing(trainer)[name]:
                stack.enter_context(mock.patch.object(*patch))
        yield


@contextmanager
def plain_path(trainer: Trainer, encoder: TextEncoder, lap: Callable[[str], None]) -> Iterator[None]:
    """Within this context ``trainer`` takes plain steps."""
    rollout = trainer.objective.rollout
    with (
        undone(trainer, *undoing(trainer)),
        kept_conv_inputs(trainer),
        mock.patch.object(rollout, "features", encoded_each_time(trainer.backbone, encoder, lap)),
    ):
        yield
