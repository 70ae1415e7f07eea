"""Wan 2.2 T2V A14B at 480p; the window of the last steps reaches the low-noise expert."""

_base_ = "t2v_14b.py"

model_path = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
shift = 12.0
guidance_scale = 4.0
guidance_scale_2 = 3.0
train_experts = "low_noise"
project_dir = "runs/wan_t2v_a14b"
