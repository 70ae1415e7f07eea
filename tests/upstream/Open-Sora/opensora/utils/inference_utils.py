import json

import torch

from opensora.datasets import IMG_FPS
from opensora.datasets.utils import read_from_path


def prepare_multi_resolution_info(info_type, batch_size, image_size, num_frames, fps, device, dtype):
    if info_type is None:
        return dict()
    assert info_type in ("OpenSora", "STDiT2")
    values = dict(
        fps=fps if num_frames > 1 else IMG_FPS,
        height=image_size[0],
        width=image_size[1],
        num_frames=num_frames,
        ar=image_size[0] / image_size[1],
    )
    return {
        key: torch.tensor([value], device=device, dtype=dtype).repeat(batch_size)
        for key, value in values.items()
    }


def load_prompts(prompt_path, start_idx=None, end_idx=None):
    with open(prompt_path) as f:
        prompts = [line.strip() for line in f.readlines()]
    return prompts[start_idx:end_idx]


def append_score_to_prompts(prompts, aes=None, flow=None, camera_motion=None):
    suffixes = []
    if aes is not None:
        suffixes.append(f" aesthetic score: {aes:.1f}.")
    if flow is not None:
        suffixes.append(f" motion score: {flow:.1f}.")
    if camera_motion is not None:
        suffixes.append(f" camera motion: {camera_motion}.")
    return [prompt + "".join(suffixes) for prompt in prompts]


def extract_json_from_prompts(prompts, reference, mask_strategy):
    """Texts, and the two other lists changed in place."""
    texts = []
    for number, prompt in enumerate(prompts):
        text, brace, rest = prompt.partition("{")
        info = json.loads(brace + rest) if brace else {}
        assert set(info) <= {"reference_path", "mask_strategy"}, f"Invalid key in {prompt}"
        reference[number] = info.get("reference_path", reference[number])
        mask_strategy[number] = info.get("mask_strategy", mask_strategy[number])
        texts.append(text)
    return texts, reference, mask_strategy


def split_prompt(prompt_text):
    if not prompt_text.startswith("|0|"):
        return [prompt_text], None
    fields = prompt_text.split("|")[1:]
    return [text.strip() for text in fields[1::2]], [int(loop) for loop in fields[::2]]


def merge_prompt(text_list, loop_idx_list=None):
    if loop_idx_list is None:
        return text_list[0]
    return "".join(f"|{loop}|{text}" for loop, text in zip(loop_idx_list, text_list, strict=True))


def collect_references_batch(reference_paths, vae, image_size):
    refs_x = []
    for reference_path in reference_paths:
        paths = [] if reference_path == "" else reference_path.split(";")
        pixels = [read_from_path(path, image_size, transform_name="resize_crop") for path in paths]
        refs_x.append([vae.encode(x.unsqueeze(0).to(vae.device, vae.dtype)).squeeze(0) for x in pixels])
    return refs_x


def parse_mask_strategy(mask_strategy):
    groups = []
    for text in (mask_strategy or "").split(";"):
        given = text.split(",") if text else []
        assert len(given) <= 6, f"Invalid mask strategy: {text}"
        numbers = given + ["0", "0", "0", "0", "1", "0"][len(given) :]
        if given:
            groups.append([int(number) for number in numbers[:5]] + [float(numbers[5])])
    return groups


def apply_mask_strategy(z, refs_x, mask_strategys, loop_i, align=None):
    """A mask [B, T] of ones even where nothing is conditioned; conditioned frames are written into z."""
    mask = torch.ones(z.shape[0], z.shape[2], dtype=torch.float, device=z.device)
    for latent, row, references, strategy in zip(z, mask, refs_x, mask_strategys, strict=True):
        for loop, number, source, target, length, edit in parse_mask_strategy(strategy):
            if loop == loop_i:
                reference = references[number]
                source, target = source % reference.shape[1], target % latent.shape[1]
                if align is not None:
                    source, target = source // align * align, target // align * align
                span = reference[:, source : source + length][:, : latent.shape[1] - target]
                latent[:, target : target + span.shape[1]] = span
                row[target : target + span.shape[1]] = edit
    return mask


def append_generated(
    vae, generated_video, refs_x, mask_strategy, loop_i, condition_frame_length, condition_frame_edit
):
    """The two lists it was given, changed in place."""
    tail = f"-{condition_frame_length},0,{condition_frame_length},{condition_frame_edit}"
    for number, latent in enumerate(vae.encode(generated_video)):
        refs_x[number].append(latent)
        own = f"{loop_i},{len(refs_x[number]) - 1},{tail}"
        mask_strategy[number] = f"{mask_strategy[number]};{own}" if mask_strategy[number] else own
    return refs_x, mask_strategy
