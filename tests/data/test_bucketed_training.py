"""A store of several buckets through the real training command on one rank."""

import json
import re
from pathlib import Path

import pytest

from megawan.data.buckets import Budget
from megawan.data.cutting import ClipSize
from megawan.data.loader import make_loader
from tests.commands import ROOT, command
from tests.data.encoding import listed, ramp, run, write, write_image


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


def test_training_reads_every_bucket(store: Path, tmp_path: Path) -> None:
    flags = ("--data.path", store, "--output", "run", "--micro_batch", "2", "--accumulation", "2")
    done = command(
        ROOT / "megawan/train.py",
        *flags,
        "--steps",
        "7",
        "--metrics.log_every",
        "1",
        cwd=tmp_path,
        timeout=280,
    )
    assert done.code == 0, done.err[-3000:]
    assert "of 3 shapes from [16, 1, 6, 6] to [16, 3, 8, 6]" in done.out
    assert "9 to 36 tokens a video" in done.out
    losses = [float(loss) for loss in re.findall(r"step \d/7 \| loss ([0-9.]+)", done.out)]
    assert len(losses) == 7 and all(0 < loss < 10 for loss in losses)
    manifest = json.loads((tmp_path / "run/checkpoints/step_0000007/manifest.json").read_text())
    assert manifest["files"]


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "dp_size"), [(4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)]
)
def test_a_step_has_one_shape_however_it_is_divided(
    store: Path, micro_batch: int, accumulation: int, dp_size: int
) -> None:
    from megawan.data.latents import LatentStore

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
