"""Prompts, conditions and references for sampling, with the text formats of Open-Sora v1.2.0.

Axes: B batch, C channels, T frames (latent frames where the tensor is a latent), H height, W width.

A prompt may end in a JSON object with references, ``A cat.{"reference_path": "a.png", "mask_strategy": "0"}``,
and may change from loop to loop of a long video, ``|0|a dog runs|2|the dog sleeps``.

A mask strategy tells which latent frames are given and not generated: groups joined by ";", each up to six
numbers ``loop,reference,reference_start,target_start,length,edit_ratio`` (defaults 0,0,0,0,1,0; a negative
start counts from the end). An edit ratio of 0 keeps the frames as they are; a higher one lets the sampler
change them more.
"""

import json
import os
from typing import NamedTuple

import torch

from opensora.datasets.utils import IMG_FPS, read_from_path


class MaskGroup(NamedTuple):
    """One group of a mask strategy; starts and length count latent frames."""

    loop_id: int = 0
    reference_id: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0


def prepare_multi_resolution_info(info_type, batch_size, image_size, num_frames, fps, device, dtype):
    """What a multi-resolution model is told about the sample, each value repeated over the batch.

    Args:
        info_type: ``"STDiT2"`` (or ``"OpenSora"``), or None for a model that takes nothing.
        image_size: (height, width) in pixels.
        num_frames: pixel frames; a still picture (1) is announced at ``IMG_FPS``.
        fps: frames per second.

    Returns:
        height, width, num_frames, fps and ar, which is height / width, each [B]; ``{}`` for None.
    """
    if info_type is None:
        return {}
    if info_type not in ("STDiT2", "OpenSora"):
        raise ValueError(f"multi_resolution={info_type!r} is unknown; use 'STDiT2', 'OpenSora' or None")
    height, width = image_size
    values = dict(height=height, width=width, num_frames=num_frames, ar=height / width)
    values["fps"] = fps if num_frames > 1 else IMG_FPS
    return {
        name: torch.full((batch_size,), value, device=device, dtype=dtype) for name, value in values.items()
    }


def load_prompts(prompt_path, start_idx=None, end_idx=None):
    """The prompts of a UTF-8 file, one a line, blank lines left out.

    Args:
        start_idx, end_idx: slice of the prompts (end exclusive); None is open.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no UTF-8 text or holds no prompts, or the slice is empty.
    """
    if not os.path.isfile(prompt_path):
        raise FileNotFoundError(
            f"prompt file {str(prompt_path)!r} does not exist; set prompt_path to a file of one prompt a line"
        )
    try:
        with open(prompt_path, encoding="utf-8-sig") as file:
            prompts = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"prompt file {str(prompt_path)!r} is not UTF-8 text; save it as UTF-8") from None
    if not prompts:
        raise ValueError(f"prompt file {str(prompt_path)!r} holds no prompts; write one a line")
    selected = prompts[start_idx:end_idx]
    if not selected:
        raise ValueError(
            f"prompt file {str(prompt_path)!r} has {len(prompts)} prompts and start_index={start_idx}, "
            f"end_index={end_idx} selects none of them; change the indices or the file"
        )
    return selected


def append_score_to_prompts(prompts, aes=None, flow=None, camera_motion=None):
    """The prompts with the score suffixes the model was trained with, where they are not there yet.

    Args:
        aes: aesthetic score, about 4 to 7.
        flow: motion score, 0 upwards.
        camera_motion: for example "pan left", "zoom in", "static".
    """
    suffixes = []
    if aes is not None:
        suffixes.append(("aesthetic score:", f"{aes:.1f}"))
    if flow is not None:
        suffixes.append(("motion score:", f"{flow:.1f}"))
    if camera_motion is not None:
        suffixes.append(("camera motion:", camera_motion))
    return [
        prompt + "".join(f" {key} {value}." for key, value in suffixes if key not in prompt)
        for prompt in prompts
    ]


