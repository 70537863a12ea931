"""Which size a clip is cut to: buckets of (frames, height, width) within an area and a token budget.

Pure arithmetic. A clip of any size and length gets the bucket that shows most of it: the longest of a few
lengths that it has, and the height and width that hold the largest copy of its picture, cut least.
"""

from dataclasses import dataclass

Stride = tuple[int, int, int]

# Of one token: the transformer's patches cover 1 x 2 x 2 latent positions in every Wan.
PATCH = 2


@dataclass(frozen=True, order=True)
class Bucket:
    """Clips of one shape: what a batch may hold together."""

    frames: int
    """Frames of a clip, 4n+1."""
    height: int
    """In pixels."""
    width: int
    """In pixels."""

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Budget:
    """What buckets may cost. Raises ValueError for a budget that not even the smallest bucket fits."""

    lengths: tuple[int, ...]
    """Legal frame counts of videos, 4n+1, any order."""
    max_area: int
    """Most pixels of a frame."""
    max_tokens: int | None
    """Most tokens of a clip in the transformer, None for as many as the area gives."""
    step: int
    """Heights and widths are multiples of this."""
    stride: Stride
    """Pixels per latent position along (t, h, w)."""
    max_upscale: float = 1.0
    """Most that a picture is enlarged; 1 keeps small clips small."""

    def __post_init__(self) -> None:
        least = max(PATCH * self.stride[1], PATCH * self.stride[2])
        if self.step < least or self.step % least:
            raise ValueError(f"the step of bucket sizes must be a multiple of {least}; given: {self.step}")
        wrong = [length for length in self.lengths if length < 1 or (length - 1) % self.stride[0]]
        if wrong or not self.lengths:
            given = ", ".join(map(str, wrong)) or "none"
            raise ValueError(f"bucket lengths must be {self.stride[0]}n+1; given: {given}")
        if not self.max_upscale > 0:
            raise ValueError(f"the largest upscale must be above 0; given: {self.max_upscale:g}")
        if self.max_area < self.step**2:
            raise ValueError(
                f"an area of {self.max_area} pixels does not hold one {self.step}x{self.step} picture"
            )
        longest = Bucket(max(self.lengths), self.step, self.step)
        if self.max_tokens is not None and tokens_of(longest, self.stride) > self.max_tokens:
            raise ValueError(
                f"{self.max_tokens} tokens do not hold {longest.frames} frames of {self.step}x{self.step}"
                f" ({tokens_of(longest, self.stride)} tokens)"
            )

    def length_of(self, frames: int) -> int | None:
        """Return the longest legal length that `frames` frames hold, None when they are too few."""
        return max((length for length in self.lengths if length <= frames), default=None)

    def size_of(self, length: int, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the bucket for clips of `length` frames and pictures of height x width.

        Of all sizes within the budgets it is the one that holds the largest copy of the whole picture (in its
        own aspect ratio); among equals the one that cuts least. So at most one step of one side is cut.
        Raises ValueError for a picture that is too small or too thin for any size.
        """
        if length < 1 or height < 1 or width < 1:
            raise ValueError(f"{length} frames of {width}x{height} are no clip")
        most_steps = self._most_steps(length)
        # The picture grows by at most max_upscale; a hair more, so that 16 x 1.0 stays 16 in floats.
        rows = int(self.max_upscale * height / self.step + 1e-9)
        columns = int(self.max_upscale * width / self.step + 1e-9)
        best: tuple[tuple[int, int], tuple[int, int]] | None = None
        for row in range(1, min(rows, most_steps) + 1):
            column = min(columns, most_steps // row)
            if column < 1:
                continue
            # Width of the largest whole picture in row x column, times both heights: an integer.
            inside = min(column * height, row * width)
            # Columns beyond those that hold that picture would only be cut off again; fewer rows come by
            # themselves.
            column = -(-inside // height)
            found = (inside, -row * column), (row, column)
            best = found if best is None else max(best, found)
        if best is None:
            raise ValueError(
                f"is {width}x{height}, smaller than {self.step}x{self.step}, or too thin for the budget;"
                " allow it with --max_upscale"
            )
        return best[1][0] * self.step, best[1][1] * self.step

    def _most_steps(self, length: int) -> int:
        """Return how many step x step squares a frame may have in a clip of `length` frames."""
        by_area = self.max_area // self.step**2
        if self.max_tokens is None:
            return by_area
        return min(by_area, self.max_tokens // tokens_of(Bucket(length, self.step, self.step), self.stride))


def tokens_of(bucket: Bucket, stride: Stride) -> int:
    """Return how many tokens a clip of `bucket` has in the transformer."""
    latent_frames = (bucket.frames - 1) // stride[0] + 1
    return latent_frames * (bucket.height // (PATCH * stride[1])) * (bucket.width // (PATCH * stride[2]))


def halving_lengths(longest: int) -> tuple[int, ...]:
    """Return 4n+1 lengths from `longest` down, each about half the one before: 81, 41, 21, 9, 5.

    One frame, a still image, is only among them when it is the longest.
    """
    if longest < 1 or longest % 4 != 1:
        raise ValueError(f"the longest clip must have 4n+1 frames; given: {longest}")
    lengths, n = [longest], longest // 8
    while n:
        lengths.append(4 * n + 1)
        n //= 2
    return tuple(lengths)


def kept_share(height: int, width: int, bucket: Bucket) -> float:
    """Return which share of a picture of height x width is inside the bucket's centre crop, 0 to 1."""
    scale = max(bucket.height / height, bucket.width / width)
    return min(1.0, bucket.height * bucket.width / (scale * scale * height * width))


def upscale(height: int, width: int, bucket: Bucket) -> float:
    """Return by how much a picture of height x width is enlarged to fill the bucket; below 1 it shrinks."""
    return max(bucket.height / height, bucket.width / width)
