"""The contract of a reward model: what every scorer takes, returns and guarantees.

Axes: B videos, F frames of each, N images (N = B·F inside an image scorer), H rows, W columns.
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from Core.modules.sharding import is_sharded
from Core.rewards.arguments import argument_errors
from Core.rewards.preprocess import to_unit_range
from Core.rewards.user_files import blamed
from Core.utils.hub import Weight, missing_local
from Core.utils.options import Bounds

Score = Callable[[Tensor, list[str]], Tensor]
SAMPLED_FRAMES = 8
# That every scorer takes beside its own.
SHARED_ARGUMENTS: dict[str, Any] = {"slice_size": Annotated[int, Bounds(minimum=1)], "device": str}


@dataclass(frozen=True)
class RewardOutput:
    """Result of scoring B videos.

    score: [B], in the scorer's own unit. loss: [B], what training minimises. parts: [B] each, detached, for
    logging. All float32 (float64 for a float64 scorer), score and loss with gradient to the frames.
    """

    score: Tensor
    loss: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """What a user wants to know of a scorer before choosing it.

    range: usual interval of the score. weights: constructor argument → the published weights it defaults to.
    """

    name: str
    summary: str
    range: str
    higher_is_better: bool = True
    paper: str = ""
    weights: Mapping[str, Weight] = field(default_factory=dict)


def freeze(module: nn.Module) -> nn.Module:
    """Put ``module`` into eval mode and turn each of its parameters into a buffer.

    A buffer moves and is saved like a parameter, but no ``requires_grad_``, optimiser or wrapper finds it:
    the only form of freezing that whoever holds the module cannot undo by accident. A network that is split over
    processes keeps its parameters, which alone can be split, and whose gradients are switched off.
    """
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None and is_sharded(child):
                parameter.requires_grad_(False)
            elif parameter is not None:
                del child._parameters[name]
                child._buffers[name] = parameter.detach()
        child.training = False
    return module


def thaw(module: nn.Module) -> nn.Module:
    """Turn what ``freeze`` made buffers back into parameters, without a gradient, so that they can be split."""
    for child in module.modules():
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                del child._buffers[name]
                child._parameters[name] = nn.Parameter(buffer, requires_grad=False)
    return module


class Reward(nn.Module):
    """A frozen, differentiable scorer of videos.

    Subclass ``ImageReward`` or ``VideoReward``, set ``info``, and load the networks in a constructor with
    keyword-only, annotated arguments (they become the keys of ``reward_args``). Networks are frozen as they
    are assigned, and whatever was done to them since is undone in each ``forward``.
    """

    info: ClassVar[RewardInfo]
    differentiable: ClassVar[bool] = True  # whether its scores have a gradient to the frames
    full_precision: ClassVar[tuple[str, ...]] = ()  # attributes that stay float32 in a half-precision scorer
    origin: ClassVar[str] = ""  # "path/to/file.py:Class" of a user's scorer
    slice_size: int = 32  # images (or clips) per forward; more are scored slice by slice
    placement: torch.device | None = None  # where the networks stay; None = where the caller puts them

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, (nn.Module, nn.Parameter)):
            freeze(self)

    def train(self, mode: bool = True) -> "Reward":
        """Stay in eval mode, whatever ``mode`` says."""
        return super().train(False)

    @property
    def higher_is_better(self) -> bool:
        """Whether training raises the score; a scorer that an argument turns around overrides it."""
        return self.info.higher_is_better

    @property
    def device(self) -> torch.device:
        """Device of the weights (CPU for a scorer without any)."""
        return self._device_or(torch.device("cpu"))

    def _device_or(self, other: torch.device) -> torch.device:
        """Device of the weights, or ``other`` for a scorer without any."""
        weights = itertools.chain(self.buffers(), self.parameters())
        return next((weight.device for weight in weights), other)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type the networks run in."""
        kept = tuple(f"{name}." for name in self.full_precision)
        weights = itertools.chain(self.named_buffers(), self.named_parameters())
        floats = (w.dtype for n, w in weights if w.is_floating_point() and not n.startswith(kept))
        return next(floats, torch.float32)

    def cast(self, dtype: torch.dtype) -> "Reward":
        """Convert the networks to ``dtype``, except that ``full_precision`` ones never get less than float32."""
        for name, child in self.named_children():
            child.to(torch.promote_types(dtype, torch.float32) if name in self.full_precision else dtype)
        return self

    @classmethod
    def scorers(cls, args: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Names of the elementary scorers in ``cls(**args)``, to find what a mixture holds twice."""
        return (cls.info.name,)

    @classmethod
    def required_weights(cls, args: Mapping[str, Any]) -> dict[str, Weight]:
        """Weights that ``cls(**args)`` loads, by the constructor argument that names them."""
        return {key: weight.at(args.get(key) or weight.source) for key, weight in cls.info.weights.items()}

    @classmethod
    def frames_needed(cls, args: Mapping[str, Any]) -> int:
        """Frames of a video without which ``cls(**args)`` cannot score it."""
        return getattr(cls, "min_frames", 1)

    @classmethod
    def passed_on(cls, args: Mapping[str, Any]) -> Mapping[str, Any]:
        """``args`` where those that every scorer takes are with the scorers that this one holds, if it holds any."""
        return args

    @classmethod
    def own_errors(cls, args: Mapping[str, Any]) -> list[str]:
        """What is wrong with ``args`` as arguments of the constructor, and of every scorer."""
        label = f"reward_args of {cls.info.name!r}"
        errors = argument_errors(cls, args, label, shared=SHARED_ARGUMENTS)
        return errors or device_errors(args.get("device"), label)

    @classmethod
    def config_errors(cls, args: Mapping[str, Any]) -> list[str]:
        """Sentences on what is wrong with ``args``, found without loading anything."""
        if errors := cls.own_errors(args):
            return errors
        label = f"reward_args of {cls.info.name!r}"
        required = cls.required_weights(args).items()
        return [
            f"{label}: {key}: {problem}" for key, weight in required if (problem := missing_local(weight))
        ]

    @classmethod
    def prompt_errors(cls, args: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
        """Sentences on prompts that ``cls(**args)`` cannot score, found without loading a network."""
        return []

    @classmethod
    def has_gradient(cls, args: Mapping[str, Any]) -> bool:
        """Whether the scores of ``cls(**args)`` have a gradient to the frames, as far as it says itself."""
        return cls.differentiable

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score B videos, frames [B, F, 3, H, W] in [-1, 1], each by its prompt.

        Raises:
            ValueError: frames and prompts do not fit.
        """
        check_inputs(frames, prompts)
        freeze(self)
        # The caller's autocast would run in half precision what `cast` keeps in float32, unlike in validation.
        with torch.autocast(frames.device.type, enabled=False):
            return self.judge(to_unit_range(frames), list(prompts))

    def place(self, device: str | torch.device) -> "Reward":
        """Move the networks to ``device``, or to the scorer's own ``placement`` if it has one.

        Raises:
            ValueError: this machine has no such device.
        """
        wanted = self.placement or torch.device(device)
        if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"reward {self.info.name!r} is to run on {str(wanted)!r}, but this machine has "
                f"{torch.cuda.device_count()} GPUs; choose another device, such as 'cpu'"
            )
        return self.to(wanted)

    def judge(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        """``evaluate`` where the networks are; the result is on the device of the frames.

        Errors name the file where the scorer is a user's.
        """
        with blamed(self.origin, "while scoring"):
            there = self._device_or(frames.device)
            output = self.evaluate(frames.to(there), prompts)
            if there == frames.device:
                return output
            parts = {name: part.to(frames.device) for name, part in output.parts.items()}
            return RewardOutput(output.score.to(frames.device), output.loss.to(frames.device), parts)

    @abstractmethod
    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        """``forward`` after its inputs have been checked and the frames brought to [0, 1]."""

    def as_score(self, raw: Tensor) -> Tensor:
        """The score, elementwise of what ``score_images`` or ``score_clips`` returned; by default the same."""
        return raw

    def loss(self, raw: Tensor) -> Tensor:
        """What training minimises, elementwise of the same; by default the score itself, signed."""
        return -raw if self.higher_is_better else raw

    def sample_frames(self, count: int, fps: float | None) -> Tensor:
        """Numbers [F] of the frames of a finished video that are scored; by default at most 8, evenly spread.

        Args:
            count: frames it has.
            fps: frames per second it plays at, if known.
        """
        return torch.linspace(0, count - 1, min(SAMPLED_FRAMES, count)).round().long()

    def in_slices(self, score: Score, inputs: Tensor, prompts: list[str], *columns: int) -> Tensor:
        """``score(inputs, prompts)`` [N, *columns], float32 or better, of inputs [N, …] and N prompts.

        It runs in slices of ``slice_size``, recomputed in the backward pass: the graph of only one is alive at a time.
        """
        if len(inputs) <= self.slice_size:
            return self.one_each(score(inputs, prompts), len(inputs), *columns).to(inputs.device)
        starts = range(0, len(inputs), self.slice_size)
        slices = [(inputs[i : i + self.slice_size], prompts[i : i + self.slice_size]) for i in starts]
        scores = [checkpoint(score, *part, use_reentrant=False) for part in slices]
        made = [self.one_each(s, len(p), *columns) for s, (_, p) in zip(scores, slices, strict=True)]
        return torch.cat(made).to(inputs.device)

    def one_each(self, scores: Any, *shape: int) -> Tensor:
        """``scores``, a tensor or plain numbers, in float32 or better.

        Raises:
            ValueError: they are not of ``shape``.
        """
        if isinstance(scores, (list, tuple, np.ndarray)):
            scores = numbers(scores)
        given = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if given != list(shape):
            raise ValueError(
                f"reward {self.info.name!r} must give one score and one loss per image or clip, a tensor "
                f"{list(shape)}, got {given}; average over all other dimensions, not over that one"
            )
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def numbers(scores: Any) -> Any:
    """A tensor of plain numbers; what are none, as they are."""
    try:
        return torch.as_tensor(np.asarray(scores, dtype=np.float64), dtype=torch.float32)
    except (TypeError, ValueError):
        return scores


class ImageReward(Reward):
    """A scorer of single images: the score of a video is the mean over its frames, and so is the loss."""

    @abstractmethod
    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] in [0, 1], each by its prompt."""

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        batch, count = frames.shape[:2]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        raw = self.in_slices(self.score_images, frames.flatten(0, 1), repeated)
        score = self.as_score(raw).view(batch, count).mean(dim=1)
        loss = self.one_each(self.loss(raw), len(raw)).view(batch, count).mean(dim=1)
        return RewardOutput(score, loss, {self.info.name: score.detach()})


class VideoReward(Reward):
    """A scorer that sees a clip as a whole."""

    min_frames: ClassVar[int] = 1

    @abstractmethod
    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of clips [B, F, 3, H, W] in [0, 1], each by its prompt."""

    def check_count(self, frames: Tensor) -> None:
        """Raise ValueError where [B, F, …] has fewer than ``min_frames``."""
        if frames.shape[1] < self.min_frames:
            raise ValueError(
                f"reward {self.info.name!r} needs at least {self.min_frames} frames, got {frames.shape[1]}: "
                'decode more with decode_frame="all" (or "fml", "alt")'
            )

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        self.check_count(frames)
        raw = self.in_slices(self.score_clips, frames, prompts)
        score = self.as_score(raw)
        loss = self.one_each(self.loss(raw), len(raw))
        return RewardOutput(score, loss, {self.info.name: score.detach()})


def shared_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``args`` that every scorer takes."""
    return {key: value for key, value in args.items() if key in SHARED_ARGUMENTS}


def device_errors(device: str | None, label: str) -> list[str]:
    """A sentence if ``device`` is none that torch knows; whether this machine has it is seen when it is used."""
    try:
        if device is not None:
            torch.device(device)
    except RuntimeError:
        return [f"{label}: device must be like 'cpu', 'cuda' or 'cuda:1', got {device!r}"]
    return []


def check_inputs(frames: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless frames are floating-point [B, F, 3, H, W] with B prompts."""
    if frames.dim() != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
        raise ValueError(
            f"frames must be floating-point [B, F, 3, H, W], got {frames.dtype} {list(frames.shape)}"
        )
    if isinstance(prompts, str) or len(prompts) != len(frames):
        given = "one string" if isinstance(prompts, str) else str(len(prompts))
        raise ValueError(
            f"a reward needs a list with one prompt per video: {len(frames)} videos, prompts: {given}"
        )
