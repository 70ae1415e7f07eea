"""The quickstart: the demo with the settings that learned most; docs/quickstart.md compares some."""

_base_ = ["./vader_demo.py"]

lora_targets = ["qkv", "q_linear", "kv_linear", "proj", "fc1", "fc2"]
# Of the 12 sampling steps the last alone keeps a graph, and four stand for the eleven before it.
prefix_steps = 4
backprop_steps = 1
max_train_steps = 120
validation_steps = 40

project_dir = "runs/quickstart"
