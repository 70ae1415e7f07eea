"""Train a LoRA adapter for Open-Sora 1.2 by reward gradient; docs/options.md describes every key."""

resolution = "240p"
aspect_ratio = "3:4"
num_frames = "2s"
fps = 24
frame_interval = 1
save_fps = 24
multi_resolution = "STDiT2"
condition_frame_length = 5
align = 5
aes = 6.5
flow = None

model = dict(
    type="STDiT3-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v3",
    qk_norm=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    num_sampling_steps=30,
    cfg_scale=7.0,
)
dtype = "bf16"

prompt_path = "{{fileDirname}}/../../../../assets/prompts/animals.txt"

is_vader_training = True
reward_fn = "hps"
hps_version = "v2.1"
lr = 2e-4
train_batch_size = 1
gradient_accumulation_steps = 8
num_train_epochs = 200
max_train_steps = 800
max_grad_norm = 1.0
lora_rank = 16
backprop_mode = "last"
decode_frame = -1
grad_checkpoint = True
mixed_precision = "bf16"
use_AdamW8bit = False
seed = 200

project_dir = "runs/vader"
validation_steps = 10
checkpointing_steps = 50
val_batch_size = 1
num_val_runs = 2
is_sample_preview = False
logger_type = "wandb"
use_wandb = False
