"""A custom scorer: how well the brightness of a frame fits its prompt.

Use it with `reward_fn = "docs/my_reward.py:Daylight"` and, if you like, `reward_args = dict(bright=0.7)`.
"""

from torch import Tensor

from Core.rewards import ImageReward, RewardInfo


class Daylight(ImageReward):
    """Negative distance between the mean brightness and the prompt's target; loss −score.

    bright, dark: target brightness by day and, if the prompt says "night", by night.
    """

    info = RewardInfo(name="daylight", summary="bright days and dark nights", range="-1 to 0")

    def __init__(self, *, bright: float = 0.6, dark: float = 0.15):
        super().__init__()
        self.bright = bright
        self.dark = dark

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts → [N]."""
        wanted = images.new_tensor([self.dark if "night" in prompt else self.bright for prompt in prompts])
        return -(images.mean(dim=(1, 2, 3)) - wanted).abs()
