"""`load(path, model, optimizer)`: each rank reads what it keeps, whoever has written it."""

import copy
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ..engine.optimizers import ELEMENTS, ELEMENTWISE
from ..engine.shell import Shell
from . import contents, folder
from .folder import Damaged
from .pack import dtype_of, unpack
from .saving import agree, finish_all, group_of, listed, refuse_full_params
from .shards import Shards, check_header


def load(path: str | Path, model: Shell, optimizer: Optimizer | Sequence[Optimizer]
         ) -> dict[str, Any]:
    """Give model and optimizer what a checkpoint holds: the newest one in the folder `path`, or
    `path` itself. Called on every rank, at any stage, with any number of ranks.

    All is checked before anything is changed: files by their checksums, names, shapes and dtypes
    against the model and the optimizer's groups. Random number generators are set to where those of
    the same rank were. Returns save's `extra`, on every rank; of an object with a state_dict(),
    that dict.

    A checkpoint that was imported has a model alone: it leaves the optimizer as it is, and has no
    `extra`.

    Raises zero_ref.NoCheckpoint if none was committed there, ValueError if it is damaged or another
    model's, and OSError if it cannot be read: on every rank, and nothing is changed.
    """
    group = group_of(model)
    checkpoint, problem = None, None
    try:
        finish_all()
        optimizers = listed(optimizer)
        refuse_full_params(model)
        checkpoint = folder.newest(Path(path)).absolute() if model.rank == 0 else None
    except Exception as error:
        problem = error
    checkpoint = Path(agree(group, problem, checkpoint and str(checkpoint), "load")[0])
    try:  # a part of the files each, and nobody opens one before all are known to be right
        folder.check_files(checkpoint, (model.rank, model.world_size))
    except Exception as error:
        problem = as_damaged(checkpoint, error)
    seen = agree(group, problem, None if problem else folder.facts(checkpoint / folder.MANIFEST),
                 "load")
    if seen != seen[:1] * len(seen):  # on every rank
        raise ValueError(f"{checkpoint} is not the same on all ranks: load needs a folder that all "
                         "of them share")
    with ExitStack() as opened, torch.no_grad(), ExitStack() as undo:
        try:
            source = Source(checkpoint, opened)
            extra_states = _check_model(source, model)
            states = _check_optimizers(source, model, optimizers)
            extra, generators = source.extra(), source.generators(model)
            for name, m in contents.with_extra_state(model.module).items():
                if name in extra_states:  # whether a module takes it, it alone can tell
                    undo.callback(m.set_extra_state, copy.deepcopy(m.get_extra_state()))
                    m.set_extra_state(extra_states[name])
        except Exception as error:
            problem = as_damaged(checkpoint, error)
        agree(group, problem, phase="load")
        undo.pop_all()
        _fill_model(source, model)
        for index, (one, (options, values)) in enumerate(zip(optimizers, states)):
            _fill_optimizer(source, index, model, one, options, values)
        if generators is not None:
            contents.restore_generators(generators, model.units[0].master.device)
    return extra


def as_damaged(checkpoint: Path, error: Exception) -> Exception:
    """Whatever files from strangers make of the readers; our own sentences name the place."""
    if str(checkpoint) in str(error) or isinstance(error, OSError):
        return error
    return Damaged(f"{checkpoint} is no checkpoint: {type(error).__name__}: {error}")


