"""Train a LoRA adapter for HunyuanVideo 1.5 at 480p by reward gradient; see docs/families/hunyuan_video15.md."""

_base_ = "../training.py"

backbone = "hunyuan_video15"
model_path = "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"
resolution = "480p"
aspect_ratio = "9:16"
num_frames = 121
fps = 24
shift = 5.0
num_sampling_steps = 50
guidance_scale = 6.0

lr = 5e-5
decode_context = "isolated"
project_dir = "runs/hunyuan_video15_480p"
