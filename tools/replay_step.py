"""Take a step again that a run skipped, and say which of its videos made loss or gradient not finite.

    torchrun --nproc_per_node 8 tools/replay_step.py RUN/skipped/step_0001234.json [FLAGS OF train.py]

Reads RUN/config.json and the newest checkpoint before the step, takes the steps in between again and then the
one in question. Nothing is written. Flags change how it is laid out: on another number of ranks keep
micro_batch x accumulation x data parallel.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

from megawan import config, dist
from megawan.cli import UserError, run
from megawan.plan import make_plan, require_inputs

PROG = "tools/replay_step.py"


def main(argv: Sequence[str]) -> None:
    """Replay as `argv` says. Raises UserError for a mistake in the flags or a file that is no dump."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    dump_file, run_folder = Path(argv[0]), Path(argv[0]).parent.parent
    if not (run_folder / "config.json").is_file():
        raise UserError(f"{dump_file}: expected RUN/skipped/step_N.json beside RUN/config.json")
    options = config.parse(
        ["--config", str(run_folder / "config.json"), *argv[1:]], prog=PROG, description="see above"
    )
    try:
        place = dist.environment()
        device = dist.pick_device(place.local_rank)
        plan = make_plan(options, place)
        require_inputs(plan)
        dist.initialize(place, device, options.dist_timeout)

        from megawan.replay import read_dump, replay, start_before  # imports DeepSpeed
        from megawan.trainer import Trainer

        dump = read_dump(dump_file)
        for line in replay(Trainer(plan, device), start_before(run_folder / "checkpoints", dump.step), dump):
            dist.say(line)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    dist.shutdown()


if __name__ == "__main__":
    run(main, PROG, rank=dist.environment().rank, leave=dist.leave)
