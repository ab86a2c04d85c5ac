"""`save(path, model, optimizer)`: every rank writes its own shard, and nothing is gathered."""

import json
import math
import reprlib
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from .. import comm
from ..engine.shell import Shell
from ..ranks.rank import timeout
from . import contents, folder, shards
from .folder import NoCheckpoint
from .pack import dtype_of, pack


class Saving:
    """A checkpoint that is being written. `wait()` returns its path once it is committed."""

    def __init__(self, write: Callable[[], Path], asynchronous: bool):
        self._path: Path | None = None
        self._error: Exception | None = None
        self._write = write
        self._thread = threading.Thread(target=self._run, name="zero_ref.save")
        if asynchronous:
            self._thread.start()
        else:
            self._run()
            self.wait()

    def wait(self) -> Path:
        """Raises what save would have raised, had it not been asynchronous."""
        self.finish()
        if self._path is None:
            raise OSError("this checkpoint was not committed, as has been said")
        return self._path

    def finish(self) -> None:
        """Wait until it is over, and raise its error, unless that was raised before."""
        if self._thread.ident is not None:  # it was started
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self):
        try:
            self._path = self._write()
        except Exception as error:
            self._error = error
            if threading.current_thread() is self._thread:  # a script may end and never ask
                print(f"zero_ref.save failed: {said(error)}",
                      file=sys.stderr, flush=True)
        del self._write  # and with it the copies


_unfinished: list[Saving] = []  # of this process: in a folder, one is written at a time
_groups: Any = weakref.WeakKeyDictionary()  # by model: for what is agreed on meanwhile


def save(path: str | Path, model: Shell, optimizer: Optimizer | Sequence[Optimizer], *,
         keep: int | None = None, asynchronous: bool = False, **extra: Any) -> Saving:
    """Commit a new checkpoint in the folder `path`, which all ranks see. Called on every rank.

    Each rank writes the elements that are its shard, under the names and in the shapes of the bare
    module, so that `load` fits them to any stage and any number of ranks. Each rank's random number
    generators are in it, too.

    keep: how many checkpoints stay in the folder, the newest ones; default: all.
    asynchronous: return when the shard has been copied to host memory, and write it while training
        goes on. An error is raised by `wait()` of what is returned, or by the next save or load.
        Wait for the last one before the process group is destroyed.
    extra: what else belongs to it, of rank 0: numbers, strings, tensors, lists, tuples and dicts of
        these, and objects with a state_dict(), such as a scheduler.

    Raises ValueError for what cannot be saved, and OSError if it cannot be written: on every rank,
    and the earlier checkpoints stay as they are.
    """
    group = group_of(model)
    pieces: dict[str, list[contents.Piece]] = {}
    rest, tensors, aside, problem = {}, {}, None, None
    try:
        finish_all()
        path, optimizers = Path(path), listed(optimizer)
        refuse_full_params(model)
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ValueError(f"keep={keep!r}: must be a number of checkpoints, 1 or more, or None")
        model._look_at_module()
        pieces["model"] = contents.of_model(model)
        for index, one in enumerate(optimizers):
            pieces[f"optimizer-{index}"] = contents.of_optimizer(model, one)
        rest, tensors = _rest(model, optimizers, extra)
        if asynchronous:
            pieces = {part: [piece._replace(values=piece.values.clone()) for piece in of_part]
                      for part, of_part in pieces.items()}
            tensors = {name: value.clone() for name, value in tensors.items()}
        if model.rank == 0:
            aside = folder.begin(path)
            for part in (*pieces, "rest"):
                (aside / part).mkdir()
    except Exception as error:  # whatever it is, the other ranks are not to wait
        problem = error
    try:
        name = agree(group, problem, aside and aside.name)[0]
    except BaseException:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    apart = _group_of(model) if asynchronous else group

    def write() -> Path:
        return _write(path / name, pieces, rest, tensors, keep, model.rank, apart)

    saving = Saving(write, asynchronous)
    if asynchronous:
        _unfinished.append(saving)
    return saving


def finish_all() -> None:
    """Wait for what this process is writing, and raise its error."""
    while _unfinished:
        _unfinished.pop(0).finish()


