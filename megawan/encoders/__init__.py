"""Thin wrappers of the encoders that turn pixels and captions into latents and text features."""
