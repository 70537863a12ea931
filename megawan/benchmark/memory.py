"""How much memory a step needs: what is kept for the backward pass, and the peak."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from megawan.models.recompute import Slot


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Return the bytes of the unique storages that are kept between the forward and the backward pass of
    `loss`: autograd's saved tensors and our policies' slots. Parameters are not counted."""
    gc.collect()
    # Neither what an earlier graph still keeps.
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    earlier = _in_slots()
    elsewhere = {x.untyped_storage().data_ptr() for x in earlier}
    alive: list[Tensor] = []  # a freed storage's address would be counted once for two

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor.detach())
        return alive[-1]  # with its history it would keep the graph that keeps it

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = loss()
    alive += _in_slots()
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    del result
    return sum(size for place, size in sizes.items() if place not in parameters | elsewhere)


def _in_slots() -> list[Tensor]:
    """Return the tensors that slots of our recompute policies hold now."""
    slots = [each for each in gc.get_objects() if type(each) is Slot]  # isinstance asks dead proxies
    return [x if isinstance(x, Tensor) else x[0] for slot in slots for x in slot.held or ()]


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return by how much the allocated memory of `device` rose at most during `step`: activations and
    gradients, without weights.

    On CPUs the profiler's record of torch's allocations is added up; on GPUs the allocator knows.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
        step()
    assert allocations.profiler is not None and allocations.profiler.kineto_results is not None
    events = [e for e in allocations.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
