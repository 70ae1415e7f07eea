"""Whether a clip shows the action its prompt names, by VideoMAE (Tong et al. 2022, arXiv:2203.12602).

Axes: B clips, T frames the network takes, K action classes.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from Core.rewards.base import RewardInfo, VideoReward
from Core.rewards.classifier import ClassProbability, log_odds
from Core.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, ImageTransform, transform_from_folder
from Core.utils.hub import Weight, locate
from Core.utils.state_dict import load_strictly

VIDEOMAE = Weight(
    source="MCG-NJU/videomae-base-finetuned-kinetics",
    parts=("processor",),
    size=346_000_000,
    licence="CC-BY-NC-4.0",
)


ARTICLES = ("a", "an", "the")


def words(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def forms(word: str) -> set[str]:
    """The word, and all it may be a regular form of: "rides" → ride; "running" → runn, runne, run."""
    found = {word}
    if word.endswith("ing") and re.search(r"[aeiouy]", root := word[:-3]):
        found |= {root, root + "e"}
        if root[-1:] == root[-2:-1]:
            found.add(root[:-1])
        if root.endswith("y"):
            found.add(root[:-1] + "ie")
    elif word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            found.add(word[:-2])
        if word.endswith("ies"):
            found.add(word[:-3] + "y")
    return found


def spoken_forms(prompt: str) -> set[str]:
    """All forms of the words of a prompt."""
    return {form for word in words(prompt) for form in forms(word)}


def contains(spoken: set[str], label: str) -> bool:
    """Whether each word of a label but its articles is among the words spoken, in some form."""
    needed = [word for word in words(label) if word not in ARTICLES]
    return bool(needed) and all(forms(word) & spoken for word in needed)


def find_action(prompt: str, labels: Sequence[str]) -> str:
    """The label a prompt is about: an exact one, else the longest whose words all occur in the prompt.

    Regular forms count as the same word ("rides", "riding"), also of a noun ("smoke" is taken for smoking);
    irregular ones and the past do not ("rode"). "a", "an" and "the" need not occur.

    Raises:
        ValueError: there is none; the message names near labels.
    """
    spoken = words(prompt)
    exact = [label for label in labels if words(label) == spoken]
    known = spoken_forms(prompt)
    contained = [label for label in labels if contains(known, label)]
    if candidates := exact or contained:
        return max(candidates, key=lambda label: (len(words(label)), len(label)))
    raise ValueError(
        f"no action class occurs in the prompt {prompt!r}; near: {', '.join(near_actions(prompt, labels))}; "
        "use its words in the prompt, or set `action` in reward_args"
    )


def near_actions(prompt: str, labels: Sequence[str], count: int = 5) -> list[str]:
    """Labels that share most words with the prompt, the more alike in spelling first."""
    spoken = spoken_forms(prompt)

    def likeness(label: str) -> tuple[float, float]:
        own = words(label)
        shared = sum(not spoken.isdisjoint(forms(word)) for word in own) / max(len(own), 1)
        return shared, difflib.SequenceMatcher(None, label.lower(), prompt.lower()).ratio()

    return sorted(labels, key=likeness, reverse=True)[:count]


def spread_frames(clips: Tensor, count: int) -> Tensor:
    """[B, F, 3, H, W] → [B, count, 3, H, W]: frames evenly over the clip, repeated if there are too few."""
    index = torch.linspace(0, clips.shape[1] - 1, count, device=clips.device).round().long()
    return clips[:, index]


class ActionPrediction(ClassProbability, VideoReward):
    """Probability of the prompt's action class; the loss is its cross-entropy.

    Args:
        model: hub id or folder of a VideoMAE classifier.
        action: the class for every prompt; by default the longest class whose words are in the prompt, in any
            regular form ("a man rides a bike"; see ``find_action``).
    """

    info = RewardInfo(
        name="actpred",
        summary="VideoMAE's probability that the clip shows the prompt's Kinetics action",
        range="0 to 1",
        paper="Tong et al. 2022, arXiv:2203.12602",
        weights={"model": VIDEOMAE},
    )
    slice_size = 4

    def __init__(self, *, model: str = VIDEOMAE.source, action: str | None = None):
        from transformers import VideoMAEForVideoClassification

        super().__init__()
        folder = locate(VIDEOMAE.at(model))
        self.network = load_strictly(VideoMAEForVideoClassification, folder)
        config = self.network.config
        self.index_of = {label: int(index) for index, label in config.id2label.items()}
        self.frame_count = config.num_frames
        side = config.image_size
        default = ImageTransform(
            height=side, width=side, interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
        self.transform = transform_from_folder(folder, side, default)
        self.action = None if action is None else find_action(action, list(self.index_of))

    def class_index(self, prompt: str) -> int:
        """Index of the class a prompt is scored on."""
        return self.index_of[self.action or find_action(prompt, list(self.index_of))]

    @classmethod
    def prompt_errors(cls, args: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
        from transformers import VideoMAEConfig

        folder = locate(cls.required_weights(args)["model"])
        labels = list(VideoMAEConfig.from_pretrained(folder, local_files_only=True).id2label.values())
        errors = []
        for text in [args["action"]] if args.get("action") else dict.fromkeys(prompts):
            try:
                find_action(text, labels)
            except ValueError as error:
                errors.append(str(error))
        return errors

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        chosen = torch.tensor([self.class_index(prompt) for prompt in prompts], device=clips.device)
        frames = spread_frames(clips, self.frame_count)
        pixels = self.transform(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return log_odds(self.network(pixel_values=pixels.to(self.dtype)).logits, chosen)
