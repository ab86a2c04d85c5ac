"""What the notebooks share: a small net, real data, code shown from the package, checks."""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .tasks import data

_SCREENFUL = 60  # lines
_WIDTH = 80  # of prose: JupyterLab would break a longer line within a word


def build(seed: int = 0) -> nn.Sequential:
    """Six equal layers for the 8×8 digits, made 4×4: (batch, 1, 8, 8) → (batch, 16) logits, of
    which ten have a digit. Each layer is a unit of 16·16 + 16 = 272 parameters; all have 1,632."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would take a millisecond longer
    image = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
    return nn.Sequential(image, *(nn.Sequential(nn.Tanh(), nn.Linear(16, 16)) for _ in range(6)))


def batch(step: int, rank: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of one rank at one step: of every rank others, (size, 1, 8, 8) and
    (size,)."""
    digits = data.load("digits").train.tensors
    first = (step * 64 + rank * size) % (len(digits[0]) - size)
    return tuple(tensor[first : first + size].clone() for tensor in digits)


def show(*objects: Callable) -> None:
    """Show functions, methods or classes as they are in the package."""
    from IPython.display import display

    for i, thing in enumerate(objects):
        code = textwrap.dedent(inspect.getsource(thing)).rstrip()
        if code.count("\n") >= _SCREENFUL:
            raise ValueError(f"{thing.__qualname__} has {code.count(chr(10)) + 1} lines: show at "
                             f"most {_SCREENFUL} at a time")
        if i == 0:
            code = f"# {thing.__module__}\n{code}"
        display({"text/plain": code, "text/markdown": f"```python\n{code}\n```"}, raw=True)


def wrapped(text: str, label: str = "", indent: str = "") -> str:
    """Prose in lines that fit into a notebook. label: what it begins with. indent: what the lines
    after the first begin with."""
    return textwrap.fill(text, _WIDTH, initial_indent=label, subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False)


def verdict(what: str, predicted: Any, measured: Any,
            mistakes: Mapping[Any, str] | None = None) -> None:
    """Hold the learner's prediction against what was measured, which is not shown before.

    mistakes: what to say about wrong predictions that people make, {value: remark}.
    """
    if predicted is None:
        print(wrapped(f"{what}: type your prediction in above, then run both cells."))
        return
    if isinstance(predicted, str) and not isinstance(measured, str):
        print(f"{what}: type a number in, without quotes.")
        return
    how = "not what was measured: why?"
    if _equal(predicted, measured):
        how = "right"
    else:
        how = next((remark for value, remark in (mistakes or {}).items()
                    if _equal(predicted, value)), how)
    print(wrapped(f"{what}: you predicted {_number(predicted)}, measured {_number(measured)}: "
                  f"{how}", indent="  "))


def same_bits(reference: Mapping[str, torch.Tensor], *others: Mapping[str, torch.Tensor]) -> bool:
    """Whether state dicts hold the same names with the same bits."""
    return all(reference.keys() == other.keys()
               and all(torch.equal(reference[name], other[name]) for name in reference)
               for other in others)


def check_stages(weights: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    """weights: {stage: what state_dict() gave}. Prints which equal stage 0's, bit for bit. Raises
    AssertionError if one does not."""
    for stage, state in weights.items():
        if stage != 0:
            equal = same_bits(weights[0], state)
            print(f"check: stage {stage} equals stage 0, bit for bit: {'yes' if equal else 'NO'}")
            assert equal, f"the weights of stage {stage} are not those of stage 0"


def _equal(a, b):
    if {type(a), type(b)} <= {int, float}:
        return abs(a - b) <= 1e-3 * abs(b)
    return a == b


def _number(value):
    return f"{value:,}" if type(value) in (int, float) else str(value)
