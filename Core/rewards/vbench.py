"""What a video does over time, by VBench's dimensions and formulas (Huang et al. 2024, arXiv:2311.17982).

VBench reads finished files; these take frames and are differentiable. Each class says what else differs.

Axes: B clips, F frames, P = F − 1 pairs of neighbours, D features.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from Core.rewards.base import RewardInfo, RewardOutput, VideoReward
from Core.rewards.clip import load_image_tower, unit
from Core.rewards.flow import between, optical_flow
from Core.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize, resize_short_side
from Core.utils.hub import Weight, locate
from Core.utils.state_dict import load_strictly

VBENCH = "Huang et al. 2024, arXiv:2311.17982"
DINO_B16 = Weight(source="facebook/dino-vitb16", size=343_000_000, licence="Apache-2.0")
CLIP_B32 = Weight(source="openai/clip-vit-base-patch32", size=605_000_000, licence="MIT")
FLOW_RATE = 8  # frames per second that motion is measured at
FASTEST = 0.05  # share of a frame's pixels that its motion is read off
BORDER = 16  # of each side of a frame, a part of so many is left out of its motion
THRESHOLD = 6 / 256  # of the short side: motion from which on VBench counts a pair of frames as moving
MOVING_SHARE = 4 / 16  # moving pairs per frame from which on VBench counts a video as dynamic


class EveryFrame(VideoReward):
    """A scorer that looks at all frames of a finished video, at the rate it plays at."""

    def sample_frames(self, count: int, fps: float | None) -> Tensor:
        return torch.arange(count)

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        self.check_count(frames)
        score = self.score_clips(frames, prompts)  # a clip may be long, so subclasses slice by frame
        return RewardOutput(score, self.loss(score), {self.info.name: score.detach()})


class Consistency(EveryFrame):
    """Mean over the frames after the first of (cos to the first + cos to the previous) / 2, each at least 0.

    A subclass says what the features of a frame are.
    """

    min_frames = 2
    width: int

    @abstractmethod
    def features(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Unit features [N, D] of images [N, 3, H, W] in [0, 1]; D is ``width``."""

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        batch, count = clips.shape[:2]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        features = self.in_slices(self.features, clips.flatten(0, 1), repeated, self.width)
        features = features.view(batch, count, self.width)
        to_first = (features[:, 1:] * features[:, :1]).sum(dim=-1)
        to_previous = (features[:, 1:] * features[:, :-1]).sum(dim=-1)
        return (to_first.clamp_min(0) + to_previous.clamp_min(0)).mean(dim=1) / 2


