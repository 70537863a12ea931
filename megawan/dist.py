"""Process group, rank helpers and agreement checks; the only reader of environment variables.

`deepspeed`, `torchrun`, `srun` and plain `python` all end here: RANK, WORLD_SIZE and LOCAL_RANK decide, and
without them the process is a world of one.
"""

import ctypes
import datetime
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as torch_dist

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Environment:
    """What the launcher says about this process: ranks and sizes, before any process group exists."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Return the launcher's view of this process; a world of one when nothing launched it.

    Raises ValueError when a variable is not a whole number or RANK is outside WORLD_SIZE.
    """
    variables = os.environ if variables is None else variables
    rank, world_size, local_rank = (
        _whole_number(name, variables.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    if rank >= world_size:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={world_size}")
    local_name = "LOCAL_WORLD_SIZE" if variables.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local_world = _whole_number(local_name, variables.get(local_name) or str(world_size))
    return Environment(rank, local_rank, world_size, max(1, local_world))


def tasks(variables: Mapping[str, str] | None = None) -> Environment:
    """Return the launcher's view of a process that works without the others: torchrun's, else srun's.

    srun's step counts (SLURM_STEP_NUM_TASKS): a batch script itself also has SLURM_PROCID and SLURM_NTASKS.
    Raises ValueError as `environment`.
    """
    variables = os.environ if variables is None else variables
    if "RANK" not in variables and "SLURM_STEP_NUM_TASKS" in variables:
        names = {"RANK": "PROCID", "WORLD_SIZE": "STEP_NUM_TASKS", "LOCAL_RANK": "LOCALID"}
        variables = {ours: variables.get(f"SLURM_{theirs}", "0") for ours, theirs in names.items()}
    return environment(variables)


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(
            f"environment variable {name}={text!r} is not a whole number; the launcher must set it"
        )
    return int(text)


def job_id(variables: Mapping[str, str] | None = None) -> str:
    """Return the scheduler's number of this job, the same after a requeue; empty without a scheduler."""
    return (os.environ if variables is None else variables).get("SLURM_JOB_ID", "")


def slurm(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what Slurm says of this process's job, step and node, by the names of its variables without
    SLURM_; empty outside of Slurm."""
    variables = os.environ if variables is None else variables
    names = {name: f"SLURM_{name}" for name in ("JOB_ID", "STEP_NUM_TASKS", "STEP_NUM_NODES")}
    names["NODENAME"] = "SLURMD_NODENAME"
    return {ours: variables[theirs] for ours, theirs in names.items() if theirs in variables}


def end_with_launcher() -> None:
    """Let the kernel kill this rank when its launcher dies, and Ctrl-C end it at once.

    Nothing of a killed job stays on a GPU, not even a rank that is stopped. Does nothing in a process that
    nothing launched.
    """
    if "LOCAL_RANK" not in os.environ or not sys.platform.startswith("linux"):
        return
    # Python's own handler would wait until a collective returns, which may be never.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died in between
        leave(1)


@dataclass(frozen=True)
class Fault:
    """A fault that a test asks for: MEGAWAN_FAULT=step:rank:kind[@moment], several with commas between.

    Kinds: a signal's name (SIGKILL, SIGSTOP, ...), raise, slow, hang, exit; at the moment "step" (the
    default) also nan, spike and samples, which the loop itself brings about. Moments: step, write (of this
    rank's checkpoint file), commit (rank 0, before the step folder gets its name), and of step 0 health
    (before the health check) and collective (of the preflight; there also nan). Restarted runs have none.
    """

    step: int
    rank: int
    kind: str
    moment: str


def faults(variables: Mapping[str, str] | None = None) -> list[Fault]:
    """Return the faults that this process is asked to show; none outside of tests."""
    variables = os.environ if variables is None else variables
    restarts = (variables.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if any(count != "0" for count in restarts):
        return []
    found = []
    for text in filter(None, variables.get("MEGAWAN_FAULT", "").split(",")):
        step, rank, what = text.split(":")
        kind, _, moment = what.partition("@")
        found.append(Fault(int(step), int(rank), kind, moment or "step"))
    return found


def strike(step: int, moment: str, asked: Sequence[Fault]) -> str:
    """Bring about the fault asked for at this moment of this rank, if any; return the kind when it is the
    caller's to bring about."""
    rank = torch_dist.get_rank() if torch_dist.is_initialized() else 0
    for fault in asked:
        if (fault.step, fault.rank, fault.moment) != (step, rank, moment):
            continue
        if fault.kind.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[fault.kind])
        elif fault.kind == "raise":
            raise RuntimeError(f"the fault that MEGAWAN_FAULT asks for at step {step}")
        elif fault.kind == "slow":
            time.sleep(2)
        elif fault.kind == "hang":
            time.sleep(1e6)
        elif fault.kind == "exit":
            os._exit(3)
        else:
            return fault.kind
    return ""


def pick_device(local_rank: int) -> torch.device:
    """Return this rank's device: its CUDA GPU where there is one, else the CPU.

    Raises ValueError when more ranks than GPUs were started on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: {socket.gethostname()} shows {count}; start at most {count}"
            " ranks"
        )
    return torch.device("cuda", local_rank)


def initialize(
    place: Environment, device: torch.device, timeout_s: float, backend: str | None = None
) -> None:
    """Join the default process group: `backend`, else NCCL on GPUs and gloo on CPUs; every wait in it ends
    after `timeout_s` seconds."""
    if device.type == "cpu":
        # DeepSpeed would otherwise guess its accelerator from the packages it can import.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # deepspeed's launcher sets no thread count: two ranks on two cores would run four threads.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world_size))
    else:
        torch.cuda.set_device(device)
    if "MASTER_ADDR" not in os.environ:
        if place.world_size > 1:
            raise ValueError(
                f"WORLD_SIZE={place.world_size} but MASTER_ADDR is not set; start through a launcher"
            )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1")
        os.environ["LOCAL_RANK"] = "0"
    timeout = datetime.timedelta(seconds=timeout_s)
    store, rank, world_size = next(
        torch_dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout)
    )
    # torchrun's store outlives a restart (torch 2.13): without a prefix the new ranks would find the dead
    # ones' addresses in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch_dist.PrefixStore(f"attempt_{attempt}", store)
    if backend is None:
        require_one_kind(store, rank, device, socket.gethostname())
        backend = backend_of(device)
    torch_dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )


def backend_of(device: torch.device) -> str:
    """Return the backend of process groups for tensors of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def require_one_kind(store: torch_dist.Store, rank: int, device: torch.device, host: str) -> None:
    """Raise ValueError where this rank computes on another kind of device than rank 0.

    A machine whose driver is broken shows no GPU, and its ranks would wait on gloo for others that are on
    NCCL.
    """
    if rank == 0:
        store.set("device", f"{device.type} on {host}")
    first = store.get("device").decode()
    if first.partition(" ")[0] != device.type:
        raise ValueError(
            f"rank {rank} computes on {device.type} on {host}, rank 0 on {first}: one of the two sees no GPU"
        )


def shutdown() -> None:
    """Leave the process group, all ranks together: a rank that leaves early can abort a slower one on
    gloo."""
    if torch_dist.is_initialized():
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with `code` now, after its last line, without taking the interpreter down first.

    DeepSpeed keeps process groups for good, and a gloo thread that drops the last tensor of a collective
    while the interpreter goes down aborts the process ("terminate called without an active exception",
    exit code -6) after a run that did all it should: torch's destroy_process_group does not end the threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_main() -> bool:
    """Return True on global rank 0 and in a process without a group."""
    return not torch_dist.is_initialized() or torch_dist.get_rank() == 0


def say(text: str) -> None:
    """Print one line, on rank 0 only, at once."""
    if is_main():
        print(text, flush=True)


def collective_device() -> torch.device:
    """Return the device whose tensors the default group can exchange."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch_dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all ranks, same shape, float32; the input is not changed."""
    total = value.detach().to(collective_device(), torch.float32, copy=True)
    torch_dist.all_reduce(total)
    return total / torch_dist.get_world_size()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, same shape and dtype, on the CPU; the input is not
    changed."""
    total = value.detach().to(collective_device(), copy=True)
    torch_dist.all_reduce(total)
    return total.cpu()


def host_group(timeout_s: float) -> torch_dist.ProcessGroup:
    """Return a new gloo group of all ranks, for host tensors; collective. On GPUs it never waits for kernels,
    and another thread may use it beside the default group."""
    return torch_dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def all_succeeded(ok: bool, group: torch_dist.ProcessGroup | None = None) -> bool:
    """Return True on every rank if `ok` is True on every rank, else False on every rank; `group` is one of
    `host_group`."""
    flag = torch.tensor(int(ok), device="cpu" if group else collective_device())
    torch_dist.all_reduce(flag, op=torch_dist.ReduceOp.MIN, group=group)
    return bool(flag)


def share_text(text: str) -> str:
    """Return rank 0's text on every rank, whatever its length and characters."""
    # A path may hold bytes that are no UTF-8; Python keeps them as surrogates.
    sent = text.encode("utf-8", "surrogatepass")
    length = torch.tensor(len(sent), device=collective_device())
    torch_dist.broadcast(length, src=0)
    buffer = torch.zeros(int(length), dtype=torch.uint8)
    if is_main():
        buffer.copy_(torch.tensor(list(sent), dtype=torch.uint8))
    buffer = buffer.to(collective_device())
    torch_dist.broadcast(buffer, src=0)
    return bytes(buffer.cpu().tolist()).decode("utf-8", "surrogatepass")


def gather_texts(text: str, group: torch_dist.ProcessGroup | None = None) -> list[str]:
    """Return every rank's text on every rank, by rank, whatever their lengths; `group` is one of
    `host_group`."""
    sent = text.encode("utf-8", "surrogatepass")
    device, world = torch.device("cpu") if group else collective_device(), torch_dist.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    torch_dist.all_gather(lengths, torch.tensor([len(sent)], device=device), group=group)
    longest = max(1, *(int(length) for length in lengths))
    mine = torch.tensor(list(sent.ljust(longest)), dtype=torch.uint8, device=device)
    every = [torch.empty_like(mine) for _ in range(world)]
    torch_dist.all_gather(every, mine, group=group)
    return [
        bytes(row.cpu().tolist()[: int(length)]).decode("utf-8", "surrogatepass")
        for row, length in zip(every, lengths, strict=True)
    ]


def require_agreement(what: str, text: str) -> None:
    """Raise RuntimeError on every rank when `text` differs between ranks, naming the ranks that differ from
    rank 0; each of them says which lines of its text do.

    One all-gather of 8 bytes a rank: cheap enough for every step, and it turns a later hang into a message.
    """
    digest = int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little"
    )
    mine = torch.tensor([digest], dtype=torch.int64, device=collective_device())
    every = [torch.empty_like(mine) for _ in range(torch_dist.get_world_size())]
    torch_dist.all_gather(every, mine)
    values = [int(value) for value in every]
    strangers = [rank for rank, value in enumerate(values) if value != values[0]]
    if strangers:
        mine_only, theirs_only = _different_lines(text, share_text(text))
        here = f"this rank has: {mine_only[:500]}; rank 0 has: {theirs_only[:500]}"
        if is_main() or not (mine_only or theirs_only):
            here = "what they have stands in their own messages"
        raise RuntimeError(f"ranks {strangers} disagree with rank 0 about the {what}; {here}")


def _different_lines(mine: str, theirs: str) -> tuple[str, str]:
    """Return the lines of each text that the other has not, joined by commas."""
    lines, others = mine.splitlines(), theirs.splitlines()
    return (
        ", ".join(line for line in lines if line not in others),
        ", ".join(line for line in others if line not in lines),
    )


class PreemptionWarning:
    """A scheduler's warning that this job ends soon: SIGUSR1 or SIGTERM, which may reach one rank or all of
    them.

    The signal is only remembered; the loop asks (megawan/agreement.py).
    """

    def __init__(self) -> None:
        self.came = ""
        """The name of the last signal that warned this rank, empty before."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.came = signal.Signals(number).name
