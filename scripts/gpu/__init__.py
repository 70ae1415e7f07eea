"""What scripts/gpu/prove.py is made of."""
