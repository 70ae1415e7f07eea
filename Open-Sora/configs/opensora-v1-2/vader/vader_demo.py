"""The demo: a small Open-Sora of the same classes and a small PickScore; an adapter takes minutes on a CPU.

Replaces the sizes, paths and training settings of vader_train.py; docs/learning-study.md compares gradient windows.
"""

_base_ = ["./vader_train.py"]

image_size = (64, 64)
num_frames = 17
aes = None

model = dict(from_pretrained="{{fileDirname}}/../../../../assets/demo/stdit")
vae = dict(from_pretrained="{{fileDirname}}/../../../../assets/demo/vae", micro_batch_size=64)
text_encoder = dict(from_pretrained="{{fileDirname}}/../../../../assets/demo/t5", model_max_length=32)
scheduler = dict(num_sampling_steps=12, cfg_scale=1.75, use_timestep_transform=False)
dtype = "fp32"
mixed_precision = "no"

prompt_path = "{{fileDirname}}/../../../../assets/demo/prompts_train.txt"
val_prompt_path = "{{fileDirname}}/../../../../assets/demo/prompts_heldout.txt"
reward_fn = "pick_score"
reward_args = dict(model="{{fileDirname}}/../../../../assets/demo/clip")

lr = 1e-3
lora_alpha = 16
backprop_steps = 3
decode_frame = "fml"
train_batch_size = 8
gradient_accumulation_steps = 1
max_train_steps = 60
grad_checkpoint = False

project_dir = "runs/demo"
validation_steps = 20
checkpointing_steps = 20
val_batch_size = 16
num_val_runs = 1
