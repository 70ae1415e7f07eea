"""Train a LoRA adapter for ModelScope 1.7B at 256×256 by reward gradient; see docs/families/modelscope.md."""

_base_ = "../training.py"

backbone = "modelscope"
model_path = "damo-vilab/text-to-video-ms-1.7b"
resolution = "256p"
aspect_ratio = "1:1"
num_frames = 16
fps = 8
num_sampling_steps = 50
guidance_scale = 9.0

lora_rank = 16
lora_alpha = 16
decode_context = "isolated"
project_dir = "runs/modelscope"
