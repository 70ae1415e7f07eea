"""The demo world: captioned videos of moving shapes, an oracle that reads them, and the pretraining of its models."""
