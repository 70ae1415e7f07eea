"""The step as it is without this project's savings: what the defaults are compared with.

Score matrices in attention, the text encoder resident and run at every step, text keys and values computed at every
sampling step, modulation by frame though every frame is generated, checkpoints inside checkpoints, PEFT's own layer in
the prefix, convolutions that keep their input. Each is put in place of a public piece for as long as the context lasts.

Axes: B batch, N heads, Q queries, K keys, d head dimension, T latent frames.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from Core import rollout
from Core.backbones import TextEncoder, opensora
from Core.frozen import forget_conv_inputs
from Core.trainer import Trainer
from opensora.models.layers import blocks


def score_matrix_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v with the scores [B, N, Q, K] in memory, in float32 or wider."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


class EncodedEachTime:
    """Stands for the features of every caption, and runs the encoder whenever one is asked for."""

    def __init__(self, encoder: TextEncoder, lap: Callable[[str], None]):
        self.encoder, self.lap = encoder, lap

    def __getitem__(self, caption: str) -> Tensor:
        (features,) = self.encoder.encode([caption])
        self.lap("text")
        return features


def with_mask(velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``velocity`` told of each frame that it is generated."""

    def masked(z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        return velocity(z, t, torch.ones(z.shape[0], z.shape[2], dtype=torch.bool, device=z.device))

    return masked


@contextmanager
def plain_path(trainer: Trainer, encoder: TextEncoder, lap: Callable[[str], None]) -> Iterator[None]:
    """Within this context ``trainer`` takes plain steps."""
    make = trainer.backbone.velocity
    functional = SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": score_matrix_attention})
    network = type(trainer.backbone.denoiser.get_base_model())
    doubled = partial(opensora.guided_velocity, checkpoint_steps=True)
    convolutions = [module for module in trainer.backbone.vae.modules() if "forward" in vars(module)]
    with ExitStack() as stack:
        for target, name, value in (
            (blocks, "F", functional),
            (network, "accepts_text_context", False),
            (opensora, "guided_velocity", doubled),
            (rollout, "fused_adapter", lambda model: nullcontext()),
            (trainer.backbone, "velocity", lambda *args, **kwargs: with_mask(make(*args, **kwargs))),
            (trainer.rollout, "text", EncodedEachTime(encoder, lap)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        for module in convolutions:
            del module.forward
        stack.callback(forget_conv_inputs, trainer.backbone.vae)
        yield
