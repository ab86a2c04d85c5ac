"""Reading what a rank sends, without running anything of it: numbers, texts, tensors, lists, dicts.

A pickle can name any function to be called where it is read. Here it can name those that make a
tensor, and the classes of an error. (Tensors inside are read by torch's own reader of plain data.)
"""

import collections
import io
import pickle
import traceback
from typing import Any, ClassVar

import torch

from ..ranks.errors import Failure
from .exercise import Todo


def loads(message: bytes) -> Any:
    """Like `pickle.loads`. Raises UnpicklingError for what is no plain data."""
    return _Plain(io.BytesIO(message)).load()


_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]  # its steps can be looked at


class _Plain(_Unpickler):
    dispatch: ClassVar[dict[int, Any]] = {**_Unpickler.dispatch}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it is no plain data: {module}.{name} is in it")

    def load_build(self) -> None:
        """What would set the attributes of a class or a function, and not of an object."""
        if not isinstance(self.stack[-2], _OBJECTS):
            raise pickle.UnpicklingError("it is no plain data: it changes a class or a function")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _storage(content):
    return torch.load(io.BytesIO(content), weights_only=True)


_OBJECTS = Failure | Todo | traceback.StackSummary | traceback.FrameSummary
_KNOWN = {(found.__module__, found.__qualname__): found for found in (
    Failure, Todo, traceback.StackSummary, traceback.FrameSummary, collections.OrderedDict,
    torch.Size, torch._utils._rebuild_tensor_v2)}
_KNOWN["torch.storage", "_load_from_bytes"] = _storage
