"""What a run says of itself: means against sums by hand, curves read back from the event files."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megawan import metrics
from megawan.metrics import SIGMA_BINS, DataReading, MetricsOptions, RunLog, speed
from megawan.step_times import StepTimes
from tests.dist_workers import world_of_one
from tests.distributed import run_distributed
from tests.metrics_workers import MICRO_BATCHES, MicroBatch, Reading, datasets, readings, scalars, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return run_distributed("tests.metrics_workers:cases", 2, arguments={"folder": str(folder)}, timeout=90)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A gloo group of this process alone."""
    with world_of_one():
        yield


def by_hand(batches: list[MicroBatch]) -> Reading:
    """Return the mean loss over micro-batches, the mean mse and weighted mse of the samples of each tenth of
    sigma, and the mean weighted mse of each dataset's samples."""
    bins, weighted, of_dataset = defaultdict(list), defaultdict(list), defaultdict(list)
    for _, per_sample, sigma in batches:
        for value, place, weight, number in zip(
            per_sample, sigma, weights(sigma), datasets(per_sample), strict=True
        ):
            tenth = min(int(place * SIGMA_BINS), SIGMA_BINS - 1)
            bins[tenth].append(value)
            weighted[tenth].append(value * weight)
            of_dataset[number].append(value * weight)
    loss = sum(batch[0] for batch in batches) / len(batches)
    return loss, means(bins), means(weighted), means(of_dataset)


def means(values: dict[int, list[float]]) -> dict[int, float]:
    return {place: sum(some) / len(some) for place, some in sorted(values.items())}


def near(reading: Reading) -> list[Any]:
    return [pytest.approx(part, rel=1e-6) for part in reading]


def test_the_meter_reads_means_and_starts_anew(alone: None) -> None:
    for batches in MICRO_BATCHES:
        wanted = [by_hand(list(batches)), by_hand(list(batches[:1]))]
        assert len(wanted[0][1]) > 2 and wanted[0] != wanted[1] and wanted[0][3].keys() == {0, 2}
        assert [list(reading) for reading in readings(batches)] == [near(one) for one in wanted]


def test_the_meter_of_two_ranks_reads_the_mean_of_all_samples(seen: list[dict[str, Any]]) -> None:
    first, second = MICRO_BATCHES
    wanted = [near(by_hand([*first, *second])), near(by_hand([first[0], second[0]]))]
    for one in seen:
        found = [
            [loss, *({int(key): value for key, value in part.items()} for part in parts)]
            for loss, *parts in one["meter"]
        ]
        assert found == wanted


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every curve, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rank_0_alone_writes_curves(seen: list[dict[str, Any]], folder: Path) -> None:
    assert curves(folder / "log 0" / "tensorboard") == {
        tag: [(1, value)] for tag, value in scalars(1).items()
    }
    assert not (folder / "log 1").exists()


def run_log(folder: Path, first: int, stop: int, shift: float = 0.0, last: int = 9) -> None:
    log = RunLog(folder, MetricsOptions(), first, last)
    log.text("config", "text", first)
    for step in range(first + 1, stop + 1):
        log.step(step, {tag: value + shift for tag, value in scalars(step).items()}, 0.5)
    log.close()


@pytest.mark.parametrize(("stop", "resume"), [(6, 4), (6, 6), (3, 0)])
def test_a_resume_leaves_no_zig_zag(stop: int, resume: int, tmp_path: Path) -> None:
    run_log(tmp_path, 0, stop)
    run_log(tmp_path, resume, 9, shift=100.0)
    found = curves(tmp_path / "tensorboard")
    assert found.keys() == scalars(1).keys()
    for tag, points in found.items():
        wanted = [(step, scalars(step)[tag] + 100.0 * (step > resume)) for step in range(1, 10)]
        assert points == wanted


