"""How a model's functions are compiled: a graph for each size."""

from collections.abc import Callable
from typing import Any

import torch


def compile_each_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled, with a graph for each size of its inputs; it takes them by position.

    One graph for all sizes could replace the others between a forward pass and its recomputation. A function
    of a block needs a graph for each video size, policy, and with and without gradients; torch would run what
    comes after the eighth uncompiled, so its limit is raised to the one on all graphs of a function (256).
    """
    from torch._dynamo import config  # two seconds that a model which compiles nothing does not wait for

    graphs = torch.compile(function, dynamic=False)

    def call(*inputs: object) -> Any:
        # Here, since each thread has its own settings, and a GPU's backward pass its own threads.
        if config.recompile_limit != config.accumulated_recompile_limit:
            config.recompile_limit = config.accumulated_recompile_limit
        return graphs(*inputs)

    return call
