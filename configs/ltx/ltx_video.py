"""Train a LoRA adapter for LTX-Video 2B by reward gradient; docs/families/ltx.md has the details."""

_base_ = "../training.py"

backbone = "ltx"
model_path = "Lightricks/LTX-Video"
resolution = "512p"
aspect_ratio = "2:3"
num_frames = "4s"
fps = 24
num_sampling_steps = 50
guidance_scale = 3.0
negative_prompt = "worst quality, inconsistent motion, blurry, jittery, distorted"

decode_context = "whole"
project_dir = "runs/ltx_video"
