"""Scorers whose score is the probability of a class, trained in log-odds."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from Core.rewards.base import Reward


def log_odds(logits: Tensor, index: Tensor) -> Tensor:
    """log(p / (1 − p)) [...] of one class each: ``logits`` [..., K ≥ 2], ``index`` [...]; in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = index[..., None]
    others = logits.scatter(-1, index, -math.inf).logsumexp(dim=-1)
    return logits.gather(-1, index).squeeze(-1) - others


class ClassProbability(Reward):
    """``score_images`` or ``score_clips`` return log-odds; the score is the probability p, in [0, 1].

    loss −log p, or −log(1 − p) where lower is better. It never takes the logarithm of a rounded probability:
    one that has reached 0 or 1 would have no gradient.
    """

    def as_score(self, raw: Tensor) -> Tensor:
        return raw.sigmoid()

    def loss(self, raw: Tensor) -> Tensor:
        return F.softplus(-raw if self.higher_is_better else raw)
