"""Train a LoRA adapter for CogVideoX-2B by reward gradient; docs/families/cogvideox.md has the details."""

_base_ = "../training.py"

backbone = "cogvideox"
model_path = "THUDM/CogVideoX-2b"
resolution = "480p"
aspect_ratio = "2:3"
num_frames = "6s"
fps = 8
num_sampling_steps = 50
guidance_scale = 6.0

decode_context = "causal"
project_dir = "runs/cogvideox_2b"
