"""What each rank does in the checkpoint tests; started by tests/distributed.py."""

import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from megawan import checkpoint, dist, saving
from megawan.checkpoint import MOMENTS, CheckpointOptions, Fragment
from megawan.rng import generator_at

# 1 element, odd numbers of elements, more dimensions, none at all.
SHAPES: dict[str, tuple[int, ...]] = {
    "one": (1,),
    "odd": (3, 7),
    "conv": (2, 3, 1, 5),
    "bias": (11,),
    "scalar": (),
}


def whole(kind: str, name: str, salt: int = 0) -> torch.Tensor:
    """Return a parameter's whole master or moment, flat."""
    numel = torch.Size(SHAPES[name]).numel()
    return torch.randn(numel, generator=generator_at(salt, kind, name))


def pieces(rank: int, world: int, salt: int = 0) -> Iterator[Fragment]:
    """Yield a rank's share of every parameter: views of one buffer, as ZeRO cuts them."""
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        share = -(-numel // world)
        start, stop = min(rank * share, numel), min((rank + 1) * share, numel)
        if stop > start:
            for kind in ("master", *MOMENTS):
                yield Fragment(kind, name, shape, start, whole(kind, name, salt)[start:stop])


def save(root: Path, step: int, keep_last: int = 0, salt: int = 0, keep_every: int = 0) -> str:
    """Save all ranks' pieces; return the folder, or what the OSError says."""
    place = dist.environment()
    try:
        return str(
            saving.save(
                root,
                step,
                pieces(place.rank, place.world_size, salt),
                {"variant": "debug"},
                CheckpointOptions(keep_last=keep_last, keep_every=keep_every),
            )
        )
    except OSError as error:
        return f"OSError: {error}"


def choose(root: Path, resume: str) -> str:
    """Return what is chosen, or what the ValueError says."""
    try:
        return str(checkpoint.choose(root, resume))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def names(root: Path) -> list[str]:
    """Return what lies under a folder, once no rank is at work in it."""
    torch.distributed.barrier()
    found = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    torch.distributed.barrier()
    return found


def only(rank: int) -> bool:
    """Return whether this is that rank, after all have come here."""
    torch.distributed.barrier()
    return torch.distributed.get_rank() == rank


def cases(folder: str) -> dict[str, object]:
    """Run every case in one group, each in a folder of its own; return what this rank saw."""
    place = dist.environment()
    dist.initialize(place, torch.device("cpu"), 60)
    base, seen = Path(folder), dict[str, object]()

    root = base / "full disk"  # on rank 1 alone
    seen["first"] = save(root, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if place.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    seen["no room"] = save(root, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    seen["no room leaves"] = names(root)

    root = base / "no manifest"  # rank 0 cannot write the last file
    save(root, 1)
    save(root, 2, salt=5)
    if only(0):
        (root / "latest").unlink()
        (root / "latest").mkdir()
    seen["no latest"] = [save(root, 3), save(root, 2)]
    seen["no latest leaves"] = names(root)

    root = base / "a file"  # where the folder should be
    if only(0):
        root.write_text("in the way")
    seen["no folder"] = save(root, 1)

    root = base / "kept"
    if only(0):
        for left_behind in ("step_0000002.tmp", "step_0000007.tmp", "step_0000001.replaced.tmp"):
            (root / left_behind).mkdir(parents=True)
            (root / left_behind / "rank_00000.safetensors").write_text("half")
        (root / "step_of_mine.tmp").mkdir()
    seen["leftovers are chosen"] = choose(root, "auto")
    seen["kept"] = [save(root, step, keep_last=2) for step in (1, 2, 3, 4)]
    seen["kept leaves"] = names(root)
    save(root, 4, keep_last=2, salt=9)
    seen["again leaves"] = names(root)

    root = base / "milestones"
    for step in (2, 3, 4, 5, 6, 7):
        save(root, step, keep_last=1, keep_every=3)
    seen["milestones leave"] = names(root)

    root = base / "branch"  # two later checkpoints of a run that was taken up again at an older one
    for step in (1, 5, 6):
        save(root, step)
    save(root, 2, keep_last=1)
    seen["branch leaves"] = names(root)

    root = base / "damaged"
    for step in (1, 2, 3):
        save(root, step)
    seen["sound"] = [choose(root, resume) for resume in ("auto", "must", "none", str(root / "step_0000001"))]
    if only(0):
        flip(root / "step_0000003" / "rank_00001.safetensors", -1)
    seen["newest damaged"] = [choose(root, resume) for resume in ("auto", str(root / "step_0000003"))]
    if only(0):
        for step in (1, 2):
            (root / f"step_000000{step}" / "rank_00000.safetensors").unlink()
    torch.distributed.barrier()
    seen["all damaged"] = [choose(root, resume) for resume in ("auto", "must")]

    # A rank whose disk is not the shared one sees no checkpoints: all must come to the same end.
    elsewhere = base / "damaged" if place.rank == 0 else base / "nothing"
    seen["not shared"] = [choose(elsewhere, resume).partition(":")[0] for resume in ("auto", "none")]
    dist.shutdown()
    return seen


def flip(file: Path, place: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
