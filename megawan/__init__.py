"""MegaWan: full finetuning of Wan video diffusion transformers with context parallelism and ZeRO."""

__version__ = "0.1.0"
