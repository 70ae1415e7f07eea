"""Train a LoRA adapter for Wan 2.1 T2V 1.3B at 480p by reward gradient; docs/families/wan.md has the details."""

_base_ = "../training.py"

backbone = "wan"
model_path = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
resolution = "480p"
aspect_ratio = "9:16"
num_frames = "5s"
fps = 16
shift = 3.0
schedule = "unipc"
num_sampling_steps = 30
guidance_scale = 5.0
negative_prompt = (
    "blurred, overexposed, static, worst quality, low quality, jpeg artifacts, deformed, subtitles"
)

decode_context = "causal"
# Copies the inputs of all blocks to the CPU's memory and back, predicted about 1% of a step at 25 GB/s. They take 5 GiB
# of it for each gradient step, video of a batch and process, and 25 GiB with the 14B model.
activation_offloading = True
project_dir = "runs/wan_t2v_1_3b"
