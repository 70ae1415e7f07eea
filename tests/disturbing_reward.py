"""A reward of the user's own that can be told, by environment variables, to misbehave."""

import os
import signal

import torch

from Core.rewards import ImageReward, RewardInfo


class Disturbing(ImageReward):
    """Brightness of red, but for some environment variables.

    NAN_PROMPT: a word whose prompts score NaN. SIGNAL: sent to the process of rank SIGNAL_RANK, SIGNAL_COUNT
    times, at the training call with number SIGNAL_AT.
    """

    info = RewardInfo(name="disturbing", summary="brightness of the red channel", range="0 to 1")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def score_images(self, images, prompts):
        self.calls += torch.is_grad_enabled()
        if os.environ.get("SIGNAL") and os.environ.get("RANK", "0") == os.environ.get("SIGNAL_RANK", "0"):
            if torch.is_grad_enabled() and self.calls == int(os.environ["SIGNAL_AT"]):
                for _ in range(int(os.environ.get("SIGNAL_COUNT", 1))):
                    os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        word = os.environ.get("NAN_PROMPT")
        factors = [torch.nan if word and word in prompt else 1.0 for prompt in prompts]
        return images[:, 0].mean(dim=(1, 2)) * torch.tensor(factors)
