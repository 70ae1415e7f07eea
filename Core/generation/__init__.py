"""Videos from prompts without gradients, and adapters in other formats."""
