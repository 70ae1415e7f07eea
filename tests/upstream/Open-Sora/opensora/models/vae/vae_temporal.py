import torch.nn as nn
import torch.nn.functional as F

from opensora.registry import MODELS


class Posterior:
    def __init__(self, mean):
        self.mean = mean

    def mode(self):
        return self.mean

    sample = mode


@MODELS.register_module()
class VAE_Temporal(nn.Module):
    def __init__(self, from_pretrained=None, out_channels=4):
        super().__init__()
        self.out_channels = out_channels
        self.time_downsample_factor = 4
        self.mix = nn.Conv3d(out_channels, out_channels, 1)

    def get_latent_size(self, input_size):
        frames = input_size[0]
        return [None if frames is None else -(-frames // self.time_downsample_factor), *input_size[1:]]

    def encode(self, x):
        front = -x.shape[2] % self.time_downsample_factor
        return Posterior(self.mix(F.avg_pool3d(F.pad(x, (0, 0, 0, 0, front, 0)), (4, 1, 1))))

    def decode(self, z, num_frames=None):
        x = self.mix(z).repeat_interleave(self.time_downsample_factor, dim=2)
        return x[:, :, x.shape[2] - num_frames :]


@MODELS.register_module("VAE_Temporal_SD")
def VAE_Temporal_SD(from_pretrained=None, **kwargs):
    return VAE_Temporal(from_pretrained, **kwargs)
