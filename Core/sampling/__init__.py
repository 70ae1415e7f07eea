"""From noise to a latent: the Euler loop, its gradient window, the frames to decode."""
