"""Changes to a network: LoRA, quantised storage, frozen convolutions."""
