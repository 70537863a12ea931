"""Every Wan by name: its architecture, its VAE, and what its authors sample it with. A new variant is a row
here."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

Expert = Literal["high", "low"]
Task = Literal["t2v", "i2v", "flf2v", "ti2v", "control", "vace"]
CLIP_DIM = 1280
CLIP_TOKENS = 257


@dataclass(frozen=True)
class WanConfig:
    """The architecture of one Wan transformer; field names of the native config.json where it has them."""

    model_type: str = "t2v"
    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    num_heads: int = 40
    num_layers: int = 40
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    window_size: tuple[int, int] = (-1, -1)
    image_dim: int | None = None
    """Width of the CLIP features, None where the model has no image branch."""
    pos_embed_seq_len: int | None = None
    """Rows of the learned position embedding of the CLIP tokens (514 for first and last frame), or None."""
    vace_layers: tuple[int, ...] = ()
    """Main blocks after which a VACE block's hint is added; empty where the model has no VACE branch."""
    vace_in_dim: int = 96

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "ffn_dim",
            "freq_dim",
            "in_dim",
            "out_dim",
            "num_heads",
            "num_layers",
            "text_dim",
            "text_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads gives no even head width;"
                " dim must be a multiple of 2 x num_heads"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} must be even: half cosines, half sines")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size {self.patch_size} must be three positive integers (t, h, w)")
        if not (self.qk_norm and self.cross_attn_norm) or tuple(self.window_size) != (-1, -1):
            raise ValueError(
                "qk_norm and cross_attn_norm must be on and window_size (-1, -1), as in every published Wan"
            )
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise ValueError(
                "pos_embed_seq_len is given without image_dim: there are no CLIP tokens to embed"
            )
        if self.vace_layers:
            layers = list(self.vace_layers)
            if layers[0] != 0 or layers != sorted(set(layers)) or layers[-1] >= self.num_layers:
                raise ValueError(
                    f"vace_layers {self.vace_layers} must ascend from 0, below num_layers {self.num_layers}"
                )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent positions in one token."""
        return math.prod(self.patch_size)

    @property
    def token_width(self) -> int:
        """P: numbers in one output token, out_dim x patch volume."""
        return self.out_dim * self.patch_volume

    @property
    def has_clip(self) -> bool:
        """Whether the model has an image branch that reads CLIP features."""
        return self.image_dim is not None

    @property
    def clip_tokens(self) -> int | None:
        """CLIP rows that the model expects: 257 for one image, 514 for two, None without an image branch."""
        if self.image_dim is None:
            return None
        return self.pos_embed_seq_len or CLIP_TOKENS


@dataclass(frozen=True)
class Sampling:
    """What the model's authors sample with: solver and steps, shift, guidance, frame rate and clip size."""

    steps: int = 50
    shift: float = 5.0
    guidance: float = 5.0
    fps: int = 16
    num_frames: int = 81
    height: int = 480
    width: int = 832
    solver: Literal["euler", "unipc"] = "unipc"


@dataclass(frozen=True)
class Variant:
    """One published model: what to build, which VAE its latents come from, where its weights come from."""

    name: str
    config: WanConfig
    task: Task
    repository: str
    """Hub repository of the native weights, empty for the debug variants."""
    vae: Literal["2.1", "2.2"] = "2.1"
    expert: Expert | None = None
    """Which of the two A14B experts this is."""
    boundary: float | None = None
    """Sigma at which the A14B experts change over: high serves sigma >= boundary, low the rest."""
    sampling: Sampling = Sampling()

    @property
    def vae_stride(self) -> tuple[int, int, int]:
        """Pixels per latent position along (t, h, w); the first frame is a latent frame of its own."""
        return (4, 8, 8) if self.vae == "2.1" else (4, 16, 16)

    @property
    def latent_channels(self) -> int:
        """Channels of the noisy latent (16 for the 2.1 VAE, 48 for the 2.2 VAE)."""
        return self.config.out_dim

    @property
    def condition_channels(self) -> int:
        """Channels concatenated after the noisy latent (mask, image latent, control latent)."""
        return self.config.in_dim - self.config.out_dim