class Source:
    """An opened checkpoint, whose files have been checked."""

    def __init__(self, checkpoint: Path, opened: ExitStack):
        self.checkpoint, self.manifest = checkpoint, folder.manifest_of(checkpoint)
        self._tensors: dict[int, dict[str, torch.Tensor]] = {}  # by rank, of the rest
        files, tensors = self.manifest["files"], self.manifest.get("tensors")
        try:
            self.parts: dict[str, Shards] = {part: opened.enter_context(Shards(
                checkpoint, [f for f in files if f.startswith(f"{part}/")], of_part))
                for part, of_part in (tensors or {}).items()}
            self.rest = self._rest_of(0)
            for name in ("extra", "optimizers"):
                if name not in self.rest:
                    raise Damaged(f"{checkpoint / 'rest/rank0.json'}: {name!r} is missing")
            self.optimizers = self.rest["optimizers"]
            if self.optimizers is not None:
                self._add_states_of_others()
            wanted = {"model", *(f"optimizer-{i}" for i in range(len(self.optimizers or ())))}
            written_by = sum(file.startswith("rest/") and file.endswith(".json") for file in files)
            if self.optimizers is not None and repr(self.manifest.get("world_size")) != (
                    repr(written_by)):  # True would equal a 1
                raise Damaged(f"{checkpoint / folder.MANIFEST} does not say that {written_by} "
                              "ranks have written it")
            for part in sorted(wanted ^ self.parts.keys()):
                raise Damaged(f"{checkpoint / folder.MANIFEST}: the tensors of {part!r} " + (
                    "are missing" if part in wanted else "belong to nothing"))
        except Damaged:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(f"{checkpoint}: something is missing: {error}") from None

    def extra(self) -> dict[str, Any]:
        return {name: self.unpacked(value) for name, value in self.rest["extra"].items()}

    def unpacked(self, packed: Any, rank: int = 0) -> Any:
        def tensor(key):
            if key not in (tensors := self._plain(rank)):
                raise Damaged(f"{self.checkpoint}/rest/rank{rank}.safetensors has no {key!r}")
            return tensors[key]

        try:
            return unpack(packed, tensor)
        except RecursionError:
            raise Damaged(f"{self.checkpoint}/rest/rank{rank}.json: too deep") from None

    def generators(self, model: Shell) -> dict[str, Any] | None:
        """Those of the rank that had this one's number."""
        if f"rest/rank{model.rank}.json" not in self.manifest["files"]:
            return None
        if self.optimizers is None:  # it was imported
            return None
        packed = self._rest_of(model.rank)["generators"]
        found = self.unpacked(packed, model.rank)
        contents.check_generators(found, model.units[0].master.device)
        return found

    def _add_states_of_others(self):
        """Each rank has described the states of those parameters whose first element it has."""
        for rank in itertools.count(1):
            if f"rest/rank{rank}.json" not in self.manifest["files"]:
                return
            for one, other in zip(self.optimizers, self._rest_of(rank)["optimizers"]):
                for name, states in other["states"].items():
                    one["states"][name] = {
                        key: {**how, "rank": rank} if type(how) is dict else how
                        for key, how in states.items()}

    def _rest_of(self, rank):
        path = self.checkpoint / f"rest/rank{rank}.json"
        try:
            return folder.read_json(path, self.checkpoint)
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{path} is no JSON of a checkpoint: {error}") from None

    def _plain(self, rank):
        from safetensors.torch import load_file

        name = f"rest/rank{rank}.safetensors"
        if name not in self.manifest["files"]:  # then nobody has looked at it
            raise Damaged(f"{self.checkpoint / name} is not in the manifest")
        if rank not in self._tensors:
            check_header(self.checkpoint / name)
            # load_file's are parts of the file, which may go, at addresses that no tensor of
            # torch's own has: a dot product would be rounded otherwise.
            self._tensors[rank] = {key: value.clone() for key, value in load_file(
                self.checkpoint / name).items()}
        return self._tensors[rank]


def _check_model(source, model):
    """Returns what the modules' set_extra_state() is to be given."""
    where, saved = source.checkpoint, source.parts["model"].listed
    wanted = {name: [dtype_of(buffer), list(buffer.shape)]
              for name, buffer in contents.buffers(model.module).items()}
    tied = []
    for one in contents.owned(model):
        # Others save a tied parameter under one of its names.
        names = [name for name in one.names if name in saved] or one.names[:1]
        wanted |= {key: [dtype_of(one.p), list(one.shape)] for key in names}
        tied.append((one, names))
    extra_states = source.rest.get("extra_states", {})
    imported = source.optimizers is None  # then a module's extra state stays
    has_extra = set() if imported else contents.with_extra_state(model.module).keys()
    for name in sorted((saved.keys() | extra_states.keys()) ^ (wanted.keys() | has_extra)):
        has, lacks = (("model", "checkpoint") if name in wanted.keys() | has_extra else
                      ("checkpoint", "model"))
        raise ValueError(f"{where}: the {has} has {name!r}, and the {lacks} does not: this is a "
                         "checkpoint of another model")
    for name, (dtype, shape) in wanted.items():
        if saved[name] != [dtype, shape]:
            help_ = (": convert it before it is imported"
                     if imported and saved[name][1] == shape else "")
            raise ValueError(f"{where}: {name!r} is {tuple(saved[name][1])} {saved[name][0]} in "
                             f"the checkpoint, and {tuple(shape)} {dtype} in the model{help_}")
    for one, (name, *others) in tied:
        for other in others:
            if not torch.equal(*(  # as bits: NaN is not equal to itself
                    _elements(source.parts["model"], key, one.p).view(-1).view(torch.uint8)
                    for key in (name, other))):
                raise ValueError(f"{where}: {name!r} and {other!r} are one parameter in the model, "
                                 "and differ in the checkpoint")
    return {name: source.unpacked(value) for name, value in extra_states.items()}


