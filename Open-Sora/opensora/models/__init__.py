"""Networks of Open-Sora 1.2; importing this package registers all of them."""

from . import stdit, text_encoder, vae

__all__ = ["stdit", "text_encoder", "vae"]
