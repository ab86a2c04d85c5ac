"""Where in a model an exception came up: a traceback shows the line, and not which unit it is."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

models = weakref.WeakSet()  # every wrapped model of this process


@contextmanager
def explained() -> Iterator[None]:
    """Around the wait for a message: say what gloo's own words mean for a run."""
    try:
        yield
    except RuntimeError as error:
        if "Timed out" in str(error):
            seconds = os.environ.get("ZERO_REF_TIMEOUT", "600")
            error.add_note(f"Nothing came from another rank for {seconds} s ($ZERO_REF_TIMEOUT): "
                           "it hangs, or is gone, or the network between the ranks is.")
        elif "Connection" in str(error):
            error.add_note("Another rank is gone: what it has printed says why.")
        raise


def annotate(error: BaseException) -> None:
    """Add the unit and the phase to an exception that came out of a model's forward or backward."""
    for model in models:
        where = _in_forward(model, error.__traceback__) or _in_backward(model)
        if where:
            error.add_note(f"This was in the {where}, at stage "
                           f"{model.stage}, on rank {model.rank}.")
            if model.stage == 3 and "storage of size 0" in str(error):
                error.add_note("A parameter was used while its unit was not gathered: did a tensor "
                               "leave a unit in another way than through its output? Return it.")


def _in_forward(model, traceback):
    names = {unit.module: unit.name for unit in reversed(model.units)}
    found = None
    while traceback is not None:  # from the outermost frame to where it was raised
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            found = f"forward of unit {names[owner]!r}"
        traceback = traceback.tb_next
    return found


def _in_backward(model):
    """The unit that backward had come to: gradients of those after it are there already."""
    if (backward := model._backward) is not None:
        entered = [unit for unit in model.units if unit.module in backward.entered]
        waiting = entered or [unit for bucket in backward.queue[-1:] for unit in bucket
                              if not backward.complete([unit])]
        return f"backward of unit {(waiting or model.units[:1])[-1].name!r}"
    return None
