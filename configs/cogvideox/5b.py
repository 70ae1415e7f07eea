"""Train a LoRA adapter for CogVideoX-5B by reward gradient."""

_base_ = "2b.py"

model_path = "THUDM/CogVideoX-5b"
project_dir = "runs/cogvideox_5b"
