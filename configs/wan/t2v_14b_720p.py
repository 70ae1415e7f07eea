"""Wan 2.1 T2V 14B at 720p, decoded in tiles."""

_base_ = "t2v_14b.py"

resolution = "720p"
shift = 5.0
vae_tiling = True
project_dir = "runs/wan_t2v_14b_720p"
