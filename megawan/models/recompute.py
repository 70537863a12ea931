"""What the backward pass recomputes instead of keeping: a policy per block, chosen by name."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEGAL = "none, full, full:K (recompute the first K blocks)"


@dataclass(frozen=True)
class Recompute:
    """`policy` is applied to the first `blocks` blocks, the others keep everything."""

    policy: Literal["none", "full"]
    blocks: int

    def run(self, index: int, block: nn.Module, *inputs: object) -> Tensor:
        """Return block(*inputs), keeping for the backward pass what the policy keeps of block `index`."""
        if index >= self.blocks or self.policy == "none":
            return block(*inputs)  # type: ignore[no-any-return]
        # The block is called as a module so that ZeRO-3's hooks gather its weights in the recomputation too;
        # nothing in it draws random numbers, so there is no generator state to keep.
        kept: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return kept


def parse_recompute(text: str, num_layers: int) -> Recompute:
    """Return the policy that `text` names for `num_layers` blocks; else ValueError with the legal forms."""
    policy, colon, count = text.partition(":")
    if text == "none":
        return Recompute("none", 0)
    if policy == "full" and not colon:
        return Recompute("full", num_layers)
    if policy == "full" and count.isdecimal() and int(count) <= num_layers:
        return Recompute("full", int(count))
    raise ValueError(
        f"recompute {text!r} is not legal for {num_layers} blocks; legal: {LEGAL}, K from 0 to {num_layers}"
    )
