"""Classifier-free guidance: two predictions of one model become one.

Axes: B batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .euler import Predict

# (prediction for the captions, prediction for the unconditional branch, timesteps [B]) → guided prediction
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]
# (latent [B, …], timesteps [B], prediction for the captions without guidance, shaped as the latent)
PredictionObserver = Callable[[Tensor, Tensor, Tensor], None]


def linear(scale: float) -> Combine | None:
    """null + scale · (text − null); None at scale 1, which is the captions' own prediction."""
    return None if scale == 1 else lambda text, null, t: null + scale * (text - null)


def rescaled(combine: Combine, amount: float) -> Combine:
    """``combine`` whose spread is drawn to that of the captions' own prediction (Lin et al., 2024).

    Args:
        amount: 0 leaves the guided prediction as it is, 1 gives it the spread of the captions'.
    """

    def spread(x: Tensor) -> Tensor:
        return x.flatten(1).std(1)[(...,) + (None,) * (x.ndim - 1)]

    def rescale(text: Tensor, null: Tensor, t: Tensor) -> Tensor:
        guided = combine(text, null, t)
        return guided * (1 + amount * (spread(text) / spread(guided) - 1))

    return rescale


def guided(
    text: Predict,
    null: Predict,
    both: Predict,
    combine: Combine | None,
    *,
    null_grad: bool = True,
    in_turn: bool = False,
    observe: PredictionObserver | None = None,
) -> Predict:
    """The guided prediction.

    Args:
        text, null: predictions for the captions, and for what guidance leads away from.
        both: of a doubled batch, captions first, which is one pass of the network.
        combine: None leaves the unconditional branch out.
        null_grad: False keeps the unconditional branch out of the graph: it runs by itself, without one.
        in_turn: run the branches one after the other where they keep a graph, so that a backward pass that recomputes
            has a block of one branch at a time in memory.
        observe: sees the captions' own prediction at every step that keeps its graph.
    """

    def branches(z: Tensor, t: Tensor, generated: Tensor | None) -> tuple[Tensor, Tensor]:
        if combine is None:
            v_text = text(z, t, generated)
            return v_text, v_text
        if torch.is_grad_enabled() and (in_turn or not null_grad):
            v_text = text(z, t, generated)
            with torch.set_grad_enabled(null_grad):
                return v_text, null(z, t, generated)
        frames = None if generated is None else generated.repeat(2, 1)
        v_text, v_null = both(torch.cat([z, z]), t.repeat(2), frames).chunk(2)
        return v_text, v_null

    def predict(z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        v_text, v_null = branches(z, t, generated)
        if observe and torch.is_grad_enabled():
            observe(z, t, v_text)
        return v_text if combine is None else combine(v_text, v_null, t)

    return predict