_T2V_14B = WanConfig()
_I2V_14B = WanConfig(model_type="i2v", in_dim=36, image_dim=CLIP_DIM)
_T2V_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_I2V_1_3B = dataclasses.replace(_T2V_1_3B, model_type="i2v", in_dim=36, image_dim=CLIP_DIM)
_FLF2V_14B = dataclasses.replace(_I2V_14B, model_type="flf2v", pos_embed_seq_len=2 * CLIP_TOKENS)
_I2V_A14B = dataclasses.replace(_T2V_14B, model_type="i2v", in_dim=36)
_TI2V_5B = WanConfig("ti2v", dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
_VACE_1_3B = dataclasses.replace(_T2V_1_3B, model_type="vace", vace_layers=tuple(range(0, 30, 2)))
_VACE_14B = dataclasses.replace(_T2V_14B, model_type="vace", vace_layers=tuple(range(0, 40, 5)))
_DEBUG = WanConfig(dim=144, ffn_dim=576, freq_dim=64, num_heads=6, num_layers=6, text_dim=64, text_len=32)
_DEBUG_A14B = dataclasses.replace(_DEBUG, num_layers=3)
_DEBUG_I2V = dataclasses.replace(_DEBUG, model_type="i2v", in_dim=36, image_dim=CLIP_DIM)
_DEBUG_I2V_A14B = dataclasses.replace(_DEBUG_A14B, model_type="i2v", in_dim=36)

_A14B_T2V_SAMPLING = Sampling(steps=40, shift=12.0, guidance=4.0)
_TI2V_SAMPLING = Sampling(fps=24, num_frames=121, height=704, width=1280)
_DEBUG_SAMPLING = Sampling(steps=20, guidance=3.0, num_frames=9, height=64, width=64, solver="euler")
_A14B_I2V_SAMPLING = Sampling(steps=40, shift=5.0, guidance=3.5)

_ROWS = (
    Variant(
        "t2v-1.3B", _T2V_1_3B, "t2v", "Wan-AI/Wan2.1-T2V-1.3B", sampling=Sampling(guidance=6.0, shift=8.0)
    ),
    Variant("t2v-14B", _T2V_14B, "t2v", "Wan-AI/Wan2.1-T2V-14B"),
    Variant(
        "i2v-14B-480P", _I2V_14B, "i2v", "Wan-AI/Wan2.1-I2V-14B-480P", sampling=Sampling(steps=40, shift=3.0)
    ),
    Variant(
        "i2v-14B-720P",
        _I2V_14B,
        "i2v",
        "Wan-AI/Wan2.1-I2V-14B-720P",
        sampling=Sampling(steps=40, height=720, width=1280),
    ),
    Variant(
        "flf2v-14B",
        _FLF2V_14B,
        "flf2v",
        "Wan-AI/Wan2.1-FLF2V-14B-720P",
        sampling=Sampling(shift=16.0, height=720, width=1280),
    ),
    Variant(
        "t2v-A14B-high", _T2V_14B, "t2v", "Wan-AI/Wan2.2-T2V-A14B", "2.1", "high", 0.875, _A14B_T2V_SAMPLING
    ),
    Variant(
        "t2v-A14B-low",
        _T2V_14B,
        "t2v",
        "Wan-AI/Wan2.2-T2V-A14B",
        "2.1",
        "low",
        0.875,
        Sampling(40, 12.0, 3.0),
    ),
    Variant(
        "i2v-A14B-high", _I2V_A14B, "i2v", "Wan-AI/Wan2.2-I2V-A14B", "2.1", "high", 0.9, _A14B_I2V_SAMPLING
    ),
    Variant(
        "i2v-A14B-low", _I2V_A14B, "i2v", "Wan-AI/Wan2.2-I2V-A14B", "2.1", "low", 0.9, _A14B_I2V_SAMPLING
    ),
    Variant("ti2v-5B", _TI2V_5B, "ti2v", "Wan-AI/Wan2.2-TI2V-5B", "2.2", sampling=_TI2V_SAMPLING),
    Variant("fun-inp-1.3B", _I2V_1_3B, "flf2v", "alibaba-pai/Wan2.1-Fun-1.3B-InP"),
    Variant("fun-inp-14B", _I2V_14B, "flf2v", "alibaba-pai/Wan2.1-Fun-14B-InP"),
    Variant(
        "fun-control-1.3B",
        dataclasses.replace(_I2V_1_3B, in_dim=48),
        "control",
        "alibaba-pai/Wan2.1-Fun-1.3B-Control",
    ),
    Variant(
        "fun-control-14B",
        dataclasses.replace(_I2V_14B, in_dim=48),
        "control",
        "alibaba-pai/Wan2.1-Fun-14B-Control",
    ),
    Variant("vace-1.3B", _VACE_1_3B, "vace", "Wan-AI/Wan2.1-VACE-1.3B", sampling=Sampling(shift=16.0)),
    Variant("vace-14B", _VACE_14B, "vace", "Wan-AI/Wan2.1-VACE-14B", sampling=Sampling(shift=16.0)),
    *(
        dataclasses.replace(variant, sampling=_DEBUG_SAMPLING)
        for variant in (
            Variant("debug", _DEBUG, "t2v", ""),
            Variant("debug-A14B-high", _DEBUG_A14B, "t2v", "", "2.1", "high", 0.875),
            Variant("debug-A14B-low", _DEBUG_A14B, "t2v", "", "2.1", "low", 0.875),
            Variant("debug-i2v", _DEBUG_I2V, "i2v", ""),
            Variant("debug-i2v-A14B-high", _DEBUG_I2V_A14B, "i2v", "", "2.1", "high", 0.9),
            Variant("debug-i2v-A14B-low", _DEBUG_I2V_A14B, "i2v", "", "2.1", "low", 0.9),
            Variant(
                "debug-flf2v",
                dataclasses.replace(_DEBUG_I2V, model_type="flf2v", pos_embed_seq_len=2 * CLIP_TOKENS),
                "flf2v",
                "",
            ),
            Variant(
                "debug-ti2v",
                dataclasses.replace(_DEBUG, model_type="ti2v", in_dim=48, out_dim=48),
                "ti2v",
                "",
                "2.2",
            ),
            Variant("debug-control", dataclasses.replace(_DEBUG_I2V, in_dim=48), "control", ""),
            Variant(
                "debug-vace",
                dataclasses.replace(_DEBUG, model_type="vace", vace_layers=(0, 2, 4)),
                "vace",
                "",
            ),
        )
    ),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ROWS}


def get_variant(name: str) -> Variant:
    """Return the variant of this name, letter case ignored; raises ValueError listing the legal names."""
    for variant in _ROWS:
        if variant.name.lower() == name.lower():
            return variant
    raise ValueError(f"unknown model variant {name!r}; legal: {', '.join(VARIANTS)}")
