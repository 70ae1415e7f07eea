"""Generate videos with Open-Sora 1.2 and an adapter: set lora_ckpt_path here or with --lora-ckpt-path."""

_base_ = ["./vader_train.py"]

is_vader_training = False
lora_ckpt_path = None
num_sample = 1
val_batch_size = 1
project_dir = "runs/inference"