def test_the_progress_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, MetricsOptions(tensorboard=False), 2, 7203)
    values = {"train/loss": 0.12345, "train/lr": 1e-5, "train/grad_norm": 2, "perf/tokens_per_s": 12345.6}
    log.step(3, values, 1.5)
    log.close()
    assert capsys.readouterr().out == (
        "step 3/7203 | loss 0.1235 | lr 1.00e-05 | grad_norm 2.000 | 1.500 s/step | 12,346 tokens/s"
        " | 3:00:00 left\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_times_start_anew_at_every_reading() -> None:
    times, before = StepTimes(torch.device("cpu")), time.perf_counter()
    for part, seconds in (("data", 0.01), ("forward", 0.02), ("data", 0.01)):
        with times.host(part) if part == "data" else times.device(part):
            time.sleep(seconds)
    elapsed, parts = times.read()
    assert 0.04 <= elapsed <= time.perf_counter() - before + 0.01
    assert parts.keys() == {"data", "forward"} and min(parts.values()) >= 0.02
    assert sum(parts.values()) <= elapsed
    again, parts = times.read()
    assert again < elapsed and parts == {}


def test_speed_is_that_of_the_whole_world() -> None:
    """4 ranks, 2 steps in 8 s, 1e12 FLOP/s at best: 8e12 of the 32e12 that they could have done."""
    counted = DataReading(tokens=400, model_flops=8e12, hardware_flops=16e12, curves={})
    found = speed(counted, 8.0, {"data": 2.0, "forward": 4.0}, 2, 4, 1e12)
    assert found == {
        "perf/step_time": 4.0,
        "perf/tokens_per_s": 50.0,
        "perf/tflops_per_gpu": 0.25,
        "perf/mfu": 0.25,
        "perf/hfu": 0.5,
        "perf/data_wait": 0.25,
        "perf/time_data": 1.0,
        "perf/time_forward": 2.0,
    }
    assert "perf/mfu" not in speed(counted, 8.0, {}, 2, 4, None)


def test_env_json_holds_nothing_of_the_shells_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAWAN_TEST_TOKEN", "planted-secret-5a17")
    text = json.dumps(metrics.describe_environment())
    assert "planted-secret-5a17" not in text
    assert not [name for name in os.environ if f'"{name}"' in text]
    assert {"code", "python", "torch", "cuda", "deepspeed", "host", "gpus"} == json.loads(text).keys()


def test_peak_memory_is_in_gib() -> None:
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    found = metrics.peak_memory(torch.device("cpu"))["mem/peak_host_gib"] * 2**20
    # Not equal: the peak of the process that started this one counts too.
    assert kibibytes / 2 < found < kibibytes * 50


@pytest.mark.parametrize("cadence", [0, -1])
def test_a_cadence_below_1_is_refused(cadence: int) -> None:
    metrics.check(MetricsOptions(log_every=1))
    with pytest.raises(ValueError, match=f"log_every {cadence} must be 1 or more"):
        metrics.check(MetricsOptions(log_every=cadence))


POINT = {"train/loss": 0.5, "train/lr": 1e-3, "train/grad_norm": 2.0, "perf/tokens_per_s": 1234.5}


def test_a_log_folder_that_cannot_be_written_is_said_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").touch()
    log = RunLog(tmp_path, MetricsOptions(), 0, 9)
    for step in (1, 2):
        log.step(step, POINT, 0.1)
    log.close()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: no TensorBoard events from here on: ") and str(tmp_path) in first
    assert [line.split(" | ")[0] for line in lines] == ["step 1/9", "step 2/9"]


def test_a_disk_that_fills_up_is_said_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path, MetricsOptions(), 0, 9)
    log.step(1, POINT, 0.1)

    def full(summary: object, step: int) -> None:
        raise OSError(28, "No space left on device")

    assert log._writer is not None
    monkeypatch.setattr(log._writer._get_file_writer(), "add_summary", full)
    for step in (2, 3):
        log.step(step, POINT, 0.1)
    log.text("config", "text", 3)
    log.close()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == ["warning: no TensorBoard events from here on: [Errno 28] No space left on device"]
