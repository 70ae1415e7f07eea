"""A training run: build, sample with a gradient, score, step, save, resume."""
