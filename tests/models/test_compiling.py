"""What is compiled is compiled for every size."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megawan.models.compiling import compile_each_size


def test_every_size_gets_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the ninth, at which torch would go on uncompiled, with and without a gradient, and in a thread of
    its own, as a GPU's backward pass has."""
    made: list[tuple[int, ...]] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        made.append(tuple(inputs[0].shape))
        return graph.forward

    def double(x: Tensor) -> Tensor:
        return 2 * x

    def double_all() -> None:
        for length in range(2, 14):
            x = torch.ones(length, requires_grad=True)
            assert torch.equal(torch.autograd.grad(function(x).sum(), x)[0], torch.full((length,), 2.0))
            with torch.no_grad():
                assert torch.equal(function(x), torch.full((length,), 2.0))

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    function = compile_each_size(double)
    with ThreadPoolExecutor(1) as other:
        other.submit(double_all).result()
    assert made == [(length,) for length in range(2, 14) for _ in ("with a gradient", "without")]
    double_all()
    assert len(made) == 24
