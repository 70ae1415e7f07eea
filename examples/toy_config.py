"""Train the toy family towards daylight: python examples/toy_backbone.py examples/toy_config.py."""

backbone = "toy"
palette = "{{fileDirname}}/palette.safetensors"
sampling_steps = 8
image_size = (64, 64)
num_frames = 9
dtype = "fp32"
mixed_precision = "no"

prompt_path = "{{fileDirname}}/../assets/demo/prompts_train.txt"
reward_fn = "{{fileDirname}}/../docs/my_reward.py:Daylight"

lr = 1e-2
train_batch_size = 8
gradient_accumulation_steps = 1
max_train_steps = 30
validation_steps = 30
val_batch_size = 4
project_dir = "runs/toy"
