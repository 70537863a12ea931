"""Tests that need a CUDA device: `python -m pytest -m gpu tests/gpu`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("torch sees no CUDA device; these tests run on a GPU only")
