"""Prompts, prompt embeddings and video files."""
