"""Stores of several buckets through the real training command."""

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megawan.data.buckets import Budget
from megawan.data.cutting import ClipSize
from megawan.data.latents import LatentStore
from megawan.data.loader import make_loader
from megawan.data.mixture import Mixture
from megawan.data.sampler import GlobalOrder
from megawan.data.streams import DATASET_STRIDE
from megawan.dist import free_port
from tests.commands import ROOT, command
from tests.data.encoding import listed, ramp, run, write, write_image
from tests.data.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lying and upright clips and one image: three shapes of latents."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(3):
        write(folder / f"lying{number}.mkv", ramp(9 + number, 54, 96))
        write(folder / f"upright{number}.mkv", ramp(9 + number, 64, 48))
    write_image(folder / "image.png", ramp(1, 64, 64))
    size = ClipSize(9, 32, 32, 16, Budget((9, 5), 48 * 64, None, 16, (4, 8, 8)))
    names = sorted(path.name for path in folder.iterdir())
    report = run(listed(folder, *names), folder / "store", size)
    assert report.store is not None
    assert sorted(set(report.store.shapes)) == [(16, 1, 6, 6), (16, 3, 6, 8), (16, 3, 8, 6)]
    return folder / "store"


def test_two_ranks_train_on_two_stores_of_several_shapes_and_replace_what_is_bad(
    store: Path, tmp_path: Path
) -> None:
    settings = json.loads((store / "index.json").read_text())["settings"]
    other = make_store(tmp_path / "other", [(16, 3, 8, 6)] * 5, bad=[1], **settings)
    flags = ("--data.path", store, other.path, "--data.weights", "2", "1", "--data.image_share", "0.3")
    split = ("--micro_batch", "1", "--accumulation", "2", "--data.shape_group", "1")
    done = command(
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()),
        ROOT / "megawan/train.py",
        *("--deepspeed", "ds_configs/zero2.json", *flags, *split, "--steps", "7", "--output", "run"),
        cwd=tmp_path,
        timeout=280,
    )
    assert done.code == 0, done.err[-3000:]
    assert "data: 12 samples of 2 stores" in done.out and "of 3 shapes from [16, 1, 6, 6]" in done.out
    mixed = Mixture([LatentStore(store), other], (2, 1), 0.3)
    assert mixed.passes(28)[0] == ("store images", pytest.approx(28 * 2 / 3 * 0.3))
    said = ", ".join(f"{name} {times:.1f}" for name, times in mixed.passes(28))
    assert "9 to 36 tokens a video" in done.out and f"passes: {said}" in done.out
    losses = [float(loss) for loss in re.findall(r"step \d/7 \| loss ([0-9.]+)", done.out)]
    assert len(losses) == 7 and all(0 < loss < 10 for loss in losses)
    lines = [line for line in done.err.splitlines() if "replaced sample" in line]
    assert lines and all(f"{DATASET_STRIDE + 1} ({other.path}/shard_00001" in line for line in lines)
    manifest = json.loads((tmp_path / "run/checkpoints/step_0000007/manifest.json").read_text())
    assert manifest["data"].endswith(
        f" weight 2.0 + {other.fingerprint} weight 1.0 + images 0.3, groups of 1"
    )
    curves = EventAccumulator(str(tmp_path / "run/tensorboard"))
    curves.Reload()
    order = GlobalOrder(mixed.streams, seed=0, global_batch=4, group=1)
    bad = [sum(place.sample_id == DATASET_STRIDE + 1 for place in order.step(step)) for step in range(7)]
    assert [event.value for event in curves.Scalars("data/bad_samples")] == bad and sum(bad)
    uneven = [event.value for event in curves.Scalars("data/imbalance")]
    assert max(uneven) > 1 and min(uneven) >= 1


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "dp_size"), [(4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)]
)
def test_a_step_has_one_shape_however_it_is_divided(
    store: Path, micro_batch: int, accumulation: int, dp_size: int
) -> None:
    data = LatentStore(store)
    ranks = [
        make_loader(
            data,
            seed=3,
            micro_batch=micro_batch,
            accumulation=accumulation,
            dp_rank=rank,
            dp_size=dp_size,
            text_len=32,
            prompt_dropout=0.0,
            start_step=0,
            workers=0,
        )
        for rank in range(dp_size)
    ]
    seen: list[int] = []
    for _ in range(14):
        steps = [next(rank) for rank in ranks]
        places = [(turn, rank) for turn in range(accumulation) for rank in range(dp_size)]
        batches = [steps[rank][turn] for turn, rank in places]
        assert len({batch.latents.shape[1:] for batch in batches}) == 1
        seen += [number for batch in batches for number in batch.sample_ids.tolist()]
    # 14 steps of 4 are 8 passes over 7 samples: each bucket has had its share of them exactly.
    assert [seen.count(number) for number in range(7)] == [8] * 7