def extract_json_from_prompts(prompts, reference, mask_strategy):
    """Split JSON suffixes off the prompts.

    Args:
        prompts: B prompts.
        reference, mask_strategy: B strings that hold where a prompt names none itself.

    Returns:
        (prompts, reference, mask_strategy), new lists of B strings.

    Raises:
        ValueError: a suffix is no JSON object of strings with the keys "reference_path" and "mask_strategy".
    """
    texts, references, strategies = [], [], []
    for prompt, default_reference, default_strategy in zip(prompts, reference, mask_strategy, strict=True):
        text, brace, suffix = prompt.partition("{")
        info = _read_suffix(prompt, brace + suffix) if brace else {}
        texts.append(text)
        references.append(info.get("reference_path", default_reference))
        strategies.append(info.get("mask_strategy", default_strategy))
    return texts, references, strategies


def _read_suffix(prompt, suffix):
    """The JSON suffix of a prompt as {key: str}."""
    try:
        info = json.loads(suffix)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f'prompt {prompt!r} ends in malformed JSON ({error}); write {{"reference_path": "a.png", '
            '"mask_strategy": "0"} after the text, or remove the "{"'
        ) from error
    unknown = set(info) - {"reference_path", "mask_strategy"}
    if unknown:
        raise ValueError(
            f"prompt {prompt!r} sets {', '.join(sorted(unknown))} in its JSON suffix; only reference_path "
            "and mask_strategy are allowed there"
        )
    if not all(isinstance(value, str) for value in info.values()):
        raise ValueError(
            f"prompt {prompt!r} has a JSON suffix with other values than text; put them in quotes"
        )
    return info


def split_prompt(prompt_text):
    """Split "|0|first|2|second" into (["first", "second"], [0, 2]); a plain prompt into ([prompt], None).

    The numbers are the loops at which a text takes over; they start at 0 and grow.
    """
    if not prompt_text.startswith("|0|"):
        return [prompt_text], None
    fields = prompt_text.split("|")[1:]
    loops, texts = fields[::2], [text.strip() for text in fields[1::2]]
    valid = len(loops) == len(texts) and all(loop.isdecimal() for loop in loops)
    loops = [int(loop) for loop in loops] if valid else []
    if not valid or any(later <= earlier for earlier, later in zip(loops, loops[1:], strict=False)):
        raise ValueError(
            f"prompt {prompt_text!r} has malformed segments; write |0|first text|2|text from loop 2 on, with "
            "growing loop numbers and no other '|'"
        )
    return texts, loops


def merge_prompt(text_list, loop_idx_list=None):
    """Undo ``split_prompt``."""
    if loop_idx_list is None:
        return text_list[0]
    return "".join(f"|{loop}|{text}" for loop, text in zip(loop_idx_list, text_list, strict=True))


def extract_prompts_loop(prompts, num_loop):
    """For each prompt the text that holds in loop ``num_loop`` (0 is the first)."""
    selected = []
    for prompt in prompts:
        texts, loops = split_prompt(prompt)
        started = sum(loop <= num_loop for loop in loops) if loops else 1
        selected.append(texts[started - 1])
    return selected


def parse_mask_strategy(mask_strategy):
    """The ``MaskGroup``s of a mask strategy string (see the top of this file); none for "" or None.

    Raises:
        ValueError: a group has more than six fields or one that is no number.
    """
    if not mask_strategy:
        return []
    return [_parse_mask_group(group, mask_strategy) for group in mask_strategy.split(";")]


def _parse_mask_group(group, mask_strategy):
    fields = group.split(",")
    try:
        if len(fields) > 6:
            raise ValueError(f"{len(fields)} fields")
        parsed = MaskGroup(*map(int, fields[:5]), *map(float, fields[5:]))
        if (
            parsed.loop_id < 0
            or parsed.reference_id < 0
            or parsed.length < 1
            or not 0 <= parsed.edit_ratio <= 1
        ):
            raise ValueError("a number out of range")
    except ValueError as error:
        raise ValueError(
            f"mask_strategy={mask_strategy!r} has a bad group {group!r} ({error}); write up to six numbers "
            "loop,reference,reference_start,target_start,length,edit_ratio with loop and reference >= 0, "
            "length >= 1 and edit_ratio in [0, 1], and join groups by ';'"
        ) from None
    return parsed


