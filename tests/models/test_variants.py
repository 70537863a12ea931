import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from megawan.models.keys import expected_shapes, parameter_count, to_diffusers, to_native
from megawan.models.variants import VARIANTS, WanConfig, get_variant

# Keys and shapes of the published checkpoints; the blocks of one model are alike, so one is written out.
PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "golden" / "wan_dit_shapes.json").read_text(encoding="utf-8")
)
PARAMETERS = {
    "t2v-1.3B": 1_418_996_800,
    "t2v-14B": 14_288_491_584,
    "i2v-14B-480P": 16_394_878_784,
    "i2v-14B-720P": 16_394_878_784,
    "flf2v-14B": 16_395_536_704,
    "t2v-A14B-high": 14_288_491_584,
    "t2v-A14B-low": 14_288_491_584,
    "i2v-A14B-high": 14_288_901_184,
    "i2v-A14B-low": 14_288_901_184,
    "ti2v-5B": 4_999_787_712,
    "fun-inp-1.3B": 1_564_428_608,
    "fun-inp-14B": 16_394_878_784,
    "fun-control-1.3B": 1_564_502_336,
    "fun-control-14B": 16_395_124_544,
    "vace-1.3B": 2_153_972_032,
    "vace-14B": 17_337_592_896,
}
VACE_KEYS = {"vace-1.3B": 1264, "vace-14B": 1331}
FINGERPRINTS = {
    "t2v-1.3B": "9269f8db9040a9d860eaca435be61814",
    "t2v-14B": "aafcfd9672c3a2456dc46e1cb6e52c70",
    "t2v-A14B-high": "aafcfd9672c3a2456dc46e1cb6e52c70",
    "i2v-14B-480P": "6bfcfb3b342cb286ce886889d519a77e",
    "flf2v-14B": "3ef3b1f8e1dab83d5b71fd7b617f859f",
    "i2v-A14B-low": "5b013604280dd715f8457c6ed6d6a626",
    "ti2v-5B": "1f5ab7703c6fc803fdded85ff040c316",
}


def published_shapes(entry: dict) -> dict[str, tuple[int, ...]]:
    shapes = {key: tuple(shape) for key, shape in entry["top"].items()}
    for index in range(entry["blocks"]):
        shapes |= {f"blocks.{index}.{key}": tuple(shape) for key, shape in entry["block"].items()}
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_those_on_disk(name: str) -> None:
    entry = PUBLISHED[name]
    for variant in entry["variants"]:
        assert expected_shapes(get_variant(variant).config) == published_shapes(entry)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_count_to_the_last_digit(name: str) -> None:
    shapes = expected_shapes(get_variant(name).config)
    assert parameter_count(shapes.values()) == PARAMETERS[name]
    assert len(shapes) == VACE_KEYS.get(name, len(shapes))


def test_every_published_variant_is_counted() -> None:
    assert set(PARAMETERS) == {name for name in VARIANTS if not name.startswith("debug")}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_diffsynth_recognises_the_native_state_dict(name: str) -> None:
    # Its loader knows a file by the md5 over the sorted "key:d0_d1" and bare "key" strings.
    words = []
    for key, shape in expected_shapes(get_variant(name).config).items():
        words += [f"{key}:{'_'.join(map(str, shape))}", key]
    assert hashlib.md5(",".join(sorted(words)).encode()).hexdigest() == FINGERPRINTS[name]


@pytest.mark.parametrize("name", ["i2v-14B-480P", "flf2v-14B", "vace-14B"])
def test_renaming_is_a_bijection(name: str) -> None:
    keys = list(expected_shapes(get_variant(name).config))
    there = [to_diffusers(key) for key in keys]
    assert len(set(there)) == len(keys)
    assert [to_native(key) for key in there] == keys


@pytest.mark.parametrize(
    "key", ["", "blocks.", "blocks.0.", "blocks.00.modulation", "blocks.0.ffn.1.weight", "rope.freqs", "a\nb"]
)
def test_foreign_keys_are_not_renamed(key: str) -> None:
    for rename in (to_native, to_diffusers):
        with pytest.raises(KeyError):
            rename(key)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_consistent(name: str) -> None:
    variant = VARIANTS[name]
    assert get_variant(name.upper()) is variant
    assert variant.latent_channels == {"2.1": 16, "2.2": 48}[variant.vae]
    assert variant.condition_channels >= 0
    assert (variant.boundary is None) == (variant.expert is None)
    if not name.startswith("debug"):
        assert variant.config.head_dim == 128


def test_an_unknown_variant_is_answered_with_the_legal_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown model variant 'wan-14B'; legal: t2v-1.3B, t2v-14B, .*debug"
    ):
        get_variant("wan-14B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 100, "num_heads": 3}, "100 over 3 heads"),
        ({"dim": 15, "num_heads": 3}, "even head width"),
        ({"freq_dim": 63}, "freq_dim 63"),
        ({"patch_size": (1, 0, 2)}, "patch_size"),
        ({"qk_norm": False}, "qk_norm"),
        ({"window_size": (3, 3)}, "window_size"),
        ({"pos_embed_seq_len": 514}, "without image_dim"),
        ({"vace_layers": (1, 2)}, "ascend from 0"),
        ({"vace_layers": (0, 40)}, "below num_layers 40"),
        ({"vace_layers": (0, 2, 2)}, "ascend"),
    ],
)
def test_an_impossible_configuration_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WanConfig(), **changes)
