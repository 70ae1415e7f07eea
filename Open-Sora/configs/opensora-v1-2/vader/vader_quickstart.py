"""The quickstart: the demo with settings that learn more in the same time; docs/quickstart.md compares some."""

_base_ = ["./vader_demo.py"]

lora_targets = ["qkv", "q_linear", "kv_linear", "proj", "fc1", "fc2"]
# Of the 12 sampling steps the last alone keeps a graph, and four stand for the eleven before it.
prefix_steps = 4
backprop_steps = 1
max_train_steps = 96  # they take as long as the demo's
validation_steps = 48

project_dir = "runs/quickstart"
