"""Stages ``vae2d``, ``vae3d``, ``latents`` and ``decoder``: the demo's video VAE, with Open-Sora 1.2's classes."""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from opensora.models.vae.vae import VideoAutoencoderPipeline, VideoAutoencoderPipelineConfig
from scripts.demo import world
from scripts.demo.common import SEED, WORK, draw_frames, fit, log, near_shape, psnr, save, to_pixels

SPATIAL = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[16, 32, 64, 64],
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=64,
    scaling_factor=0.18215,
)
KL_WEIGHT = 1e-7
TEMPORAL = dict(filters=16, num_res_blocks=1, channel_multipliers=(1, 2, 2, 4), num_groups=8)
CLIPS = 3072  # videos whose latents are kept for later stages
LATENT_NOISE = 0.1  # of the latent's own spread, so that slightly wrong latents decode well too
DECODER_NOISE = 0.05


def pixel_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 of images ``[B, 3, H, W]``, weighted four times higher on and around the shape."""
    error = decoded - target
    return ((1 + 3 * near_shape(target)) * (error.abs() + error.pow(2))).mean()


def train_spatial() -> AutoencoderKL:
    """Fit the 2-D autoencoder on single frames; returns it in eval mode."""
    torch.manual_seed(0)
    model = AutoencoderKL(**SPATIAL).to(memory_format=torch.channels_last)

    def loss_fn(rng):
        frames = draw_frames(rng, 16).contiguous(memory_format=torch.channels_last)
        posterior = model.encode(frames).latent_dist
        decoded = model.decode(posterior.sample()).sample
        loss = pixel_loss(decoded, frames) + KL_WEIGHT * posterior.kl().mean()
        return loss, {"psnr": psnr(decoded.detach(), frames), "std": float(posterior.mean.detach().std())}

    fit("vae2d", model, loss_fn, steps=1500, lr=2e-3)
    return model.eval()


def assemble(spatial: AutoencoderKL, shift=0.0, scale=1.0) -> VideoAutoencoderPipeline:
    """The full video VAE with a trained spatial part and a new temporal part."""
    torch.manual_seed(1)
    config = VideoAutoencoderPipelineConfig(
        vae_2d=dict(type="VideoAutoencoderKL", config=SPATIAL, micro_batch_size=None),
        vae_temporal=dict(type="VAE_Temporal", **TEMPORAL),
        micro_frame_size=world.FRAMES,
        shift=shift,
        scale=scale,
    )
    vae = VideoAutoencoderPipeline(config)
    vae.spatial_vae.module.load_state_dict(spatial.state_dict())
    return vae


@torch.no_grad()
def spatial_latents(spatial: AutoencoderKL) -> Tensor:
    """Scaled latents of the frames of ``CLIPS`` training scenes, ``[N, 4, T, 8, 8]``; kept on disk.

    Scene ``i`` is ``world.scene(SEED, i)``.
    """
    path = WORK / "spatial_latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    parts, begun = [], time.time()
    for i in range(CLIPS):
        frames = to_pixels(world.render(world.scene(SEED, i))).contiguous(memory_format=torch.channels_last)
        parts.append(spatial.encode(frames).latent_dist.mode() * spatial.config.scaling_factor)
        if (i + 1) % 512 == 0:
            log("latents", f"{i + 1}/{CLIPS} videos  {time.time() - begun:.0f} s")
    latents = torch.stack(parts).transpose(1, 2).contiguous()
    save(latents, path)
    return latents


def train_temporal() -> VideoAutoencoderPipeline:
    """Fit the temporal VAE on latents of whole clips and on single latent frames decoded alone."""
    spatial = train_spatial().requires_grad_(False)
    latents = spatial_latents(spatial)
    vae = assemble(spatial)
    temporal, spread = vae.temporal_vae, latents.std((0, 2, 3, 4), keepdim=True)

    def latent_loss(decoded: Tensor, target: Tensor) -> Tensor:
        error = (decoded - target) / spread
        return (error.abs() + error.pow(2)).mean()

    def loss_fn(rng):
        clips = latents[torch.from_numpy(rng.integers(len(latents), size=8))]
        posterior = temporal.encode(clips)
        z = posterior.mode()
        z = z + LATENT_NOISE * z.detach().std((0, 2, 3, 4), keepdim=True) * torch.randn_like(z)
        whole = temporal.decode(z, num_frames=world.FRAMES)
        k = int(rng.integers(z.shape[2]))
        alone, single = temporal.decode(z[:, :, k : k + 1], num_frames=1), clips[:, :, 4 * k : 4 * k + 1]
        f = int(rng.integers(world.FRAMES))
        shown = torch.cat([alone[:4, :, 0], whole[:4, :, f]])
        wanted = torch.cat([single[:4, :, 0], clips[:4, :, f]])
        pixels, target = (decode_frames(spatial, x) for x in (shown, wanted))
        loss = latent_loss(whole, clips) + 0.5 * latent_loss(alone, single) + pixel_loss(pixels, target)
        figures = {
            "alone": psnr(pixels[:4].detach(), target[:4]),
            "whole": psnr(pixels[4:].detach(), target[4:]),
        }
        return loss + KL_WEIGHT * posterior.kl().mean(), figures

    fit("vae3d", temporal, loss_fn, steps=1000, lr=2e-3)
    return vae.eval()


def decode_frames(spatial: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents ``[B, 4, 8, 8]`` → pixels ``[B, 3, 64, 64]``."""
    raw = latents / spatial.config.scaling_factor
    return spatial.decode(raw.contiguous(memory_format=torch.channels_last)).sample


