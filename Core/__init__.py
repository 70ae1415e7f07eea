"""Reward-gradient alignment of text-to-video diffusion models."""

import logging

__version__ = "0.1.0"  # of the wheel too, see pyproject.toml

# On import it warns that an optional CPU kernel of its own is missing, which concerns nobody here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
