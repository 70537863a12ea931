"""A video codec by its name."""

from pathlib import Path

import torch

from megawan.encoders.codec import VideoCodec
from megawan.encoders.dct import DctCodec

CODECS = ("dct", "wan2.1", "wan2.2")


def open_codec(
    name: str,
    path: Path | None,
    device: torch.device | str,
    tile: int | None = None,
    together: bool = False,
) -> VideoCodec:
    """Return the codec `name` ("dct", "wan2.1" or "wan2.2") on `device`.

    `path` is the VAE's weights (a diffusers folder or an original file); the weightless "dct" takes None.
    `tile` and `together` are WanVae's; None and False give exact latents. Raises ValueError for an
    unknown name, a missing or needless path or tile, or weights of another VAE.
    """
    if name == "dct":
        if path is not None:
            raise ValueError(f"the codec dct has no weights, so it takes no path; given: {path}")
        if tile is not None:
            raise ValueError(f"the codec dct needs no tiles; given: {tile}")
        return DctCodec(device)
    if name not in CODECS:
        raise ValueError(f"there is no codec {name!r}; legal: {', '.join(CODECS)}")
    if path is None:
        raise ValueError(f"the codec {name} needs the path of its weights: a diffusers folder or a VAE file")
    from megawan.encoders.vae import WanVae  # diffusers takes seconds to import, and dct does without

    return WanVae.open(name, path, device, tile, together)
