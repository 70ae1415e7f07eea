"""Reward-gradient alignment of text-to-video diffusion models."""

import logging

# On import it warns that an optional CPU kernel of its own is missing, which concerns nobody here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
