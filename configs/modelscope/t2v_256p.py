"""Train a LoRA adapter for ModelScope 1.7B at 256×256 by reward gradient; see docs/families/modelscope.md."""

backbone = "modelscope"
model_path = "damo-vilab/text-to-video-ms-1.7b"
resolution = "256p"
aspect_ratio = "1:1"
num_frames = 16
fps = 8
num_sampling_steps = 50
guidance_scale = 9.0
dtype = "bf16"

prompt_path = "{{fileDirname}}/../../assets/prompts/animals.txt"

is_vader_training = True
reward_fn = "hps"
hps_version = "v2.1"
lr = 1e-4
lora_rank = 16
lora_alpha = 16
train_batch_size = 1
gradient_accumulation_steps = 8
max_train_steps = 400
backprop_mode = "last"
decode_frame = -1
decode_context = "isolated"
grad_checkpoint = True
mixed_precision = "bf16"
seed = 200

project_dir = "runs/modelscope"
validation_steps = 20
checkpointing_steps = 50
