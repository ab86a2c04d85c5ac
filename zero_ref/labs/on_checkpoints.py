"""An exercise on checkpoints: what four ranks have saved is loaded on three."""

import torch
import torch.distributed as dist
from torch import Tensor

from . import small
from .exercise import Exercise, Mistake, Observed


class Saved:
    """What one rank has written of a parameter: the elements from begin to end, in a file."""

    def __init__(self, values: Tensor, begin: int, end: int, log: list[int]):
        self.begin, self.end = begin, end
        self._values, self._log = values, log

    def read(self, begin: int, end: int) -> Tensor:
        """The parameter's elements from begin to end, 1-D. The file has to have all of them."""
        if begin > end:
            raise ValueError(f"from {begin} to {end} there is nothing to read")
        if not self.begin <= begin <= end <= self.end:
            raise ValueError(f"this file has the elements from {self.begin} to {self.end}, and not "
                             f"those from {begin} to {end}")
        self._log.append(end - begin)
        return self._values[begin:end].clone()


def load_slice(files, begin, end):
    """files: what each rank has saved, in any order → the elements from begin to end, 1-D."""
    parts = [torch.empty(0)]
    for file in sorted(files, key=lambda file: file.begin):
        low, high = max(begin, file.begin), min(end, file.end)
        if low < high:
            parts.append(file.read(low, high))
    return torch.cat(parts)


def _observe_load(answer) -> Observed:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: Observed = {}
    for numel, of in ((20, 4), (17, 4), (2, 4), (9, 5), (12, world_size)):
        values, log = torch.arange(numel) + 0.5, []
        bounds = [small.shard_bounds(numel, of, r) for r in range(of)]
        files = [Saved(values, begin, end, log)
                 for begin, end in bounds[1::2] + bounds[::2]]  # as a folder may list them
        own = small.shard_bounds(numel, world_size, rank)
        what = f"{numel} elements, saved by {of} ranks, loaded on {world_size}"
        found[what] = answer(files, *own)
        found[f"{what}: elements read"] = sum(log)
    return found


# ---- wrong answers -------------------------------------------------------------------------------


def _all_of_it(files, begin, end):
    whole = torch.cat([file.read(file.begin, file.end)
                       for file in sorted(files, key=lambda file: file.begin)])
    return whole[begin:end]


def _whole_files(files, begin, end):
    touched = [file for file in sorted(files, key=lambda file: file.begin)
               if file.begin < end and begin < file.end]
    if not touched:
        return torch.empty(0)
    whole = torch.cat([file.read(file.begin, file.end) for file in touched])
    return whole[begin - touched[0].begin :][: end - begin]


def _as_they_are_listed(files, begin, end):
    parts = [torch.empty(0)]
    for file in files:
        low, high = max(begin, file.begin), min(end, file.end)
        if low < high:
            parts.append(file.read(low, high))
    return torch.cat(parts)


def _own_file(files, begin, end):
    file = sorted(files, key=lambda file: file.begin)[dist.get_rank()]
    return file.read(file.begin, file.end)


def _first_file_alone(files, begin, end):
    for file in files:
        if file.begin <= begin < file.end:
            return file.read(begin, min(end, file.end))
    return torch.empty(0)


def _counted_from_the_file(files, begin, end):
    parts = [torch.empty(0)]
    for file in sorted(files, key=lambda file: file.begin):
        low, high = max(begin, file.begin), min(end, file.end)
        if low < high:
            parts.append(file.read(low - file.begin, high - file.begin))
    return torch.cat(parts)


def _nothing_to_join(files, begin, end):
    parts = [file.read(max(begin, file.begin), min(end, file.end))
             for file in sorted(files, key=lambda file: file.begin)
             if max(begin, file.begin) < min(end, file.end)]
    return torch.cat(parts)


def _asks_every_file(files, begin, end):
    return torch.cat([file.read(max(begin, file.begin), min(end, file.end))
                      for file in sorted(files, key=lambda file: file.begin)])


ON_CHECKPOINTS: dict[str, Exercise] = {
    "7.5": Exercise(
        "a function (files, begin, end) → 1-D tensor", _observe_load, load_slice, [
            Mistake(_all_of_it, "The values are right, and every rank has read the whole "
                    "parameter. For a model that fits no rank that is too much: read what you need "
                    "alone."),
            Mistake(_whole_files, "The values are right. Of the files that hold something of "
                    "yours, you have read the rest, too."),
            Mistake(_as_they_are_listed, "The elements are right, and not their order: files come "
                    "in any order."),
            Mistake(_own_file, "That is what the rank of your number had when it was saved. Fewer "
                    "ranks have longer slices, which begin elsewhere.",
                    by=["20 elements, saved by 4 ranks, loaded on 3"]),
            Mistake(_first_file_alone, "A slice may lie in several files: where does yours end, "
                    "and where does the file?"),
            Mistake(_counted_from_the_file, "`read` counts the parameter's elements, not those of "
                    "the file.", "this file has the elements from"),
            Mistake(_nothing_to_join, "A rank's slice may be empty, and then there is nothing to "
                    "join: it still gets a tensor, without elements.", "non-empty"),
            Mistake(_asks_every_file, "Some files hold nothing of your slice: the larger begin "
                    "lies behind the smaller end there.", "there is nothing to read"),
        ],
        {"20 elements, saved by 4 ranks, loaded on 3": "Which elements are this rank's, and in "
         "which files are they?"},
        world_sizes=(3, 4)),
}
