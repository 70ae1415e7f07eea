"""Train a LoRA adapter for Wan 2.1 T2V 1.3B at 480p by reward gradient; docs/families/wan.md has the details."""

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
dtype = "bf16"

prompt_path = "{{fileDirname}}/../../assets/prompts/animals.txt"

is_vader_training = True
reward_fn = "hps"
hps_version = "v2.1"
lr = 1e-4
lora_rank = 32
lora_alpha = 32
train_batch_size = 1
gradient_accumulation_steps = 8
max_train_steps = 400
mixed_precision = "bf16"
backprop_mode = "last"
backprop_steps = 1
decode_frame = -1
decode_context = "causal"

project_dir = "runs/wan_t2v_1_3b"
validation_steps = 20
checkpointing_steps = 50
