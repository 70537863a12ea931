"""What a look at a dataset says: a table for people, a document for programs, a picture of the buckets."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from megawan import cost
from megawan.data.balance import deal, imbalance
from megawan.data.buckets import Bucket
from megawan.data.inspection import Checked
from megawan.data.sampler import GlobalOrder
from megawan.data.streams import by_shape

STEPS_LOOKED_AT = 200


@dataclass(frozen=True)
class Layout:
    """How a training will divide its batches. Raises ValueError for a number below 1, and for groups that
    micro-batches do not fill or that do not fill a step."""

    micro_batch: int
    accumulation: int
    dp_size: int
    cp_size: int
    shape_group: int = 0
    """--data.shape_group of the training; 0: the whole step."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1 and name != "shape_group":
                raise ValueError(f"--{name} {value} must be 1 or more")
        if self.group < 1 or self.group % self.micro_batch or self.global_batch % self.group:
            raise ValueError(
                f"--shape_group {self.shape_group} must be a multiple of --micro_batch {self.micro_batch} and"
                f" divide the global batch of {self.global_batch}"
            )

    @property
    def group(self) -> int:
        """Samples in a row that have one shape."""
        return self.shape_group or self.global_batch

    @property
    def global_batch(self) -> int:
        """Videos of one optimizer step."""
        return self.micro_batch * self.accumulation * self.dp_size


