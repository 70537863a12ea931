"""Weights reach a sharded model one tensor at a time: no rank holds the whole, and no bit is lost on the
way."""

import math
from typing import Any

import pytest
import torch

from megawan.models.initial import InitialWeights
from megawan.models.keys import expected_shapes
from megawan.models.writing import write_weights
from tests.distributed import run_distributed
from tests.loading_workers import CONFIGS

SHARD = 16_000_000
DTYPES = ("bfloat16", "float32")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks says of every case."""
    root = tmp_path_factory.mktemp("weights")
    cases: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        for name, config in CONFIGS.items():
            weights = InitialWeights(config, 0)
            folder, kind = root / f"{name} {dtype}", getattr(torch, dtype)
            write_weights(weights, config, folder, "native", kind, {}, max_shard_bytes=SHARD)
        small = {"config": "small", "weights": str(root / f"small {dtype}"), "compare": True}
        cases |= {f"{dtype} at stage {stage}": {**small, "stage": stage} for stage in (1, 2, 3)}
    for dtype in DTYPES:
        cases[dtype] = {"config": "middle", "weights": str(root / f"middle {dtype}"), "stage": 3}
    cases["whole"] = {**cases["float32"], "whole": True}
    with pytest.MonkeyPatch.context() as patch:
        # Freed tensors go back to the system at once, as they do in a 14B, whose matrices are above the 32 MB
        # up to which glibc may keep freed memory.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
        ranks = run_distributed(
            "tests.loading_workers:load", 2, arguments={"cases": list(cases.values())}, timeout=240
        )
    return {name: [rank[place] for rank in ranks] for place, name in enumerate(cases)}


def allowed(found: dict[str, Any]) -> float:
    """Return the bytes that a rank may need at most while it builds and loads."""
    return 1.5 * float(found["share"]) + SHARD


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rank_needs_more_than_its_share_and_a_shard(dtype: str, loaded: dict[str, Any]) -> None:
    for rank, found in enumerate(loaded[dtype]):
        print(
            f"{dtype} on disk, rank {rank}: share {found['share'] / 1e6:.0f} MB, peak while loading"
            f" {found['resident'] / 1e6:.0f} MB = {found['resident'] / found['share']:.2f} x share"
        )
        parameters = sum(math.prod(shape) for shape in expected_shapes(CONFIGS["middle"]).values())
        assert found["share"] == pytest.approx(8 * parameters / 2, rel=0.01)
        assert found["resident"] < allowed(found)


def test_a_rank_that_reads_the_whole_state_dict_shows(loaded: dict[str, Any]) -> None:
    for found in loaded["whole"]:
        assert found["resident"] > allowed(found)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_are_what_the_disk_holds_and_weights_its_rounding(
    dtype: str, stage: int, loaded: dict[str, Any]
) -> None:
    ranks = loaded[f"{dtype} at stage {stage}"]
    assert [found["wrong"] for found in ranks] == [[], []]
    whole = sum(math.prod(shape) for shape in expected_shapes(CONFIGS["small"]).values())
    assert sum(found["elements"] for found in ranks) == whole