def listed(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if not (isinstance(optimizers, list | tuple) and optimizers and all(
            isinstance(one, Optimizer) for one in optimizers)):
        raise ValueError("the third argument is to be the optimizer, or a list of optimizers, and "
                         f"is {reprlib.repr(optimizer)}")
    return list(optimizers)


def group_of(model: Shell) -> dist.ProcessGroup:
    """Raises ValueError for what is no wrapped model: then no rank is known to agree with."""
    if not isinstance(model, Shell):
        raise ValueError(f"the second argument is to be what zero_ref.wrap(…) returns, and is a "
                         f"{type(model).__name__}")
    return model.group


def refuse_full_params(model: Shell) -> None:
    if model._in_full_params:
        raise ValueError("inside model.full_params() what is written is not in the shards yet: "
                         "save and load outside of it")


def agree(group: dist.ProcessGroup, problem: Exception | None, value: object = None,
          phase: str = "save") -> list:
    """Everyone's value, unless somebody has a problem: then all ranks raise that."""
    kinds = {kind.__name__: kind for kind in (NoCheckpoint, OSError, ValueError)}
    kind = next((name for name, kind in kinds.items() if isinstance(problem, kind)), "ValueError")
    text = said(problem) if problem is not None else None
    found = comm.all_gather_object([text, kind, value], group, phase=phase)
    if problem is not None:
        raise problem
    for rank, (text, kind, _) in enumerate(found):
        if text is not None:
            raise kinds[kind](f"rank {rank}: {text}")
    return [value for _, _, value in found]


def said(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return str(problem)


def _rest(model, optimizers, extra):
    """What is no model's and no optimizer's tensor: (JSON, tensors)."""
    tensors = {}
    own = contents.generators(model.units[0].master.device)
    rest = {"generators": pack(own, "the generators", tensors),
            "optimizers": [contents.described(model, one, tensors) for one in optimizers]}
    if model.rank == 0:
        rest["extra"] = {name: pack(value, name, tensors) for name, value in extra.items()}
        rest["extra_states"] = {name: pack(m.get_extra_state(), name, tensors)
                                for name, m in contents.with_extra_state(model.module).items()}
    return rest, tensors


def _write(aside, pieces, rest, tensors, keep, rank, group):
    """Called on every rank, in a thread of its own perhaps."""
    files: dict[str, Any] = {}
    problem: Exception | None = None
    found = aside.is_dir()
    try:
        if not found:
            raise OSError(f"rank {rank} does not find {aside}, which rank 0 has made: save needs a "
                          "folder that all ranks share, and in which no other run saves")
        written = [file for part, of_part in pieces.items()
                   for file in shards.write(aside / part, of_part, rank)]
        written.append(aside / "rest" / f"rank{rank}.json")
        listed = {part: {piece.name: [dtype_of(piece.values), piece.shape, piece.values.numel()]
                         for piece in of_part if rank == 0 or piece.values.numel()}
                  for part, of_part in pieces.items()}
        folder.to_disk(written[-1], json.dumps({**rest, "tensors": listed}).encode())
        written.append(shards.write_plain(aside / "rest" / f"rank{rank}.safetensors", tensors))
        files = {str(file.relative_to(aside)): folder.facts(file) for file in written}
    except Exception as error:
        problem = OSError(said(error) if str(aside) in said(error) else f"{aside}: {said(error)}")
        if found and not aside.is_dir():
            problem = OSError(f"{aside} is gone, so that another run saves in this folder, too: "
                              "give each a folder of its own")
    final = None
    try:
        everyones = agree(group, problem, files)
        problem = None
        if rank == 0:
            try:
                manifest = {"world_size": len(everyones), "files": {
                    name: facts for of_rank in everyones for name, facts in of_rank.items()},
                    "tensors": _complete(aside, pieces, len(everyones))}
                final = folder.commit(aside, manifest, keep)
            except Exception as error:
                problem = error
        return Path(agree(group, problem, final and str(final))[0])
    except BaseException:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _complete(aside, parts, world_size):
    """dtype and shape of each tensor, as the ranks have listed them: rank 0 lacks states of what it
    has no element of. Raises ValueError if what they have written would not load."""
    found: dict[str, dict[str, list]] = {part: {} for part in parts}
    missing: dict[tuple[str, str], int] = {}
    for rank in range(world_size):
        file = aside / f"rest/rank{rank}.json"
        try:
            listed = folder.read_json(file, aside)["tensors"]
        except ValueError as error:
            raise ValueError(f"{file}: {error}; a tensor can hold many numbers") from None
        for part, of_part in listed.items():
            for name, (dtype, shape, numel) in of_part.items():
                found[part][name] = [dtype, shape]
                missing[part, name] = missing.get((part, name), math.prod(shape)) - numel
    for (part, name), numel in missing.items():
        if numel:
            raise ValueError(f"{aside / part}: of {name!r}, {numel:,} elements are missing: do all "
                             "ranks save the same optimizers?")
    return found


def _group_of(model):
    """What is agreed on while training goes on may not come between training's messages."""
    if model not in _groups:
        ranks = dist.get_process_group_ranks(model.group)
        _groups[model] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True,
                                        timeout=timeout())
    return _groups[model]