@torch.no_grad()
def normalised_latents() -> tuple[Tensor, list[float], list[float]]:
    """Latents of the training clips ``[N, 4, 5, 8, 8]`` with unit spread, and the VAE's shift and scale.

    Row ``i`` is ``world.scene(SEED, i)``; kept on disk.
    """
    path = WORK / "latents.pt"
    if not path.exists():
        pipeline = train_temporal()
        spatial = spatial_latents(pipeline.spatial_vae.module)
        raw = torch.cat([pipeline.temporal_vae.encode(part).mode() for part in spatial.split(32)])
        axes = (0, 2, 3, 4)
        shift, scale = raw.mean(axes), raw.std(axes)
        normal = (raw - shift.view(1, -1, 1, 1, 1)) / scale.view(1, -1, 1, 1, 1)
        save({"latents": normal, "shift": shift, "scale": scale}, path)
    saved = torch.load(path, weights_only=True)
    return saved["latents"], saved["shift"].tolist(), saved["scale"].tolist()


def train_decoder() -> VideoAutoencoderPipeline:
    """Fit both decoders jointly on pixels, with frozen encoders so that latents stay fixed; return the finished VAE."""
    trained = train_temporal()
    latents, shift, scale = normalised_latents()
    vae = assemble(trained.spatial_vae.module, shift, scale)
    vae.temporal_vae.load_state_dict(trained.temporal_vae.state_dict())
    spatial, temporal = vae.spatial_vae.module.to(memory_format=torch.channels_last), vae.temporal_vae
    for encoder in (spatial.encoder, spatial.quant_conv, temporal.encoder, temporal.quant_conv):
        encoder.requires_grad_(False)

    def loss_fn(rng):
        rows = rng.integers(len(latents), size=6)
        z = latents[torch.from_numpy(rows)]
        raw = (z + DECODER_NOISE * torch.randn_like(z)) * vae.scale + vae.shift
        k, frames = int(rng.integers(z.shape[2])), rng.integers(world.FRAMES, size=2).tolist()
        whole = temporal.decode(raw, num_frames=world.FRAMES)
        alone = temporal.decode(raw[:, :, k : k + 1], num_frames=1)
        shown = torch.cat([alone[:, :, 0], *(whole[:, :, f] for f in frames)])
        truth = np.stack([world.render(world.scene(SEED, int(i)), [4 * k, *frames]) for i in rows])
        target = to_pixels(truth).transpose(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        pixels = decode_frames(spatial, shown)
        figures = {
            "alone": psnr(pixels[:6].detach(), target[:6]),
            "whole": psnr(pixels[6:].detach(), target[6:]),
        }
        return pixel_loss(pixels, target), figures

    fit("decoder", vae, loss_fn, steps=500, lr=1.5e-3, save_every=100)
    return vae.eval()


def export(folder: Path) -> None:
    """Save the VAE in the Hub's layout, in half precision."""
    train_decoder().half().save_pretrained(folder)
