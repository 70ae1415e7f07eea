"""Reward files of users: what a class in one must have, and errors that name the file.

Axes: B videos, F frames, H rows, W columns.
"""

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# What the program calls, with the arguments it gives beside self.
METHODS = {
    "score_images": ("images", "prompts"),
    "score_clips": ("clips", "prompts"),
    "evaluate": ("frames", "prompts"),
    "as_score": ("raw",),
    "loss": ("raw",),
    "sample_frames": ("count", "fps"),
}


class RewardFileError(ValueError):
    """A user's reward file failed; the message names it."""


@contextmanager
def blamed(origin: str, doing: str) -> Iterator[None]:
    """Whatever the block raises becomes a sentence about ``origin``, a user's "file.py:Class"; '' is none's.

    Raises:
        RewardFileError: the block failed, or asked the program to exit.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RewardFileError):
        raise
    except (Exception, SystemExit) as error:  # the file is a program, so anything may come out of it
        if not origin:
            raise
        what = f"{type(error).__name__}: {str(error) or 'no reason given'}"
        place = _place(error, origin)
        raise RewardFileError(
            f"reward {origin!r} fails {doing}{place}: {what}{'; mend the file' if place else ''}"
        ) from error


def _place(error: BaseException, origin: str) -> str:
    """The last line of the user's file that took part."""
    file = origin[: origin.rindex(".py") + len(".py")]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" at line {lines[-1]}" if lines else ""


def contract_errors(cls: Any, info_class: Any) -> list[str]:
    """What a class derived from ``Reward`` lacks, one sentence each; nothing of it is run."""
    errors = []
    info: Any = getattr(cls, "info", None)
    if not isinstance(info, info_class) or not isinstance(info.name, str) or not info.name:
        errors.append('it must have info = RewardInfo(name="…", summary="…", range="…") as a class attribute')
    for name, arguments in METHODS.items():
        method = inspect.getattr_static(cls, name, None)
        wanted = f"{name}(self, {', '.join(arguments)})"
        if getattr(method, "__isabstractmethod__", False):
            errors.append(f"it must define {wanted}")
        elif inspect.isfunction(method) and not _takes(method, 1 + len(arguments)):
            errors.append(f"its {name} must be {wanted}, got {name}{inspect.signature(method)}")
    required = [
        parameter.name
        for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
    ]
    if required:
        errors.append(
            f"its constructor must be __init__(self, *, {', '.join(required)}), with keyword-only arguments"
        )
    return errors


def _takes(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True


def try_scorer(scorer: Any, frames: Tensor, prompts: Sequence[str], needs_gradient: bool) -> bool:
    """Score ``frames`` [B, F, 3, H, W] once; False if a gradient is asked for and the loss has none to them.

    Raises:
        RewardFileError: it fails, or gives something else than scores and losses.
    """
    kept = dict(vars(scorer))  # a scorer that counts its calls counts none of this
    try:
        return _try(scorer, frames.detach().requires_grad_(needs_gradient), prompts, needs_gradient)
    finally:
        vars(scorer).update(kept)


def _try(scorer: Any, frames: Tensor, prompts: Sequence[str], needs_gradient: bool) -> bool:
    origin = type(scorer).origin
    with torch.set_grad_enabled(needs_gradient):
        output = scorer(frames, prompts)
        for name in ("score", "loss"):
            value = getattr(output, name, None)
            if not isinstance(value, Tensor) or value.shape != frames.shape[:1]:
                given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise RewardFileError(
                    f"reward {origin!r} must give a {name} for each video, a tensor [{len(frames)}], got {given}; "
                    "return a RewardOutput, or leave evaluate as it is"
                )
    if not isinstance(output.parts, Mapping):
        raise RewardFileError(
            f"reward {origin!r} must give its parts as a dict, got {type(output.parts).__name__}; leave them out, or "
            "name a tensor for each"
        )
    return not needs_gradient or _has_gradient(origin, output.loss, frames)


def _has_gradient(origin: str, loss: Tensor, frames: Tensor) -> bool:
    if not loss.requires_grad:
        return False
    with blamed(origin, "in the backward pass"):
        (gradient,) = torch.autograd.grad(loss.sum(), frames, allow_unused=True)
    return gradient is not None