def _elements(tensors, name, p):
    """A new tensor like what the optimizer updates of a parameter, (n,), with what was saved."""
    with torch._C.DisableTorchFunctionSubclass():
        dtype = getattr(torch, tensors.listed[name][0])
        found = torch.empty(p.shape, dtype=dtype, device=p.device)
    tensors.read(name, found.view(-1), p._elements[0])
    return found


def _check_optimizers(source, model, optimizers):
    """For each optimizer, the options of its groups, and those states that are no tensors."""
    if source.optimizers is None:  # it was imported
        return []
    if len(source.optimizers) != len(optimizers):
        raise ValueError(f"{source.checkpoint} has {len(source.optimizers)} optimizers, and "
                         f"{len(optimizers)} are to be loaded")
    found = []
    owned = contents.owned(model)
    for index, (saved, optimizer) in enumerate(zip(source.optimizers, optimizers)):
        kind, where = type(optimizer).__name__, f"{source.checkpoint}:"
        if saved["class"] != kind:
            raise ValueError(f"{source.checkpoint} has the states of {saved['class']}, and this is "
                             f"{kind}")
        _check_groups(where, saved["groups"], optimizer, owned)
        tensors = source.parts[f"optimizer-{index}"].listed
        _check_states(where, saved["states"], tensors, kind, owned)
        options = [source.unpacked(group["options"]) for group in saved["groups"]]
        if not all(type(group) is dict for group in options) or any(
                type(key) is not str or key == "params" for group in options for key in group):
            raise Damaged(f"{where} the options of {kind} are none")
        if type(optimizer) in ELEMENTWISE:
            _check_options(where, options, optimizer)
            for group, of_group in zip(saved["groups"], options):
                _check_needed(where, optimizer, saved["states"], of_group, tensors,
                              {one.names[0]: one.p for one in owned
                               if one.names[0] in group["params"]})
        found.append((options, {
            (name, key): source.unpacked(how["value"], how.get("rank", 0))
            for name, states in saved["states"].items()
            for key, how in states.items() if how not in ("like the parameter", "whole")}))
    return found


def _check_groups(where, saved, optimizer, owned):
    """The same groups, of the same parameters in the same order."""
    kind, name_of = type(optimizer).__name__, {id(one.p): one.names[0] for one in owned}
    for number, (group, of_saved) in enumerate(zip(optimizer.param_groups, saved)):
        names = [name_of.get(id(p), "one that is not of this model") for p in group["params"]]
        for here, there in itertools.zip_longest(names, of_saved["params"]):
            if here != there:
                raise ValueError(f"{where} group {number} of {kind} has " + (
                    f"{here or 'nothing more'!r} in the place of {there!r}: the same parameters "
                    "are to be in the same order" if there else
                    f"{here!r} more than in the checkpoint"))
    if len(optimizer.param_groups) != len(saved):
        raise ValueError(f"{where} {kind} had {len(saved)} groups of parameters, and has "
                         f"{len(optimizer.param_groups)} here")


def _check_options(where, saved, optimizer):
    """Of one of torch's own: numbers where there are numbers, and so on."""
    for number, (group, of_saved) in enumerate(zip(optimizer.param_groups, saved)):
        for key in of_saved.keys() & optimizer.defaults.keys() & group.keys():
            if not _alike(of_saved[key], group[key]):
                raise Damaged(f"{where} group {number} of {type(optimizer).__name__} has "
                              f"{key}={of_saved[key]!r}, and here it is {group[key]!r}")