class SubjectConsistency(Consistency):
    """How alike DINO finds the frames: mean of (cos to the first + cos to the previous) / 2; loss −score.

    A still clip scores 1, so mix in ``dynamic_degree``. VBench's network, resizing (short side to 224, bilinear without
    antialiasing, not cropped) and formula; where a frame is not square the position table is interpolated by
    transformers, which rounds differently from DINO's own code.

    Args:
        model: DINO ViT in the transformers layout, as hub id or folder.
    """

    info = RewardInfo(
        name="subject_consistency",
        summary="similarity of the frames, by DINO: whether the subject stays the same",
        range="0 to 1, usually above 0.8",
        paper=VBENCH,
        weights={"model": DINO_B16},
    )

    def __init__(self, *, model: str = DINO_B16.source):
        from transformers import ViTModel

        super().__init__()
        folder = locate(DINO_B16.at(model))
        self.network = load_strictly(ViTModel, folder, unused=r"pooler\..*", add_pooling_layer=False)
        self.width = self.network.config.hidden_size
        self.side = self.network.config.image_size

    def features(self, images: Tensor, prompts: list[str]) -> Tensor:
        images = resize_short_side(images, self.side, "bilinear", antialias=False)
        pixels = normalize(images, IMAGENET_MEAN, IMAGENET_STD).to(self.dtype)
        hidden = self.network(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return unit(hidden[:, 0])


class BackgroundConsistency(Consistency):
    """How alike CLIP finds the frames: mean of (cos to the first + cos to the previous) / 2; loss −score.

    A still clip scores 1, so mix in ``dynamic_degree``. VBench's network, preprocessing (short side to 224, bicubic
    without antialiasing, central crop) and formula.

    Args:
        model: CLIP folder or hub id.
    """

    info = RewardInfo(
        name="background_consistency",
        summary="similarity of the frames, by CLIP: whether the scene stays the same",
        range="0 to 1, usually above 0.9",
        paper=VBENCH,
        weights={"model": CLIP_B32},
    )

    def __init__(self, *, model: str = CLIP_B32.source):
        super().__init__()
        self.image = load_image_tower(locate(CLIP_B32.at(model)), round_half="even", antialias=False)
        self.width = self.image.width

    def features(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.image(images)


class TemporalFlickering(EveryFrame):
    """1 − mean absolute pixel change between neighbouring frames; loss −score.

    VBench's formula. It means flicker only where nothing should move: VBench asks for still scenes and drops
    videos that move. A still clip scores 1.
    """

    info = RewardInfo(
        name="temporal_flickering",
        summary="absence of change from frame to frame, for scenes that should be still",
        range="0 to 1, usually above 0.9",
        paper=VBENCH,
    )
    min_frames = 2

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        return 1 - clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


class MotionSmoothness(EveryFrame):
    """1 − mean absolute error of predicting each inner frame from its two neighbours; loss −score.

    A frame is predicted by moving both neighbours half of the optical flow between them, and averaging. VBench
    interpolates by a network (AMT-S) and predicts every second frame, so the values differ. A still clip
    scores 1.
    """

    info = RewardInfo(
        name="motion_smoothness",
        summary="how well a frame is predicted by its neighbours: whether motion is even",
        range="0 to 1, usually above 0.9",
        paper=VBENCH,
    )
    min_frames = 3

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        triples = clips.unfold(1, 3, 1)  # [B, F − 2, 3, H, W, 3], a view
        repeated = [prompt for prompt in prompts for _ in range(triples.shape[1])]
        errors = self.in_slices(prediction_errors, triples.flatten(0, 1), repeated)
        return 1 - errors.view(len(clips), -1).mean(dim=1)


def prediction_errors(triples: Tensor, prompts: list[str]) -> Tensor:
    """Mean absolute error [N] of the middle one of three frames [N, 3, H, W, 3], predicted from the others."""
    before, inner, after = triples.unbind(dim=-1)
    return (between(before, after) - inner).abs().mean(dim=(1, 2, 3))


class DynamicDegree(VideoReward):
    """How far things move: 1 is the motion from which VBench counts two frames as moving; loss −score.

    For a pair of neighbouring frames: the mean motion of the fastest 5% of pixels, divided by 6/256 of the short side.
    For a clip: the mean over its pairs. The part ``dynamic`` is VBench's verdict on the clip: 1 if the pairs above 1
    number at least a quarter of the frames, else 0. VBench reports the share of such videos, and measures motion with a
    network (RAFT) up to the frame's border; here a sixteenth at the border is left out. Finished videos are scored at
    8 frames per second, as in VBench. A still clip scores 0.
    """

    info = RewardInfo(
        name="dynamic_degree",
        summary="amount of motion by optical flow; guards against frozen videos",
        range="0 to about 10; above 1 moves",
        paper=VBENCH,
    )
    min_frames = 2

    def sample_frames(self, count: int, fps: float | None) -> Tensor:
        interval = max(1, min(round((fps or FLOW_RATE) / FLOW_RATE), count - 1))
        return torch.arange(0, count, interval)

    def pair_motions(self, clips: Tensor, prompts: list[str]) -> Tensor:
        """Motion [B, P] of each pair, in units of the threshold."""
        flow = optical_flow(clips[:, :-1].flatten(0, 1), clips[:, 1:].flatten(0, 1))
        speed = length(without_border(flow)).flatten(1) / min(flow.shape[-2:])
        fastest = speed.topk(max(1, int(speed.shape[1] * FASTEST)), dim=1).values.mean(dim=1)
        return fastest.view(len(clips), -1) / THRESHOLD

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        return self.pair_motions(clips, prompts).mean(dim=1)

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        self.check_count(frames)
        motions = self.in_slices(self.pair_motions, frames, prompts, frames.shape[1] - 1)
        score = motions.mean(dim=1)
        dynamic = is_dynamic(motions.detach()).to(score.dtype)
        return RewardOutput(score, self.loss(score), {self.info.name: score.detach(), "dynamic": dynamic})


def without_border(flow: Tensor) -> Tensor:
    """The inner part of [N, 2, H, W]: near an edge things come in that match nothing."""
    rows, columns = (side // BORDER for side in flow.shape[-2:])
    return flow[..., rows : flow.shape[-2] - rows, columns : flow.shape[-1] - columns]


def length(flow: Tensor) -> Tensor:
    """Length [N, H, W] of each arrow of a flow, with a finite gradient where it is 0."""
    small = 1e-6
    return (flow.square().sum(dim=1) + small**2).sqrt() - small


def is_dynamic(motions: Tensor) -> Tensor:
    """VBench's verdict [B] on motions [B, P] in units of its threshold."""
    enough = max(1, round(MOVING_SHARE * (motions.shape[1] + 1)))
    return (motions > 1).sum(dim=1) >= enough
