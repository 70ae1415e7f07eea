from .vae import (
    OpenSoraVAE_V1_2,
    VideoAutoencoderKL,
    VideoAutoencoderPipeline,
    VideoAutoencoderPipelineConfig,
)
from .vae_temporal import VAE_Temporal

__all__ = [
    "OpenSoraVAE_V1_2",
    "VAE_Temporal",
    "VideoAutoencoderKL",
    "VideoAutoencoderPipeline",
    "VideoAutoencoderPipelineConfig",
]