def _alike(a, b):
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    chosen = bool | None  # such as foreach, which may be decided later
    numbers = int | float | torch.Tensor
    return any(isinstance(a, kind) and isinstance(b, kind) for kind in (chosen, numbers))


def _check_states(where, saved, tensors, kind, owned):
    """What the states are described as, against the tensors that the files have."""
    shape_of = {one.names[0]: list(one.shape) for one in owned}
    described = {f"state.{name}.{key}" for name, states in saved.items()
                 for key, how in states.items() if how in ("like the parameter", "whole")}
    for name in sorted(tensors.keys() - described):
        raise Damaged(f"{where} {name!r} is there, and {kind} has no such state")
    for name, states in saved.items():
        for key, how in states.items():
            dtype_and_shape = tensors.get(f"state.{name}.{key}")
            if how == "like the parameter" and (
                    not dtype_and_shape or dtype_and_shape[1] != shape_of.get(name)):
                raise Damaged(f"{where} the state {key!r} of {name!r} is missing or has another "
                              "shape")
            if how == "whole" and not dtype_and_shape:
                raise Damaged(f"{where} the state {key!r} of {name!r} is missing")


def _check_needed(where, optimizer, saved, options, tensors, params):
    """What a step of one of torch's own needs of a parameter that has had one: asked of torch, with
    a step of a parameter of two elements."""
    asked = type(optimizer)([two := torch.nn.Parameter(torch.zeros(2, device="cpu"))])
    asked.param_groups[0].update({key: options[key] for key in _MORE_STATES if key in options})
    two.grad = torch.ones_like(two)
    asked.step()
    needed = asked.state[two]
    for name, p in params.items():
        states = saved.get(name, {})
        for key, value in needed.items() if states.keys() & needed.keys() else ():
            how = states.get(key)
            dtype, shape = tensors.get(f"state.{name}.{key}", ("", None))
            if value.ndim:
                fits = how == "like the parameter" and dtype == dtype_of(p)
            elif how == "whole":
                fits = shape == [] and dtype in _OF_NUMBERS
            else:
                fits = type(how) is dict and type(how.get("value")) in (int, float)
            if not fits:
                raise Damaged(f"{where} the state {key!r} of {name!r} is missing, or has another "
                              f"shape or dtype ({shape} {dtype})")


_OF_NUMBERS = ("float32", "float64", "int32", "int64")
_MORE_STATES = ("amsgrad", "centered", "momentum")  # options on which it depends which there are


def _fill_model(source, model):
    tensors = source.parts["model"]
    with torch._C.DisableTorchFunctionSubclass():
        for one in contents.owned(model):
            name = next(name for name in one.names if name in tensors.listed)
            tensors.read(name, one.p.view(-1), one.p._elements[0])
    model._follow(model.units)
    for name, buffer in contents.buffers(model.module).items():
        buffer.data.copy_(tensors.whole(name))


def _fill_optimizer(source, index, model, optimizer, options, values):
    saved, tensors = source.optimizers[index], source.parts[f"optimizer-{index}"]
    for group, of_group in zip(optimizer.param_groups, options):
        group.update({key: value.to(group[key].device) if isinstance(group.get(key), torch.Tensor)
                      and isinstance(value, torch.Tensor) else value
                      for key, value in of_group.items()})
    on_device = {id(p): group.get("capturable") or group.get("fused")
                 for group in optimizer.param_groups for p in group["params"]}
    for one in contents.owned(model):
        if id(one.p) not in on_device:
            continue
        state = {}
        for key, how in saved["states"].get(one.names[0], {}).items():
            name = f"state.{one.names[0]}.{key}"
            if how == "like the parameter":
                state[key] = _elements(tensors, name, one.p)
            elif how == "whole":
                value = tensors.whole(name)
                state[key] = value.to(one.p.device) if value.ndim or on_device[id(one.p)] else value
            else:
                state[key] = values[one.names[0], key]
        optimizer.state.pop(one.p, None)
        if state:
            optimizer.state[one.p] = {**state, ELEMENTS: one.p._elements}
