"""The Wan diffusion transformer: variants, forward, checkpoint layouts."""
