"""Wan 2.2 I2V A14B at 480p: each prompt names the picture that its video begins with.

The prompt file is yours, a line per video such as
`a fox wakes up and stretches {"reference_path": "pictures/fox.png"}`.
"""

_base_ = "t2v_a14b.py"

model_path = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
prompt_path = "pictures/prompts.txt"
shift = 5.0
guidance_scale = 3.5
guidance_scale_2 = 3.5
project_dir = "runs/wan_i2v_a14b"
