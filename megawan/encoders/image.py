"""Images to CLIP features, as Wan2.1's image-to-video models were trained with them.

The vision tower of OpenCLIP's ViT-H/14 (XLM-RoBERTa-large), through transformers' CLIPVisionModel: the output
of the last block but one, without the final norm, 257 rows of 1280 (the class token and 16 x 16 patches).
Wan's authors run it in float16; here it is float32.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from megawan.encoders.fingerprint import fingerprint
from megawan.encoders.original import load_renamed, read_tensors
from megawan.rng import generator_at

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEADS = 16  # of ViT-H/14; an original file does not say
ACTIVATION = "gelu"  # the exact one; OpenAI's own CLIPs have another


class ImageEncoder:
    """CLIP's vision tower; `tokens` rows of `dim` features an image (257 of 1280 for the released one)."""

    def __init__(self, model: Any) -> None:
        """`model` is a CLIPVisionModel; ValueError when its activation is not Wan's or it has one layer."""
        config = model.config
        if config.hidden_act != ACTIVATION:
            raise ValueError(
                f"the image encoder's activation is {config.hidden_act}, Wan's CLIP has {ACTIVATION}: "
                "it is another CLIP"
            )
        if config.num_hidden_layers < 2:
            raise ValueError("the image encoder has 1 layer; its last but one is read, so it needs 2")
        self._model = model.eval().requires_grad_(False)
        self._size: int = config.image_size
        self.tokens: int = (config.image_size // config.patch_size) ** 2 + 1
        self.dim: int = config.hidden_size
        settings = f"{config.num_attention_heads} heads, bicubic to {self._size}, last but one"
        self.fingerprint = fingerprint("clip", model.state_dict(), settings)

    @classmethod
    def open(
        cls, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ImageEncoder":
        """Return the encoder of a transformers folder (`image_encoder/` of a diffusers model) or of Wan's
        models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, whose text half is left alone.

        Nothing is fetched and no code in a .pth is run. Raises ValueError for anything else.
        """
        if not path.exists():
            raise ValueError(f"{path} does not exist; give an image_encoder folder or Wan's CLIP file")
        try:
            model = _from_folder(path, dtype) if path.is_dir() else _from_file(path)
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"cannot open {path} as the image encoder: {' '.join(str(error).split())}"
            ) from error
        return cls(model.to(device=device, dtype=dtype))

    @classmethod
    def debug(cls, seed: int = 0) -> "ImageEncoder":
        """Return an encoder of random weights with the released one's 257 rows of 1280, 2 thin layers.

        For the debug variants; a pure function of `seed`.
        """
        config = CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            image_size=224,
            patch_size=14,
            hidden_act=ACTIVATION,
        )
        with torch.device("meta"):
            model = CLIPVisionModel(config)
        weights = {}
        for name, empty in _tower(model).state_dict().items():
            if name.endswith("bias"):
                weights[name] = torch.zeros(empty.shape)
            elif "norm" in name:
                weights[name] = torch.ones(empty.shape)
            else:
                weights[name] = torch.randn(empty.shape, generator=generator_at(seed, "debug clip", name))
                weights[name] *= 0.5 if "position" in name or "class" in name else empty[0].numel() ** -0.5
        return cls(_filled(model, weights))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return features float32 [B, tokens, dim] of images [B, 3, H, W] in [-1, 1], on the model's device.

        Raises ValueError for another number of dimensions or channels.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W]; given: {list(images.shape)}")
        pixels = preprocess(images.to(self._model.device), self._size).to(self._model.dtype)
        hidden: Tensor = self._model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        return hidden.float()


def preprocess(images: Tensor, size: int) -> Tensor:
    """Return what CLIP sees of images [B, 3, H, W] in [-1, 1], float32 [B, 3, size, size].

    As Wan's own code, not as CLIP's image processor: the whole image is squeezed to a square, nothing is cut
    off, bicubic on the values without antialiasing; then CLIP's mean and standard deviation per channel.
    """
    square = functional.interpolate(
        images.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=False
    )
    mean, std = (torch.tensor(row, device=images.device).view(1, 3, 1, 1) for row in (MEAN, STD))
    return ((square + 1) / 2 - mean) / std


def rename_key(key: str) -> str:
    """Return transformers' name for the vision tensor `key` of Wan's file; its to_qkv is then in three."""
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key


_NAMES = (
    (r"^visual\.cls_embedding$", "embeddings.class_embedding"),
    (r"^visual\.pos_embedding$", "embeddings.position_embedding.weight"),
    (r"^visual\.patch_embedding\.", "embeddings.patch_embedding."),
    (r"^visual\.pre_norm\.", "pre_layrnorm."),  # transformers' spelling
    (r"^visual\.post_norm\.", "post_layernorm."),
    (r"^visual\.transformer\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.to_qkv\.", ".self_attn.qkv_proj."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
)


def _from_folder(path: Path, dtype: torch.dtype) -> Any:
    if not (path / "config.json").is_file():
        raise ValueError(
            "the folder has no config.json (give the image_encoder/ folder of a diffusers model)"
        )
    model, report = CLIPVisionModel.from_pretrained(
        path, local_files_only=True, dtype=dtype, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:  # a whole CLIP's folder holds a text tower besides; that is no fault
        raise ValueError(f"it lacks {len(missing)} tensors, first {missing[0]}")
    return model


def _from_file(path: Path) -> Any:
    """Return the vision tower of Wan's CLIP file, whose sizes are read off its tensors: it has no config."""
    tensors: dict[str, Tensor] = {}
    for key, value in read_tensors(path).items():
        name = rename_key(key)
        if not key.startswith("visual.") or key == "visual.head":
            continue  # the text tower and the projection into the space that both share
        if ".qkv_proj." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                tensors[name.replace("qkv_proj", f"{part}_proj")] = piece
        else:
            tensors[name] = value
    sizes = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
    for name in (*sizes, "embeddings.class_embedding", "encoder.layers.0.mlp.fc1.weight"):
        if name not in tensors:
            raise ValueError(f"it is no CLIP of Wan's: it has no {name}")
    tensors["embeddings.class_embedding"] = tensors["embeddings.class_embedding"].flatten()
    tensors[sizes[1]] = tensors[sizes[1]].squeeze(0)
    width, _, patch, _ = tensors[sizes[0]].shape
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name),
        num_attention_heads=HEADS,
        image_size=patch * round((len(tensors[sizes[1]]) - 1) ** 0.5),
        patch_size=patch,
        hidden_act=ACTIVATION,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    return _filled(model, tensors)


def _filled(model: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `model`, built on the meta device, with `tensors` and the one buffer that no file holds."""
    tower = _tower(model)
    load_renamed(tower, tensors)
    tower.embeddings.position_ids = torch.arange(tower.embeddings.num_positions).expand(1, -1)
    return model


def _tower(model: Any) -> Any:
    return getattr(model, "vision_model", model)  # transformers had one level more for a while
