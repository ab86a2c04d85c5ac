"""Values that are written into the module's own parameters: in a forward, or in a hook.

Where these lie in memory that stays, every rank writes what it wants to keep, as with torch DDP. At
stage 3 a rank keeps its shard alone, so its slice of what was written is copied there before the
unit is resharded. With mixed precision they are rounded copies, and the master would never hear of
it. The version counters of the parameters tell that something has written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Watched(nn.Parameter):
    """A parameter that is written to through `.data`, too, as its version counter tells."""

    data = property(torch.Tensor.detach, torch.Tensor.data.__set__)  # type: ignore[assignment]

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.__class__ = type(self).__bases__[-1]  # nobody watches a copy
        return copied


def _sharded(unit):
    return unit.keeps.params == "shard"


def watch(unit) -> None:
    """Called once, when the module's parameters are views of the unit's flat buffer."""
    if unit.mixed or _sharded(unit):
        for p in unit.params:
            kind = type(p)
            p.__class__ = (Watched if kind is nn.Parameter else
                           type(kind.__name__, (Watched, kind), {}))
    know(unit)


def know(unit) -> None:
    """What the module's parameters hold needs no copy: it has come from the master, or is there."""
    with torch._C.DisableTorchFunctionSubclass():
        unit.known = sum([p._version for p in unit.params])


def keep_written(unit) -> None:
    """Called while the module's parameters are views of the unit's flat buffer."""
    refuse_moved(unit, unit.params, unit.flat)
    before, sharded = unit.known, _sharded(unit)
    if unit.mixed or sharded:
        know(unit)
    if unit.mixed and unit.known != before:
        raise RuntimeError(
            f"something has written into a parameter of unit {unit.name!r}, in a forward or a hook "
            "for instance. With mixed precision that is a rounded copy, and the master would not "
            "see it: write into model.parameters() under torch.no_grad(), between steps, or inside "
            "model.full_params()")
    if sharded and not unit.mixed and (
            unit.known != before or not unit.flat.untyped_storage().resizable()):  # a NumPy array
        unit.shard.copy_(unit.flat[unit.rank_slice])


def refuse_moved(unit, params: Sequence[Tensor], buffer: Tensor) -> None:
    """Raise unless these parameters lie where `buffer` has its views of them."""
    begin, itemsize = buffer.data_ptr(), buffer.itemsize
    with torch._C.DisableTorchFunctionSubclass():
        for name, p, start, size in zip(unit.names, params, unit.starts, unit.sizes):
            if size and (p.data_ptr() != begin + start * itemsize or not p.is_contiguous()):
                raise RuntimeError(moved(unit, name))


def moved(unit, name: str) -> str:
    return (f"{name!r} of unit {unit.name!r} does not lie in its flat buffer any more: something "
            "has moved or cast the module, or has set the .data of a parameter. Move or cast it "
            "before zero_ref.wrap; give a parameter new values in place, as in "
            "`with torch.no_grad(): p.copy_(values)`")
