"""What ranks do wrong, for the test of the harness."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def _linger(folder: str) -> None:
    """Leave a child behind and note both process numbers."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(folder) / f"pids-{os.environ['RANK']}").write_text(f"{os.getpid()} {child.pid}")


def echo(folder: str, value: float) -> dict[str, object]:
    return {"rank": int(os.environ["RANK"]), "world": int(os.environ["WORLD_SIZE"]), "value": value}


def fail(folder: str, rank: int, how: str) -> None:
    """Rank `rank` fails as `how` says; the others would wait for ten minutes."""
    _linger(folder)
    if int(os.environ["RANK"]) == rank:
        while not all(
            (Path(folder) / f"pids-{other}").exists() for other in range(int(os.environ["WORLD_SIZE"]))
        ):
            time.sleep(0.02)
        if how == "raise":
            raise ValueError(f"rank {rank} has had enough")
        if how == "exit":
            print("gone without a word", flush=True)
            os._exit(7)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def start_and_wait(folder: str) -> None:
    """A test that is killed while its ranks run: started by the harness' own test."""
    from tests.distributed import run_distributed

    run_distributed(
        "tests.parallel.ill_workers:fail", 2, arguments={"folder": folder, "rank": 5, "how": "hang"}
    )
