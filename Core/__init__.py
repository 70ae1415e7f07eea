"""Reward-gradient alignment of text-to-video diffusion models."""
