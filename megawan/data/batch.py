"""One micro-batch: stacked latents and padded text with the keys that all randomness hangs on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One stored clip. Text and CLIP features are at their true length; all float32 on the CPU."""

    latents: Tensor
    """[C, T, H, W], normalised."""
    text: Tensor
    """[S_true, text_dim]."""
    prompt: str
    clip: Tensor | None = None
    """[257 or 514, 1280], image-to-video models of Wan2.1 only."""
    condition: Tensor | None = None
    """[C_condition, T, H, W], concatenated after the noisy channels by the model."""


@dataclass(frozen=True)
class Replaced:
    """A sample that could not be trained on, so that another took its place."""

    sample_id: int
    where: str
    """Its file, and what it was made of."""
    problem: str

    def __str__(self) -> str:
        """Return all of it in one line."""
        return " ".join(f"sample {self.sample_id} ({self.where}): {self.problem}".split())


@dataclass(frozen=True)
class Batch:
    """What the step reads. Letters: B samples, C T H W latent, S text rows."""

    latents: Tensor
    """x0, float32 [B, C, T, H, W]."""
    text: Tensor
    """float32 [B, S, text_dim], zero rows past each true length."""
    sample_ids: Tensor
    """int64 [B], what was read, replaced samples included; megawan.data.streams.dataset_of says of which
    dataset."""
    epochs: Tensor
    """int64 [B], how often the sample was passed before; (seed, sample_id, epoch) keys every draw."""
    prompts: tuple[str, ...]
    clip: Tensor | None = None
    condition: Tensor | None = None
    replaced: tuple[Replaced, ...] = field(default=(), kw_only=True)
    """The bad samples that others stand in for."""
    imbalance: float = field(default=1.0, kw_only=True)
    """Cost of the step's dearest rank over that of its mean rank: 1 when no rank waits for another."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its features on `device`; ids and epochs stay on the CPU, where draws are
        made."""
        return self._with_features(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch with its features in pinned memory, from where `to` copies while the GPU works.
        torch's loader calls it by this name."""
        return self._with_features(Tensor.pin_memory)

    def _with_features(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            latents=move(self.latents),
            text=move(self.text),
            clip=None if self.clip is None else move(self.clip),
            condition=None if self.condition is None else move(self.condition),
        )


def pad_text(rows: Tensor, text_len: int) -> Tensor:
    """Return [text_len, D] with zero rows after `rows` [S, D], as Wan pads (no mask: zeros are attended).

    Raises ValueError when there are more rows than that.
    """
    if len(rows) > text_len:
        raise ValueError(
            f"text of {len(rows)} rows does not fit the model's {text_len}; encode with --text_len {text_len}"
        )
    return torch.cat((rows, rows.new_zeros(text_len - len(rows), rows.shape[1])))


def collate(
    samples: Sequence[Sample], sample_ids: Sequence[int], epochs: Sequence[int], text_len: int
) -> Batch:
    """Return the batch of samples of one latent shape. Raises ValueError for mixed shapes or mixed
    conditionings."""
    if len({sample.latents.shape for sample in samples}) != 1:
        raise ValueError(f"samples {list(sample_ids)} have different latent shapes; a batch has one")
    return Batch(
        torch.stack([sample.latents for sample in samples]),
        torch.stack([pad_text(sample.text, text_len) for sample in samples]),
        torch.tensor(list(sample_ids), dtype=torch.int64),
        torch.tensor(list(epochs), dtype=torch.int64),
        tuple(sample.prompt for sample in samples),
        _stack([sample.clip for sample in samples], sample_ids, "clip"),
        _stack([sample.condition for sample in samples], sample_ids, "condition"),
    )


def _stack(features: Sequence[Tensor | None], sample_ids: Sequence[int], name: str) -> Tensor | None:
    present = [feature for feature in features if feature is not None]
    if not present:
        return None
    if len(present) != len(features):
        raise ValueError(f"samples {list(sample_ids)}: some have {name} features and some have none")
    return torch.stack(present)
