"""Wan 2.2 I2V A14B at 480p: every prompt names its first frame, see docs/families/wan.md."""

_base_ = "t2v_a14b.py"

model_path = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
shift = 5.0
guidance_scale = 3.5
guidance_scale_2 = 3.5
project_dir = "runs/wan_i2v_a14b"
