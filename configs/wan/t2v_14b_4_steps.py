"""Wan 2.1 T2V 14B on a step-distilled base: 4 passes of the denoiser a video instead of 60.

`base_adapters` names the distillation's LoRA file, which you download first; such files are published for this model by
lightx2v, among others. Steps, shift and guidance are those it was distilled for: its page says them. Use the same
`base_adapters` wherever the trained adapter is used.
"""

_base_ = "t2v_14b.py"

base_adapters = [dict(path="loras/wan_t2v_14b_4_steps.safetensors", strength=1.0)]
num_sampling_steps = 4
shift = 5.0
guidance_scale = 1.0
negative_prompt = ""

project_dir = "runs/wan_t2v_14b_4_steps"
