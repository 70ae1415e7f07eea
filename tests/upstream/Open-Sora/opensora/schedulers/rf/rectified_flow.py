import torch


def timestep_transform(
    t, model_kwargs, base_resolution=512 * 512, base_num_frames=1, scale=1.0, num_timesteps=1
):
    info = model_kwargs
    latent_frames = torch.where(info["num_frames"] == 1, 1, info["num_frames"] // 17 * 5)
    area = info["height"] * info["width"] / base_resolution
    r = area.sqrt() * (latent_frames / base_num_frames).sqrt() * scale
    return r * t / (1 + (r - 1) * t / num_timesteps)


class RFlowScheduler:
    def __init__(
        self,
        num_timesteps=1000,
        num_sampling_steps=10,
        use_discrete_timesteps=False,
        sample_method="uniform",
        loc=0.0,
        scale=1.0,
        use_timestep_transform=False,
        transform_scale=1.0,
    ):
        self.num_timesteps = num_timesteps
        self.sample_method = sample_method

    def training_losses(self, model, x_start, model_kwargs=None, noise=None, mask=None, weights=None, t=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.add_noise(x_start, noise, t)
        velocity = model(x_t, t, **model_kwargs).chunk(2, dim=1)[0]
        return {"loss": (velocity - (x_start - noise)).pow(2).mean(dim=(1, 2, 3, 4))}

    def add_noise(self, original_samples, noise, timesteps):
        share = 1 - timesteps.float()[:, None, None, None, None] / self.num_timesteps
        return share * original_samples + (1 - share) * noise
