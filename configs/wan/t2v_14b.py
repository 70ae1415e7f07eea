"""Wan 2.1 T2V 14B at 480p."""

_base_ = "t2v_1_3b.py"

model_path = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
lr = 5e-5
project_dir = "runs/wan_t2v_14b"