def collect_references_batch(reference_paths, vae, image_size):
    """Encode the references of each sample.

    Args:
        reference_paths: B strings, each paths joined by ";" or "" for none.
        vae: has ``encode([1, 3, T, H, W] in [-1, 1]) -> latent``, ``device`` and ``dtype``.
        image_size: (height, width) in pixels to which pictures and videos are fitted.

    Returns:
        B lists of latents [C, T, H, W].
    """
    references = []
    for paths in reference_paths:
        pixels = [
            read_from_path(path, image_size, transform_name="resize_crop")
            for path in paths.split(";")
            if path
        ]
        references.append([vae.encode(x[None].to(vae.device, vae.dtype))[0] for x in pixels])
    return references


def apply_mask_strategy(z, refs_x, mask_strategys, loop_i, align=None):
    """Copy reference frames into the latent, in place, and say which frames the sampler generates.

    Args:
        z: latent [B, C, T, H, W]; modified.
        refs_x: B lists of reference latents [C, T, H, W].
        mask_strategys: B mask strategy strings.
        loop_i: groups of other loops are passed over.
        align: starts are moved to a multiple of this many latent frames (a VAE chunk is 5), None leaves them.

    Returns:
        mask [B, T] in [0, 1]: 1 = generate, otherwise the edit ratio of the given frame; None when this loop
        is given no frame at all.

    Raises:
        ValueError: a group names a reference or a frame that does not exist.
    """
    mask = torch.ones(z.shape[0], z.shape[2], dtype=torch.float, device=z.device)
    conditioned = False
    for sample, row, references, strategy in zip(z, mask, refs_x, mask_strategys, strict=True):
        for group in parse_mask_strategy(strategy):
            if group.loop_id != loop_i:
                continue
            if group.reference_id >= len(references):
                raise ValueError(
                    f"mask_strategy={strategy!r} names reference {group.reference_id}, but the sample has "
                    f"{len(references)}; add paths to reference_path (joined by ';') or lower the number "
                    "(0 is the first)"
                )
            reference = references[group.reference_id]
            source = _start_frame(
                group.reference_start, reference.shape[1], align, "reference_start", strategy
            )
            target = _start_frame(group.target_start, z.shape[2], align, "target_start", strategy)
            length = min(group.length, z.shape[2] - target, reference.shape[1] - source)
            sample[:, target : target + length] = reference[:, source : source + length]
            row[target : target + length] = group.edit_ratio
            conditioned = True
    return mask if conditioned else None


def _start_frame(start, num_frames, align, field, strategy):
    """``start`` as an index in [0, num_frames), moved to the nearest multiple of ``align`` that fits."""
    index = start + num_frames if start < 0 else start
    if not 0 <= index < num_frames:
        raise ValueError(
            f"mask_strategy={strategy!r} has {field} {start}, but there are only {num_frames} latent frames; "
            f"use {-num_frames} to {num_frames - 1}"
        )
    if align is None:
        return index
    chunk, rest = divmod(index, align)
    # Upstream rounds up only while another whole chunk follows; a tie rounds down.
    if rest > align / 2 and chunk < num_frames // align - 1:
        chunk += 1
    return chunk * align


def append_generated(
    vae, generated_video, refs_x, mask_strategy, loop_i, condition_frame_length, condition_frame_edit
):
    """Make the end of the last clip the start of the next: encode it and add it to the references.

    Args:
        vae: has ``encode([B, 3, T, H, W]) -> [B, C, T, H, W]``.
        generated_video: [B, 3, T, H, W] pixels in [-1, 1].
        refs_x: B lists of reference latents (or None for an empty one).
        mask_strategy: B mask strategy strings (or None for an empty one).
        loop_i: the loop that will use the frames.
        condition_frame_length: how many latent frames are carried over.
        condition_frame_edit: their edit ratio.

    Returns:
        (refs_x, mask_strategy), new lists with the clip appended.
    """
    latents = vae.encode(generated_video)
    references = [[*(refs or []), latent] for refs, latent in zip(refs_x, latents, strict=True)]
    strategies = []
    for refs, strategy in zip(references, mask_strategy, strict=True):
        length = condition_frame_length
        group = f"{loop_i},{len(refs) - 1},-{length},0,{length},{condition_frame_edit}"
        strategies.append(f"{strategy};{group}" if strategy else group)
    return references, strategies
