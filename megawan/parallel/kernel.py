"""What context parallelism asks of an attention kernel."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class AttentionKernel(Protocol):
    """Unmasked attention softmax(q·kᵀ/√K)·v on [B, L, N, K], with the log-sum-exp that a ring needs."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, Lq, N, K] from q [B, Lq, N, K] and k, v [B, Lk, N, K], differentiably."""
        ...

    def forward_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse), lse = log Σ_k exp(q·k/√K) [B, N, Lq] in float32 (float64 for float64)."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of q against these keys, where out and lse may belong to a longer row of keys.

        P = exp(q·kᵀ/√K − lse) and Σ dout·out then come from the whole row, so that the parts add up to the
        gradient of the whole attention.
        """
        ...


class Kept(Protocol):
    """Where a forward pass that will be recomputed leaves the result of one attention."""

    exchanged: bool
    """Keep q, k and v too where they came from other ranks, so that the backward pass need not ask again."""

    def read(self) -> tuple[Tensor, ...] | None:
        """Return what was written, None before that."""
        ...

    def write(self, *tensors: Tensor) -> None:
        """Keep the tensors, which carry no gradient."""
        ...
