from .vae import VideoAutoencoderKL, VideoAutoencoderPipeline
from .vae_temporal import VAE_Temporal
