"""What a run will need, without its weights: a training step on tensors without content, and what cards can hold."""
