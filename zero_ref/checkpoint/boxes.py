"""From slices of flat buffers to boxes of tensors.

A slice of a flat buffer holds a range of a tensor's elements, in row-major order. Files, and those
who read them, know boxes: offsets and sizes in each dimension. A range of a matrix is up to three
boxes (what is left of a row, whole rows, the beginning of a row); with n dimensions, up to 2n-1.

    range 3:13 of (4, 5)     · · · a a
                             b b b b b
                             c c c · ·
                             · · · · ·
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """offsets, sizes: elements, for each dimension. begin: of its first element, in the flattened
    tensor, where it lies in one piece."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.sizes)


def boxes(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """The elements from begin to end of a tensor of this shape, in their order."""
    if begin >= end:
        return []
    whole = Box((0,) * len(shape), tuple(shape), 0)
    if (begin, end) == (0, whole.end):
        return [whole]
    if len(shape) == 1:
        return [Box((begin,), (end - begin,), begin)]
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # the whole rows
    if first > last:  # inside of one row
        return _in_row(shape, last, begin, end)
    rows = Box((first, *whole.offsets[1:]), (last - first, *shape[1:]), first * row)
    return [*_in_row(shape, first - 1, begin, first * row), *[rows] * (last > first),
            *_in_row(shape, last, last * row, end)]


def _in_row(shape, index, begin, end):
    start = index * math.prod(shape[1:])
    return [Box((index, *box.offsets), (1, *box.sizes), start + box.begin)
            for box in boxes(shape[1:], begin - start, end - start)]
