"""Workers that fail in each way a rank can; started by test_distributed.py. Torch is imported where it is used."""

import os
import subprocess
import sys
import time
from typing import Any


def echo(value: Any, scale: float = 1.0) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    dist.barrier()
    dist.destroy_process_group()
    return {
        "value": value,
        "rank": rank,
        "world": world,
        "local": (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]),
        "threads": torch.get_num_threads(),
        "total": total * scale,
        "pid": os.getpid(),
    }


def no_tensor_needed(numbers: list[int]) -> int:
    return sum(numbers) + int(os.environ["RANK"])


def one_raises(guilty: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == guilty:
        raise ValueError("the guilty rank says this")
    dist.barrier()  # fails here as a consequence: the group is broken


def one_exits(guilty: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == guilty:
        print("last line of the rank that left", flush=True)
        os._exit(7)
    dist.barrier()


def one_hangs(guilty: int, pid_folder: str) -> str:
    """The guilty rank starts a child in its process group and waits for ever."""
    if int(os.environ["RANK"]) == guilty:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(f"{pid_folder}/child", "w") as file:
            file.write(str(child.pid))
    with open(f"{pid_folder}/rank{os.environ['RANK']}", "w") as file:
        file.write(str(os.getpid()))
    if int(os.environ["RANK"]) == guilty:
        wait_for_ever_in_here()
    return "done"


def wait_for_ever_in_here() -> None:
    while True:
        time.sleep(0.1)


def returns_object() -> object:
    return object()


def mixed(nested: dict[str, Any]) -> dict[str, Any]:
    """Return what came in, with every tensor doubled."""
    twice = nested["list"][1] * 2
    return {"list": [nested["list"][0], twice], "half": nested["half"] * 2, "none": nested["none"]}
