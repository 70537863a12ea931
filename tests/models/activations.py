"""What a forward pass keeps for the backward pass, counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megawan.models.recompute import Slot


def kept_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Return the bytes of the unique storages that autograd and the policies' slots hold after `call`.

    The model's parameters are not counted.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address would be counted once for two

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # with its history it would keep the graph that keeps it

    with noted_slots(note), saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    del result
    return sum(sizes.values())


@contextmanager
def noted_slots(note: Callable[[Tensor], object]) -> Iterator[None]:
    """While it is entered, every tensor that a policy keeps is noted."""
    write = Slot.write

    def noted(slot: Slot, *tensors: Tensor) -> None:
        for tensor in tensors:
            note(tensor)
        write(slot, *tensors)

    with mock.patch.object(Slot, "write", noted):
        yield
