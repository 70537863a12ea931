"""Several latent stores read as one, each with its share of what is trained."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from megawan.data.batch import Sample
from megawan.data.latents import LatentStore
from megawan.data.streams import DATASET_STRIDE, Stream, by_shape, is_image

ALIKE = (
    "latent_channels",
    "text_dim",
    "condition",
    "clip_tokens",
    "codec",
    "codec_fingerprint",
    "text_fingerprint",
    "image_encoder_fingerprint",
)
"""Settings in which stores must agree: what one model takes, and what made it of pictures and captions."""


class Mixture:
    """Stores with weights, reading like one store; sample i of store d has the id d·DATASET_STRIDE + i."""

    being_filled = False

    def __init__(
        self,
        stores: Sequence[LatentStore],
        weights: Sequence[float] = (),
        image_share: float | None = None,
    ) -> None:
        """`weights`: share of each store in what is trained, relative to the others; default their numbers of
        samples. A store of weight 0 is left out. `image_share`: share of images in what is trained of a store
        that holds images and videos; default by number.

        Raises ValueError, naming the stores and the difference, when they do not belong into one run.
        """
        self._check(stores, weights, image_share)
        self.names = _names(stores)
        """A short name of each store, those left out included, by the number of the dataset."""
        self._stores = list(stores)
        self._weights = list(weights)
        self._image_share = image_share
        share = None if image_share is None else Fraction(str(image_share))
        self._streams: list[list[Stream]] = [
            by_shape(
                store.shapes,
                dataset=number,
                weight=Fraction(str(weights[number])) if weights else None,
                image_share=share,
            )
            for number, store in enumerate(stores)
        ]
        kept = [store for store, streams in zip(stores, self._streams, strict=True) if streams]
        self._first = kept[0]
        self.shapes = [stream.shape for stream in self.streams for _ in stream.samples]
        """Latent shapes of the samples that take part."""
        self.settings: dict[str, Any] = self._first.settings
        self.latent_channels = self._first.latent_channels
        self.text_dim = self._first.text_dim
        self.extras = set.intersection(*(store.extras for store in kept))

    @staticmethod
    def _check(stores: Sequence[LatentStore], weights: Sequence[float], image_share: float | None) -> None:
        paths = [store.path.resolve() for store in stores]
        for store, path in zip(stores, paths, strict=True):
            if paths.count(path) > 1:
                raise ValueError(f"--data.path names {store.path} twice; raise its --data.weights instead")
        if weights and len(weights) != len(stores):
            raise ValueError(
                f"--data.weights has {len(weights)} numbers for {len(stores)} stores; give one for each"
            )
        for weight in weights:
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"--data.weights {weight} must be 0 or more")
        if weights and not any(weights):
            raise ValueError("--data.weights are all 0; give at least one store a weight above 0")
        kept = [store for number, store in enumerate(stores) if not weights or weights[number]]
        for store in kept[1:]:
            for name in ALIKE:
                ours, theirs = (each.settings.get(name) for each in (kept[0], store))
                if ours != theirs:
                    raise ValueError(
                        f"stores {kept[0].path} and {store.path} cannot be trained together: {name} is"
                        f" {ours!r} in the first and {theirs!r} in the second; encode both alike"
                    )
        if image_share is None:
            return
        if not 0 <= image_share <= 1:
            raise ValueError(f"--data.image_share {image_share} must lie between 0 and 1")
        if not any(len({is_image(shape) for shape in store.shapes}) == 2 for store in kept):
            raise ValueError(
                "--data.image_share divides a store that holds images and videos, and none does; give"
                " --data.weights"
            )

    @property
    def streams(self) -> list[Stream]:
        """Return the samples by store and latent shape, as the order takes them."""
        return [stream for streams in self._streams for stream in streams]

    @property
    def fingerprint(self) -> str:
        """Return each store's fingerprint with its weight: equal ones train equal runs."""
        parts = [
            f"{store.fingerprint} weight {self._weights[number] if self._weights else len(store)}"
            for number, store in enumerate(self._stores)
        ]
        if self._image_share is not None:
            parts.append(f"images {self._image_share}")
        return " + ".join(parts)

    @property
    def empty_text(self) -> Tensor:
        """Return the features of the empty prompt, float32 [S, text_dim]; all stores have one encoder."""
        return self._first.empty_text

    def __len__(self) -> int:
        """Return the number of samples that take part."""
        return len(self.shapes)

    def __getitem__(self, sample_id: int) -> Sample:
        """Return a sample by its id. Raises ValueError naming the shard when its bytes cannot be read."""
        dataset, index = divmod(sample_id, DATASET_STRIDE)
        return self._stores[dataset][index]

    def where(self, sample_id: int) -> str:
        """Return the file that holds a sample, and what it was made of."""
        dataset, index = divmod(sample_id, DATASET_STRIDE)
        return self._stores[dataset].where(index)

    def passes(self, places: int) -> list[tuple[str, float]]:
        """Return how often `places` places pass through each store, images and videos apart where
        --data.image_share divides them: (what, passes)."""
        whole = sum(stream.weight for stream in self.streams)
        kinds: dict[str, list[Stream]] = {}
        for name, streams in zip(self.names, self._streams, strict=True):
            both = self._image_share is not None and len({is_image(each.shape) for each in streams}) == 2
            for stream in streams:
                label = f"{name} {'images' if is_image(stream.shape) else 'videos'}" if both else name
                kinds.setdefault(label, []).append(stream)
        return [
            (label, float(places * sum(each.weight for each in streams) / whole / _count(streams)))
            for label, streams in kinds.items()
        ]

    def describe(self) -> str:
        """Return what is mixed and how, for the start-up lines."""
        whole = sum(stream.weight for stream in self.streams)
        parts = []
        for store, streams in zip(self._stores, self._streams, strict=True):
            share = float(sum(stream.weight for stream in streams) / whole)
            parts.append(
                f"{store.describe()}, {share:.1%} of what is trained"
                if streams
                else f"{store.path}: left out by its weight of 0"
            )
        images = f"; images are {self._image_share:.1%} where there are videos" if self._image_share else ""
        many = f"{len(self._stores)} stores" if len(self._stores) > 1 else "1 store"
        return f"{len(self)} samples of {many}: {'; '.join(parts)}{images}"


def _count(streams: Sequence[Stream]) -> int:
    return sum(len(stream.samples) for stream in streams)


def _names(stores: Sequence[LatentStore]) -> list[str]:
    """Return the shortest ends of the paths that tell the stores apart."""
    for parts in range(1, max(len(store.path.resolve().parts) for store in stores) + 1):
        names = ["/".join(store.path.resolve().parts[-parts:]) for store in stores]
        if len(set(names)) == len(names):
            return names
    return [str(store.path) for store in stores]
