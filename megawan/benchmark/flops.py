"""FLOPs that really run, by torch's counter."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def counted_flops(step: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products that `step` runs; an attention's backward counts 5 products.

    Of compiled code nothing is counted: give the eager twin.
    """
    ops = torch.ops.aten
    # torch 2.13 has no formula for its CPU kernel and counts it as nothing.
    cpu = {
        ops._scaled_dot_product_flash_attention_for_cpu: _forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        step()
    return int(counter.get_total_flops())


# The operators' own arguments, of which the counter gives shapes.
def _forward(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: Any = None,
    out_shape: Any = None,
) -> int:
    return int(sdpa_flop_count(q, k, v))


def _backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    logsumexp: Any,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Any = None,
    scale: Any = None,
    out_shape: Any = None,
) -> int:
    return int(sdpa_backward_flop_count(dout, q, k, v))
