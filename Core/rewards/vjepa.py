"""Predictability of a clip in the feature space of V-JEPA 2 (Assran et al. 2025, arXiv:2506.09985).

The network sees a part of space-time and predicts the features of the rest. Natural motion is predictable;
jumps, melting objects and flicker are not (Garrido et al. 2025, arXiv:2502.11831, use the same error as
"surprise").

Axes: B clips, T tubelets (pairs of frames), S patches of one tubelet, N = T·S tokens, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from Core.rewards.base import RewardInfo, VideoReward
from Core.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, ImageTransform, transform_from_folder
from Core.utils.hub import Weight, locate
from Core.utils.state_dict import load_strictly

VJEPA2 = Weight(
    source="facebook/vjepa2-vitl-fpc64-256", parts=("processor",), size=1_304_000_000, licence="MIT"
)


def hidden_tokens(tubelets: int, side: int) -> dict[str, Tensor]:
    """What each task hides, as a bool mask [N] over tokens in (tubelet, row, column) order.

    ``future``: the second half of the clip. ``tube``: the central quarter of the picture, all the time.
    """
    frames = torch.arange(tubelets) >= (tubelets + 1) // 2
    inner = (torch.arange(side) >= side // 4) & (torch.arange(side) < side // 4 + (side + 1) // 2)
    tube = inner[:, None] & inner
    return {
        "future": frames[:, None].expand(tubelets, side * side).flatten(),
        "tube": tube.flatten().expand(tubelets, -1).flatten(),
    }


class VJepa(VideoReward):
    """Minus the mean absolute error of the predicted features, V-JEPA 2's training loss; loss −score.

    The error is averaged over two tasks: the future from the past, the centre of the picture from its
    surround. V-JEPA 2's pretraining masks hide all time steps of a region, as the second task does; the first is
    outside it and follows the "surprise" of Garrido et al. 2025 (arXiv:2502.11831), measured on such models. A
    still clip is easy to predict, so mix in ``motion``.

    Args:
        model: hub id or folder.
    """

    info = RewardInfo(
        name="vjepa",
        summary="how well masked space-time regions are predicted from the rest; favours natural motion",
        range="below 0",
        paper="Assran et al. 2025, arXiv:2506.09985",
        weights={"model": VJEPA2},
    )
    slice_size = 2
    min_frames = 4

    def __init__(self, *, model: str = VJEPA2.source):
        from transformers import VJEPA2Model

        super().__init__()
        folder = locate(VJEPA2.at(model))
        self.network = load_strictly(VJEPA2Model, folder)
        config = self.network.config
        self.tubelet = config.tubelet_size
        self.side = config.crop_size // config.patch_size
        size = config.crop_size
        default = ImageTransform(
            height=size,
            width=size,
            interpolation="bilinear",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            short_side=int(size * 256 / 224),
        )
        self.transform = transform_from_folder(folder, size, default)

    def tokens(self, clips: Tensor) -> Tensor:
        """[B, F, 3, H, W] in [0, 1] → patch embeddings [B, N, D]; the last frame fills up an odd tubelet."""
        spare = -clips.shape[1] % self.tubelet
        clips = torch.cat([clips, clips[:, -1:].expand(-1, spare, -1, -1, -1)], dim=1)
        pixels = self.transform(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        return self.network.encoder.embeddings(pixels.to(self.dtype))

    def encode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run the encoder on tokens [B, M, D] at ``positions`` [B, M]; it sees nothing else of the clip.

        Each layer is recomputed in the backward pass: a clip of 64 frames has 8192 tokens.
        """
        for layer in self.network.encoder.layer:
            tokens, _ = checkpoint(layer, tokens, positions, use_reentrant=False)
        return self.network.encoder.layernorm(tokens)

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokens(clips)
        batch, count, _ = tokens.shape
        everywhere = torch.arange(count, device=tokens.device).expand(batch, -1)
        features = self.encode(tokens, everywhere)
        target = F.layer_norm(widened(features), features.shape[-1:])  # as in training
        tasks = hidden_tokens(count // self.side**2, self.side).values()
        errors = [self.error(tokens, target, everywhere, hidden.to(tokens.device)) for hidden in tasks]
        return -torch.stack(errors).mean(dim=0)

    def error(self, tokens: Tensor, target: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """Mean absolute error [B] of the features predicted where ``hidden`` [N] is True from the others."""
        context = positions[:, ~hidden]
        seen = self.encode(tokens[:, ~hidden], context)
        # The predictor picks its context out of a full set of tokens.
        full = torch.zeros_like(target, dtype=seen.dtype)
        full[:, ~hidden] = seen
        masks = [context], [positions[:, hidden]]
        predicted = checkpoint(self.network.predictor, full, *masks, use_reentrant=False).last_hidden_state
        return (widened(predicted) - target[:, hidden]).abs().mean(dim=(1, 2))


def widened(features: Tensor) -> Tensor:
    """The same features in float32 or better."""
    return features.to(torch.promote_types(features.dtype, torch.float32))
