"""The tests that guard a run can fail: one guard at a time is taken out of a copy of the source, and a test
must notice. Part of `pytest -m faults`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

MUTATIONS = {
    "no agreement that all ranks wrote": (
        "megawan/saving.py",
        "written = dist.all_succeeded(not problem, group)",
        "written = True",
        "tests/test_checkpoint.py",
    ),
    "no barrier: rank 0 commits before the others wrote": (
        "megawan/saving.py",
        "    written = dist.all_succeeded(not problem, group)\n"
        "    entries = _share_entries(digest, size, group)\n"
        "    if written and",
        '    written, entries = True, {rank_file(rank): {"bytes": size, "sha256": digest}}\n'
        "    if written and",
        "tests/test_checkpoint.py",
    ),
    "latest before the rename": (
        "megawan/saving.py",
        "        aside.rename(final)\n        sync(final.parent)\n"
        '        write_text(final.parent / "latest", final.name + "\\n")\n',
        '        write_text(final.parent / "latest", final.name + "\\n")\n'
        "        aside.rename(final)\n        sync(final.parent)\n",
        "tests/test_checkpoint.py",
    ),
    "the step folder has its name before the disk has its files": (
        "megawan/saving.py",
        '    write_json(aside / "manifest.json", manifest)\n    sync(aside)\n',
        '    write_json(aside / "manifest.json", manifest)\n',
        "tests/test_checkpoint.py",
    ),
    "a small file has its name before the disk has its bytes": (
        "megawan/files.py",
        "        sync(aside)\n        _rename(aside, path)\n",
        "        _rename(aside, path)\n        sync(path)\n",
        "tests/test_checkpoint.py",
    ),
    "a file of tensors has its name before the disk has its bytes": (
        "megawan/files.py",
        "        file.flush()\n        os.fsync(file.fileno())\n",
        "        file.flush()\n",
        "tests/test_checkpoint.py",
    ),
    "the newest is that of the youngest file": (
        "megawan/checkpoint.py",
        "return sorted(found, key=step_of, reverse=True)",
        "return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)",
        "tests/test_checkpoint.py",
    ),
    "hashes are not looked at": (
        "megawan/checkpoint.py",
        'if contents and sha256(file) != entry["sha256"]:',
        "if False:",
        "tests/test_checkpoint.py",
    ),
    "views instead of copies are written aside": (
        "megawan/saving.py",
        "return self._buffers[key].copy_(values.flatten(), non_blocking=True)",
        "return values.flatten()",
        "tests/test_run.py",
    ),
    "the moving average is not saved": (
        "megawan/trainer.py",
        "            yield from engines.cut(self.engine, EMA, self.average.buffers)",
        "            yield from ()",
        "tests/test_faults.py::test_a_rank_killed_while_it_writes_costs_nothing_but_the_steps_since",
    ),
    "the moving average is not continued": (
        "megawan/trainer.py",
        "if self.average is not None and saved.has_ema:",
        "if False:",
        "tests/test_faults.py::test_a_rank_killed_while_it_writes_costs_nothing_but_the_steps_since",
    ),
    "noise of the step instead of the sample and epoch": (
        "megawan/trainer.py",
        "sample_ids=batch.sample_ids,",
        "sample_ids=batch.sample_ids + torch_dist.get_rank(),",
        "tests/test_training.py",
    ),
    "the learning rate starts anew": (
        "megawan/engine.py",
        "schedule.last_epoch = saved.step",
        "schedule.last_epoch = 0",
        "tests/test_faults.py::test_a_rank_killed_while_it_writes_costs_nothing_but_the_steps_since",
    ),
    "Adam counts skipped steps": (
        "megawan/engine.py",
        "_set_adam_step(engine, saved.step - saved.skipped_steps)",
        "_set_adam_step(engine, 0)",
        "tests/test_training.py",
    ),
    "an exploding loss is not held back": (
        "megawan/trainer.py",
        "self.engine.backward(self._bounded(result.loss, result.per_sample))",
        "self.engine.backward(result.loss)",
        "tests/test_faults.py::test_a_step_that_is_no_number_on_one_rank_moves_no_weight_on_any",
    ),
    "a rank skips its bad step alone": (
        "megawan/train.py",
        '        watch.at(step, "forward and backward", samples)\n',
        '        watch.at(step, "forward and backward", samples)\n'
        "        if not all(batch.latents.isfinite().all() for batch in micro_batches):\n"
        "            continue\n",
        "tests/test_faults.py::test_a_step_that_is_no_number_on_one_rank_moves_no_weight_on_any",
    ),
    "each rank looks at its own samples only": (
        "megawan/agreement.py",
        "broken = [place for place, (high, low) in enumerate(pairs) if high != -low]",
        "broken = []",
        "tests/test_run.py",
    ),
    "a signal is heard by one rank only": (
        "megawan/agreement.py",
        "level = int(vote[-1])",
        "level = self._wish()",
        "tests/test_run.py",
    ),
    "a lock is always stale": (
        "megawan/run_folder.py",
        'if alive and not (mine["job"]',
        'if False and not (mine["job"]',
        "tests/test_run.py",
    ),
    "an unsafe change goes through": (
        "megawan/changes.py",
        "return [name for name in UNSAFE if name in touched and name not in allowed]",
        "return []",
        "tests/test_run.py",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated")
    for name in ("megawan", "tests", "tools", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_guard_that_is_taken_out_is_missed(name: str, copy: Path) -> None:
    file, old, new, tests = MUTATIONS[name]
    source = (copy / file).read_text("utf-8")
    assert source.count(old) == 1, f"{file} no longer has {old!r}"
    (copy / file).write_text(source.replace(old, new), "utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
    finally:
        (copy / file).write_text(source, "utf-8")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
