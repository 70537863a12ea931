"""What a run looks at on the way, beside its steps: held-out samples, and videos of the weights and their
average."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megawan import cli, dist
from megawan.data.batch import Batch, pad_text
from megawan.flow.loss import FlowSample
from megawan.metrics import RunLog
from megawan.preview_options import chosen_codec
from megawan.validation import Validation
from megawan.watch import Watch

if TYPE_CHECKING:  # DeepSpeed and codecs, seconds that a run without them does not need
    from megawan.previews import Previews
    from megawan.trainer import Trainer


def hold_out(trainer: "Trainer") -> Validation | None:
    """Return what validates a run, None for none. Raises cli.UserError where its samples cannot be read."""
    plan = trainer.plan
    if plan.held_out is None:
        return None
    try:
        validation = Validation(
            plan.held_out,
            plan.flow,
            plan.config.validation,
            plan.topology,
            dp_rank=trainer.dp_rank,
            micro_batch=plan.config.micro_batch,
            clean_frames=plan.clean_frames,
            text_len=plan.variant.config.text_len,
        )
    except ValueError as error:
        raise cli.UserError(f"--validation.path: {error}") from None
    dist.say(validation.describe())
    return validation


def choose_previews(trainer: "Trainer") -> "Previews | None":
    """Return the videos that a run samples on the way, None for none. Raises cli.UserError where a stored
    sample cannot be read, cli.RunFailed where the text encoder cannot."""
    plan, options = trainer.plan, trainer.plan.config.sample
    if not options.every:
        return None
    from megawan.previews import Previews, prompted_previews, stored_previews

    wan, store = plan.variant.config, plan.held_out or plan.data
    try:
        if options.prompts:
            longest = max(plan.data.shapes, key=math.prod)
            starts, empty = prompted_previews(options, tuple(longest), wan.text_len, wan.text_dim)
        else:
            starts = stored_previews(store, options, wan.text_len)
            empty = pad_text(store.empty_text, wan.text_len)
    except ValueError as error:
        raise cli.UserError(f"--sample.*: {error}") from None
    except RuntimeError as error:
        raise cli.RunFailed(str(error)) from None
    dist.say(f"samples: {len(starts)} videos every {options.every} steps, the end included")
    return Previews(
        options,
        starts,
        empty,
        shift=plan.config.flow.shift,
        codec=chosen_codec(options, plan.codec),
        clean_frames=plan.clean_frames,
        dp_rank=trainer.dp_rank,
        dp_size=plan.topology.dp_size,
        first=trainer.context.rank == 0,
    )


def show(trainer: "Trainer", previews: "Previews", log: RunLog, step: int, folder: Path) -> None:
    """Sample the videos with the weights, and the moving average where there is one, and show them;
    collective. What cannot be decoded or written is said, and the training goes on."""
    from megawan.previews import png

    latents = {"samples": previews.sample(trainer.velocity, trainer.device)}
    if trainer.average is not None:
        with trainer.averaged():
            latents["samples_ema"] = previews.sample(trainer.velocity, trainer.device)
    if not dist.is_main():
        return
    try:
        stored = previews.stored()
        columns = {} if stored is None else {"stored": previews.decode(stored, trainer.device)}
        columns |= {title: previews.decode(some, trainer.device) for title, some in latents.items()}
        sheet = previews.write(folder / "samples" / f"step_{step:07d}", columns)
        log.picture(step, "samples/contact_sheet", png(sheet), sheet.height, sheet.width)
        for title, videos in columns.items():
            for number, frames in enumerate(videos):
                height, width = frames.shape[1:3]
                log.picture(step, f"{title}/{number:02d}", previews.animation(frames), height, width)
    except (ValueError, OSError, RuntimeError) as error:  # of the last, one is a GPU without memory
        dist.say(f"warning: no samples of step {step}: {str(error).partition(chr(10))[0]}")


def validate(trainer: "Trainer", validation: Validation, log: RunLog, watch: Watch, step: int) -> None:
    """Write the held-out curves of the weights and, once it differs, of their average; collective.

    Every answer is a sign of life, as all of them may outlast the time-out.
    """

    def measure(batch: Batch, sample: FlowSample) -> Tensor:
        watch.at(step, "validation")
        return trainer.measure(batch, sample)

    log.scalars(step, validation.run(measure, trainer.device))
    if trainer.average is not None and step:
        with trainer.averaged():
            averaged = validation.run(measure, trainer.device)
        log.scalars(step, {tag.replace("eval/", "eval_ema/", 1): each for tag, each in averaged.items()})
