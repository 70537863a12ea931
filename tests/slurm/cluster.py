"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with files of its own in one
folder, and nothing left when it ends."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megawan.dist import free_port

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")


def missing() -> str:
    """Return why no Slurm can be started here; empty when one can."""
    absent = [name for name in PROGRAMS if _which(name) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine (Debian: apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "slurmctld and slurmd are started as root here"


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Slurm:
    """Start with `start`, end with `stop`; `environment` is what its commands need."""

    def __init__(self, folder: Path, python: str, jobs: Path) -> None:
        """`jobs`: where they write what they print."""
        self.folder = folder
        self.jobs = jobs
        self.python = python
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(python).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MEGAWAN_PYTHON": python,
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        for name in ("state", *(f"spool_{node}" for node in NODES)):
            (self.folder / name).mkdir()
        socket_file = self.folder / "munge.socket"
        self._configure(socket_file)
        self._start(
            "munged", "--foreground", "--force",
            f"--key-file={self.folder}/munge.key", f"--socket={socket_file}",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        until(socket_file.exists, "munged's socket")
        self._start("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        until(lambda: self.states() == ["idle"] * len(NODES), "two idle nodes", 60)

    def _configure(self, socket_file: Path) -> None:
        host, folder = socket.gethostname(), self.folder
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8"
            " RealMemory=4000 Gres=gpu:8"
            for node in NODES
        )
        devices = [folder / f"gpu{number}" for number in range(8)]
        for device in devices:
            device.touch()
        (folder / "gres.conf").write_text(
            "".join(f"NodeName={node} Name=gpu File={folder}/gpu[0-7]\n" for node in NODES)
        )
        (folder / "slurm.conf").write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={free_port()}
AuthType=auth/munge
AuthInfo=socket={socket_file},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=8
KillWait=5
SchedulerParameters=sched_interval=1,sched_min_interval=500000
InactiveLimit=0
{nodes}
PartitionName=all Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
""",
            "utf-8",
        )

    def _start(self, program: str, *words: str, name: str = "") -> None:
        name = name or program
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [str(_which(program)), *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start("slurmd", "-D", "-N", node, name=f"slurmd_{node}")

    def crash_node(self, node: str) -> None:
        """Kill a node's slurmd and all that runs on it, as a power failure would."""
        self._daemons[f"slurmd_{node}"].kill()
        self._daemons[f"slurmd_{node}"].wait()
        for pid in self._processes(f"SLURMD_NODENAME={node}"):
            _kill(pid)

    def stop(self) -> None:
        """Cancel all jobs and kill all daemons and whatever any job left."""
        subprocess.run(["scancel", "--full", "--user=root"], env=self.environment, check=False, timeout=20)
        for name in ("slurmctld", *(f"slurmd_{node}" for node in NODES), "munged"):
            daemon = self._daemons.get(name)
            if daemon is not None:
                _kill(daemon.pid)
                daemon.wait()
        for pid in self._processes(f"SLURM_CONF={self.folder}/slurm.conf"):
            _kill(pid)

    def leftovers(self, job: str) -> list[str]:
        """Return the command lines of what still runs of a job."""
        return [
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            for pid in self._processes(f"SLURM_JOB_ID={job}")
            if Path(f"/proc/{pid}/cmdline").exists()
        ]

    def _processes(self, variable: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and variable.encode() in (entry / "environ").read_bytes().split(
                    b"\0"
                ):
                    found.append(int(entry.name))
            except OSError:  # it ended meanwhile
                continue
        return [pid for pid in found if pid != os.getpid()]

    def run(self, *words: object, cwd: Path | None = None, **variables: str) -> str:
        """Return what a Slurm command prints."""
        done = subprocess.run(
            [str(word) for word in words],
            env={**self.environment, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{words}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def states(self) -> list[str]:
        """Return the state of every node."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()

    def state(self, job: str) -> str:
        """Return the state of a job: PENDING, RUNNING, COMPLETED, FAILED ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return next(word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState="))

    def wait(self, job: str, wanted: Sequence[str] = ("COMPLETED",), timeout: float = 240) -> None:
        """Return once the job is in one of the wanted states; raise when it ends otherwise, or takes too
        long."""
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in wanted:
            if time.monotonic() > end or state in (
                "FAILED",
                "CANCELLED",
                "TIMEOUT",
                "NODE_FAIL",
                "COMPLETED",
            ):
                raise AssertionError(f"job {job} is {state}, not {wanted}\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """Return the ends of the daemons' logs and of the jobs' outputs."""
        files = [*self.folder.glob("*.log"), *self.jobs.rglob("*.out")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


def until(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    """Return once the condition holds; raise TimeoutError naming what did not come."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come in {timeout:g} s")
        time.sleep(0.1)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
