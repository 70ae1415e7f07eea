"""The formats an adapter can be written in, see ``Core.generation.export``. Imports nothing that takes time."""

FORMATS = ("peft", "safetensors", "diffusers", "comfyui", "kohya", "merged", "hub")
