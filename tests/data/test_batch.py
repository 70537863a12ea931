"""A batch on its way to the device."""

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from megawan.data.batch import Batch


@pytest.mark.parametrize("image", [False, True])
def test_torchs_loader_pins_what_goes_to_the_gpu(image: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes over objects without a method of that name, and says nothing."""
    pinned: dict[int, Tensor] = {}

    def pin(x: Tensor) -> Tensor:
        pinned[id(x)] = x.clone()
        return pinned[id(x)]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    features = torch.zeros(2, 3), torch.ones(2, 4), torch.full((2, 5), 2.0), torch.full((2, 6), 3.0)
    latents, text, clip, condition = features if image else (*features[:2], None, None)
    batch = Batch(
        latents, text, torch.tensor([4, 5]), torch.tensor([0, 1]), ("a", "b"), clip, condition, imbalance=1.5
    )
    found: Batch = pin_memory(batch)
    for name in ("latents", "text", "clip", "condition"):
        before, after = getattr(batch, name), getattr(found, name)
        assert after is (None if before is None else pinned[id(before)]), name
    assert len(pinned) == (4 if image else 2)
    assert found.sample_ids is batch.sample_ids and found.epochs is batch.epochs
    assert (found.prompts, found.imbalance) == (("a", "b"), 1.5)
