"""Train a LoRA adapter for HunyuanVideo 1.5 at 480p by reward gradient; see docs/families/hunyuan_video15.md."""

backbone = "hunyuan_video15"
model_path = "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"
resolution = "480p"
aspect_ratio = "9:16"
num_frames = 121
fps = 24
shift = 5.0
num_sampling_steps = 50
guidance_scale = 6.0
dtype = "bf16"

prompt_path = "{{fileDirname}}/../../assets/prompts/animals.txt"

is_vader_training = True
reward_fn = "hps"
hps_version = "v2.1"
lr = 5e-5
lora_rank = 32
lora_alpha = 32
train_batch_size = 1
gradient_accumulation_steps = 8
max_train_steps = 400
backprop_mode = "last"
decode_frame = -1
decode_context = "isolated"
grad_checkpoint = True
mixed_precision = "bf16"
seed = 200

project_dir = "runs/hunyuan_video15_480p"
validation_steps = 20
checkpointing_steps = 50
