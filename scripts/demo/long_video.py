"""Test long video and conditioning on the demo through the command line, judged by the oracle.

``python -m scripts.demo.long_video [--prompts 64] [--loop 4] [--condition-frame-length 2]``

Prints how many videos whose first clip is right (colour and shape match the caption) are still right in the last clip,
how exactly the latents carried over were kept, and how well an image given as the first frame is reproduced.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from Core.backbones.opensora import OpenSora
from Core.cli import main as run
from Core.data.video import read_video, save_video
from Core.generation import generate as generation
from Core.generation.manifest import read_manifest
from Core.sampling.kept_frames import KeptFrames
from opensora.datasets import read_from_path
from scripts.demo import oracle, world
from scripts.demo.common import DEMO, heldout, psnr, to_pixels, to_uint8


def sample(folder: Path, captions: list[str], *flags: str) -> None:
    """Generate one video per caption, with the base model unless ``flags`` say otherwise."""
    (folder / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    argv = [str(DEMO), "--is-vader-training", "False", "--prompt-path", str(folder / "prompts.txt")]
    code = run([*argv, "--project-dir", str(folder / "videos"), *flags])
    if code:
        raise SystemExit(code)


@contextmanager
def kept_latents() -> Iterator[list[float]]:
    """Record the largest difference between given and final latents of each conditioned clip."""
    differences: list[float] = []
    run_steps = generation.run_steps

    def watched(step, z: Tensor, *args) -> Tensor:
        given, result = z.clone(), run_steps(step, z, *args)
        if isinstance(step, KeptFrames):
            kept = (step.mask == 0)[:, None, :, None, None].expand_as(z)
            differences.append(float((result - given)[kept].abs().max()))
        return result

    with mock.patch.object(generation, "run_steps", watched):
        yield differences


def videos(folder: Path) -> list[Tensor]:
    """[3, T, H, W] of each prompt, in order."""
    made = folder / "videos"
    return [read_video(made / entry["file"]) for entry in read_manifest(made)]


def right(clip: Tensor, caption: str) -> bool:
    """Whether the oracle sees the caption's colour and shape in [3, T, H, W]."""
    said, seen = world.parse_caption(caption), oracle.read(to_uint8(clip.transpose(0, 1))) or {}
    return all(seen.get(name) == said[name] for name in ("colour", "shape"))


def long_videos(folder: Path, count: int, loop: int, length: int, flags: list[str]) -> dict:
    """How well long videos of held-out captions stay right."""
    _, captions = heldout(count)
    with kept_latents() as differences:
        sample(folder, captions, "--loop", str(loop), "--condition-frame-length", str(length), *flags)
    made = videos(folder)
    pairs = list(zip(made, captions, strict=True))
    first = [right(clip[:, : world.FRAMES], caption) for clip, caption in pairs]
    last = [right(clip[:, -world.FRAMES :], caption) for clip, caption in pairs]
    held = [b for a, b in zip(first, last, strict=True) if a]
    return {
        "videos": len(made),
        "frames": made[0].shape[1],
        "times_training_length": round(made[0].shape[1] / world.FRAMES, 2),
        "right_in_first_clip": sum(first),
        "of_those_right_in_last_clip": sum(held) / len(held) if held else None,
        "largest_change_of_kept_latents": max(differences),
    }


def picture_conditioning(folder: Path, count: int, flags: list[str]) -> dict:
    """PSNR of a given first frame against the image and against the VAE's reconstruction of it."""
    scenes, captions = heldout(count)
    frames = [to_pixels(world.render(scene, [0])).transpose(0, 1) for scene in scenes]
    paths = [str(save_video(frame, folder / f"{i:04d}", fps=8)) for i, frame in enumerate(frames)]
    suffixes = [json.dumps({"reference_path": path, "mask_strategy": "0"}) for path in paths]
    backbones: list[OpenSora] = []
    load = OpenSora.load
    with mock.patch.object(OpenSora, "load", lambda self: (load(self), backbones.append(self))[0]):
        sample(folder, [caption + suffix for caption, suffix in zip(captions, suffixes, strict=True)], *flags)
    vae = backbones[0].vae
    with torch.no_grad():
        pixels = torch.stack([read_from_path(path, (world.SIDE, world.SIDE)) for path in paths])
        seen_by_vae = vae.decode(vae.encode(pixels), num_frames=1)
    made = torch.stack([clip[:, :1] for clip in videos(folder)])
    return {
        "first_frame_against_vae_reconstruction_dB": round(psnr(made, seen_by_vae), 2),
        "first_frame_against_picture_dB": round(psnr(made, pixels), 2),
        "vae_reconstruction_against_picture_dB": round(psnr(seen_by_vae, pixels), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--loop", type=int, default=4)
    parser.add_argument("--condition-frame-length", type=int, default=2)
    own, flags = parser.parse_known_args()
    if own.prompts < 1 or own.loop < 2:
        parser.error(f"got --prompts {own.prompts} --loop {own.loop}; give at least 1 prompt and 2 clips")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("long", "picture"):
            (Path(folder) / name).mkdir()
        result = long_videos(Path(folder) / "long", own.prompts, own.loop, own.condition_frame_length, flags)
        result |= picture_conditioning(Path(folder) / "picture", min(own.prompts, 32), flags)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
