"""What the configs of the model families share: start yours with `_base_ = "../training.py"` too."""

dtype = "bf16"
prompt_path = "{{fileDirname}}/../assets/prompts/animals.txt"

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

validation_steps = 20
checkpointing_steps = 50
