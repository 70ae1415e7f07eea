"""HunyuanVideo 1.5 at 720p, decoded in tiles."""

_base_ = "t2v_480p.py"

model_path = "hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v"
resolution = "720p"
shift = 9.0
vae_tiling = True
project_dir = "runs/hunyuan_video15_720p"