def summarise(found: Sequence[Checked], layout: Layout, shape: cost.ModelShape) -> dict[str, Any]:
    """Return the dataset in numbers: buckets, what is dropped, what a step of the layout costs `shape`."""
    batch = layout.global_batch
    buckets: list[dict[str, Any]] = [
        {
            "size": str(bucket),
            "frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "clips": clips,
            "samples": samples,
            "tokens": tokens,
            "tokens_per_step": tokens * batch,
            "tokens_per_rank": cost.local_tokens(tokens, layout.cp_size),
            "tflop_per_step": cost.train_flops(shape, tokens) * batch / 1e12,
        }
        for bucket, clips, samples, tokens in buckets_of(found)
    ]
    samples = sum(bucket["samples"] for bucket in buckets)

    def mean(name: str) -> float:
        return sum(bucket["samples"] * bucket[name] for bucket in buckets) / samples if samples else 0.0

    kept = [checked for checked in found if checked.dropped is None]
    return {
        "rows": len(found),
        "dropped": len(found) - len(kept),
        "captions_checked": all(checked.caption_tokens is not None for checked in found),
        "captions_cut": sum(checked.caption_cut for checked in kept),
        "noted": sum(bool(checked.warnings) for checked in kept),
        "samples": samples,
        "buckets": buckets,
        "layout": {
            **asdict(layout),
            "global_batch": batch,
            "steps_per_epoch": -(-samples // batch),
            "mean_tokens_per_step": mean("tokens_per_step"),
            "mean_tflop_per_step": mean("tflop_per_step"),
            "imbalance": expected_imbalance(found, layout, shape),
        },
    }


def expected_imbalance(found: Sequence[Checked], layout: Layout, shape: cost.ModelShape) -> float:
    """Return the work of the dearest rank over that of the mean rank, in the steps of an epoch, of which it
    looks at the first STEPS_LOOKED_AT: what `data/imbalance` will show. 1 where every step has one shape."""
    buckets = buckets_of(found)
    if layout.group == layout.global_batch or len(buckets) < 2:
        return 1.0
    rows = [(0, bucket.frames, bucket.height, bucket.width) for bucket, _, _, _ in buckets]
    costs: dict[tuple[int, ...], float] = {
        row: float(cost.train_flops(shape, each[3])) for row, each in zip(rows, buckets, strict=True)
    }
    shapes = [row for row, each in zip(rows, buckets, strict=True) for _ in range(each[2])]
    order = GlobalOrder(by_shape(shapes), seed=0, global_batch=layout.global_batch, group=layout.group)
    ratios = []
    for step in range(min(-(-len(shapes) // layout.global_batch), STEPS_LOOKED_AT)):
        heads = order.step(step)[:: layout.micro_batch]
        of_step = [costs[order.streams[place.stream].shape] for place in heads]
        ratios.append(imbalance(of_step, deal(of_step, layout.accumulation, layout.dp_size)))
    return sum(ratios) / len(ratios)


def buckets_of(found: Sequence[Checked]) -> list[tuple[Bucket, int, int, int]]:
    """Return (bucket, clips, samples, tokens of a sample) of every bucket in use, smallest first."""
    clips: Counter[Bucket] = Counter()
    samples: Counter[Bucket] = Counter()
    tokens: dict[Bucket, int] = {}
    for checked in found:
        if checked.bucket is not None and checked.dropped is None:
            clips[checked.bucket] += 1
            samples[checked.bucket] += len(checked.starts)
            tokens[checked.bucket] = checked.tokens
    return [(bucket, clips[bucket], samples[bucket], tokens[bucket]) for bucket in sorted(clips)]


def described(checked: Checked) -> dict[str, Any]:
    """Return one clip for the JSON document."""
    seen, bucket = checked.look, checked.bucket
    return {
        "row": checked.row.number,
        "file": str(checked.row.path),
        "readable": seen is not None,
        "dropped": checked.dropped,
        "warnings": checked.warnings,
        "caption_tokens": checked.caption_tokens,
        "sha256": seen and seen.sha256,
        "frames": seen and seen.frames,
        "height": seen and seen.height,
        "width": seen and seen.width,
        "fps": seen and round(seen.fps, 3),
        "still": seen and seen.still,
        "damage": seen and seen.damage,
        "black": seen and round(seen.black, 4),
        "static": seen and seen.static,
        "cuts": seen and list(seen.cuts),
        "bucket": bucket and [bucket.frames, bucket.height, bucket.width],
        "starts": checked.starts,
        "tokens": checked.tokens,
        "kept": round(checked.kept, 4),
        "detail_kept": round(checked.detail_kept, 4),
    }


def table(found: Sequence[Checked], everything: bool) -> list[str]:
    """Return the lines of the table: what each file is, what it becomes, what was noticed."""
    lines = [f"{'row':>6}  {'frames':>6} {'size':>9} {'fps':>6}  {'bucket':<12} {'n':>3} {'tokens':>7}  file"]
    for checked in found:
        seen, notes = checked.look, list(checked.warnings)
        if checked.dropped is not None:
            notes.insert(0, f"DROPPED: {checked.dropped}")
        if not (everything or notes):
            continue
        what = f"{'-':>6} {'-':>9} {'-':>6}"
        if seen is not None:
            rate = f"{seen.fps:.4g}" if seen.fps else "image"
            what = f"{seen.frames:>6} {f'{seen.width}x{seen.height}':>9} {rate:>6}"
        becomes = f"{'-':<12} {'-':>3} {'-':>7}"
        if checked.dropped is None:
            becomes = f"{checked.bucket!s:<12} {len(checked.starts):>3} {checked.tokens:>7}"
        name = checked.row.path.name
        name = name if name.isprintable() else ascii(name)
        lines.append(f"{checked.row.number:>6}  {what}  {becomes}  {name}")
        lines += [f"{'':>8}{note}" for note in notes]
    return lines


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return the lines after the table: buckets, the layout's step, and the verdict."""
    layout, samples = summary["layout"], summary["samples"]
    size, whole = (
        layout["shape_group"] or layout["global_batch"],
        "group" if layout["shape_group"] else "batch",
    )
    lines = ["", f"{'bucket':<16} {'clips':>7} {'samples':>8} {'tokens':>8} {'tokens/step':>12}"]
    for bucket in summary["buckets"]:
        lines.append(
            f"{bucket['size']:<16} {bucket['clips']:>7} {bucket['samples']:>8} {bucket['tokens']:>8,}"
            f" {bucket['tokens_per_step']:>12,}"
            + (f"  fewer samples than a {whole}" if bucket["samples"] < size else "")
        )
    lines += [
        "",
        f"{samples} samples; a step of {layout['global_batch']} (micro_batch {layout['micro_batch']} x"
        f" accumulation {layout['accumulation']} x dp {layout['dp_size']}) has"
        f" {layout['mean_tokens_per_step']:,.0f} tokens and {layout['mean_tflop_per_step']:,.3g} TFLOP on"
        f" average with {summary['variant']}; an epoch has about {layout['steps_per_epoch']:,} steps"
        + (f"; the dearest rank has {layout['imbalance']:.2f} of the mean" if layout["shape_group"] else ""),
        f"{summary['rows']} rows: {summary['dropped']} would be dropped, {summary['noted']} have notes,"
        + (
            f" {summary['captions_cut']} captions would be cut"
            if summary["captions_checked"]
            else " captions not measured (give --tokenizer)"
        ),
    ]
    return lines


def draw_histogram(found: Sequence[Checked], title: str) -> Image.Image:
    """Return a picture of bars: the samples of every bucket (frames x height x width)."""
    rows = [(str(bucket), samples) for bucket, _, samples, _ in buckets_of(found)]
    font, line, left, room = ImageFont.load_default(size=14), 22, 190, 560
    sheet = Image.new("RGB", (left + room + 90, line * (len(rows) + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 4), f"samples by bucket (frames x height x width): {title}", fill="black", font=font)
    most = max((samples for _, samples in rows), default=1)
    for place, (label, samples) in enumerate(rows):
        top = line * (place + 1) + 8
        right = left + max(round(room * samples / most), 1)
        draw.text((10, top - 3), label, fill="black", font=font)
        draw.rectangle((left, top, right, top + line - 9), fill=(70, 110, 180))
        draw.text((right + 6, top - 3), str(samples), fill="dimgray", font=font)
    return sheet
