"""Train a LoRA adapter for LTX-Video 2B by reward gradient; docs/families/ltx.md has the details."""

backbone = "ltx"
model_path = "Lightricks/LTX-Video"
resolution = "512p"
aspect_ratio = "2:3"
num_frames = "4s"
fps = 24
num_sampling_steps = 50
guidance_scale = 3.0
negative_prompt = "worst quality, inconsistent motion, blurry, jittery, distorted"
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
decode_context = "whole"

project_dir = "runs/ltx_video"
validation_steps = 20
checkpointing_steps = 50
