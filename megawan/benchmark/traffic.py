"""Bytes that operations between products read and write, counted instead of timed: what a fused kernel saves,
whatever else the machine does."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megawan.benchmark.profiling import is_product


def moved_bytes(step: Callable[[], object]) -> int:
    """Return the bytes that the operations of `step` other than matrix products and attentions read and
    write: each operand once, views nothing, what a broadcast repeats once. A kernel that reads an operand
    twice counts as one reading; of compiled code `compiled_bytes` knows."""
    with _Counter() as counter:
        step()
    return counter.bytes


def compiled_bytes(step: Callable[[], object]) -> int:
    """Return the bytes that the kernels of `step`'s compiled code other than products and attentions read and
    write, by the compiler's own account: each operand of a kernel once.

    A graph counts once, however often it runs: of a model of equal blocks this is one block. Compiles anew.
    """
    from torch._inductor import metrics  # seconds that an eager measurement does not wait for
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    # The account is drawn up where this logger speaks; nobody reads it there.
    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    before = log.level, log.propagate
    torch.compiler.reset()
    metrics.reset()
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with (
            warnings.catch_warnings(),
            torch.compiler.config.patch(force_disable_caches=True),  # type: ignore[attr-defined]
        ):
            warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
            step()
        # In units of four bytes.
        parts = [
            4 * n for node, n in metrics.nodes_num_elem if not isinstance(node, ExternKernelSchedulerNode)
        ]
    finally:
        log.setLevel(before[0])
        log.propagate = before[1]
        metrics.reset()
    return sum(parts)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operation and count what it touched."""
        out = operation(*args, **(kwargs or {}))
        name = str(operation).partition(".")[2].partition(".")[0]
        schema = operation._schema
        view = operation.is_view or name in ("_unsafe_view", "detach", "empty", "empty_like", "new_empty")
        if view or is_product(name):
            return out
        given = zip([a.name for a in schema.arguments], args, strict=False)
        for key, value in [*given, *(kwargs or {}).items()]:
            info = next(a.alias_info for a in schema.arguments if a.name == key)
            written = info is not None and info.is_write
            only_written = written and (key == "out" or name in ("copy_", "fill_", "zero_"))
            for x in tree_leaves(value):
                if isinstance(x, Tensor):
                    self.bytes += _size(x) * ((not only_written) + written)
        for result, x in zip(schema.returns, out if isinstance(out, tuple | list) else (out,), strict=False):
            if isinstance(x, Tensor) and result.alias_info is None:
                self.bytes += _size(x)
        return out


def _size(x: Tensor) -> int:
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.itemsize
