"""From manifest and media files to latent stores and batches."""
