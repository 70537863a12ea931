"""The order of the checks: what every rank finds alone, then what they find together."""

import contextlib
import dataclasses
import json
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as torch_dist

from megawan import cli, config, dist
from megawan.metrics import software
from megawan.models.variants import get_variant
from megawan.parallel.topology import Topology
from megawan.plan import Plan, checkpoint_size, run_folder
from megawan.preflight import alone, links, together
from megawan.preflight.table import Check, Checks, failed, merge, one_line

COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True)
class Report:
    """What was found, and how to part."""

    rows: list[Check]
    world_size: int
    host: torch_dist.ProcessGroup | None
    """All ranks, over the host; None where they did not come together."""


@dataclass(frozen=True)
class PreflightConfig(config.TrainConfig):
    """The flags of a run, and those of its preflight."""

    json: bool = False
    """Print one JSON object instead of the table."""
    world_size: int | None = None
    """Judge flags, files, layout and memory for so many ranks from one process (a laptop); what needs the
    ranks themselves is not tried, and the run folder only where --output names it."""
    collective_timeout: float = 60.0
    """Seconds after which a collective is given up."""


def parse(argv: Sequence[str], *, prog: str, description: str) -> PreflightConfig:
    """Return what is to be looked at. Raises cli.UserError for flags that no run takes."""
    options = config.parse_as(PreflightConfig, argv, prog=prog, description=description)
    if options.world_size is not None and options.world_size < 1:
        raise cli.UserError(f"--world_size {options.world_size} must be 1 or more")
    if not options.collective_timeout > 0:
        raise cli.UserError(f"--collective_timeout {options.collective_timeout} must be above 0 seconds")
    # As in a dry run, a --data.source is looked at and nothing of it is encoded.
    return dataclasses.replace(options, dry_run=True)


def examine(
    options: PreflightConfig,
    place: dist.Environment,
    host: torch_dist.ProcessGroup | None = None,
    now: Callable[[], float] = time.time,
) -> Report:
    """Return all rows, the same on every rank; collective.

    `host`: a group of dist.host_group, when the ranks have joined already. `now`: this rank's clock, in
    seconds.

    Raises cli.RunFailed on ranks that the others were lost to, and cli.UserError for a --world_size under a
    launcher.
    """
    if options.world_size is not None and place.world_size > 1:
        raise cli.UserError(
            f"--world_size {options.world_size} is for one process, this is a world of {place.world_size}"
        )
    world_size = options.world_size or place.world_size
    checks = Checks()
    plan = alone.look(options, place, world_size, checks)
    try:
        device = dist.pick_device(place.local_rank)
    except ValueError:  # the row says so
        device = torch.device("cpu")
    try:
        # gloo carries what the ranks tell each other even where the GPUs' own links do not work.
        if host is None:
            dist.initialize(place, device, options.dist_timeout, backend="gloo")
            host = dist.host_group(options.dist_timeout)
    except (RuntimeError, ValueError) as error:
        if place.rank:
            raise cli.RunFailed(f"cannot join the others: {one_line(error)}") from None
        mend = "see that all ranks start, reach MASTER_ADDR, and that the first machine's port is free"
        return Report([*checks.rows, Check("process group", False, one_line(error), mend)], world_size, None)
    _look_at_software(checks, plan, device)
    try:
        rows = _together(options, place, now, checks, plan, device, world_size, host)
    except RuntimeError as error:
        raise cli.RunFailed(f"another rank was lost during the checks: {one_line(error)}") from None
    return Report(rows, world_size, host)


def _look_at_software(checks: Checks, plan: Plan | None, device: torch.device) -> None:
    """Add the rows of versions and of DeepSpeed."""
    checks.attempt(
        "software",
        software,
        lambda found: ", ".join(f"{name} {version}" for name, version in found.items() if version),
        "bash launchers/setup.sh on every machine, of one checkout",
    )

    def operations() -> str:
        from megawan import engine

        if plan is not None and plan.config.model.compile and not any(map(shutil.which, COMPILERS)):
            raise ValueError(f"--model.compile needs a C compiler; none of {', '.join(COMPILERS)} is on PATH")
        return engine.check_operations(device, None if plan is None else plan.deepspeed)

    checks.attempt(
        "deepspeed",
        operations,
        str,
        "bash launchers/setup.sh; g++ and ninja on PATH; TORCH_EXTENSIONS_DIR, a folder to write",
    )


def _together(
    options: PreflightConfig,
    place: dist.Environment,
    now: Callable[[], float],
    checks: Checks,
    plan: Plan | None,
    device: torch.device,
    world_size: int,
    host: torch_dist.ProcessGroup,
) -> list[Check]:
    hosts = dist.gather_texts(socket.gethostname(), host)
    everywhere = plan if dist.all_succeeded(plan is not None, host) else None
    if options.world_size is not None and options.output is None:
        for name in ("resume", "run folder"):
            checks.skip(name, "no --output to look at")
    else:
        path = Path(dist.share_text(str(run_folder(options))))
        together.look_at_folder(checks, path, options, everywhere, _checkpoint_size(options))
    told = [json.loads(text) for text in dist.gather_texts(json.dumps(dist.slurm()), host)]
    places = together.places_of(dist.gather_texts(together.described(place), host))
    torch_dist.barrier(host)
    times = [float(text) for text in dist.gather_texts(repr(now()), host)]
    by_rank = [
        [Check(**row) for row in json.loads(text)]
        for text in dist.gather_texts(json.dumps([dataclasses.asdict(row) for row in checks.rows]), host)
    ]
    rows = merge(by_rank, hosts)
    rows += [together.compare_clocks(times, hosts), together.compare_slurm(told, places, hosts)]
    if world_size != place.world_size:
        names = ("world", "ulysses", "ring", "health")
        return rows + [Check(name, None, f"one process cannot try {world_size} ranks") for name in names]
    kinds = set(dist.gather_texts(device.type, host))
    if len(kinds) > 1:
        names = ("world", "ulysses", "ring", "health")
        return rows + [Check(name, None, "not tried: needs a GPU for each rank") for name in names]
    try:
        topology = Topology(world_size, options.parallel.ulysses_degree, options.parallel.ring_degree)
    except ValueError:  # the row of the layout says so; the world can be tried without it
        topology = Topology(world_size)
    return rows + links.try_links(topology, device, options.collective_timeout, host)


def _checkpoint_size(options: config.TrainConfig) -> int:
    """Return the bytes of one checkpoint, 0 for a model that is not known."""
    try:
        return checkpoint_size(options, get_variant(options.model.variant))
    except ValueError:
        return 0


def leave_together(report: Report) -> NoReturn:
    """End this process, 1 when anything stops the run, once rank 0 has printed: a launcher ends all others
    when one fails."""
    if report.host is not None:
        with contextlib.suppress(RuntimeError):  # they are gone
            torch_dist.barrier(report.host)
    dist.leave(1 if failed(report.rows) else 0)
