"""Wan 2.2 TI2V-5B at 704p, 24 frames per second; a prompt may name a first frame."""

_base_ = "t2v_1_3b.py"

model_path = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
resolution = "704p"
fps = 24
shift = 5.0
project_dir = "runs/wan_ti2v_5b"
