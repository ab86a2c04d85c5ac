"""Values as JSON and tensors, and back, equal in value and type. Nothing is pickled.

JSON has neither tuples nor keys that are numbers, both of which a scheduler's state has. So a list
stands for itself, and everything else that has parts is an object with one key, its type.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..engine.optimizers import ELEMENTS

_DICTS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
DTYPES = {  # torch's names and safetensors'
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2"}
_KEYS = (str, int, float, bool, type(None))


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of a value. Its tensors go into `tensors`, on the CPU. name: what an error
    calls the value.

    Takes numbers (NumPy's come back as Python's), strings, None, tensors, and lists, tuples and
    dicts of these; of an object with a state_dict(), that. Raises ValueError for anything else.
    """
    if isinstance(value, numpy.generic):  # a scheduler's learning rate may be one
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:  # JSON has no infinity
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = writable(value, name)
        return {"tensor": key}
    if type(value) is list:
        return [pack(x, f"{name}[{i}]", tensors) for i, x in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": pack(list(value), name, tensors)}
    if type(value) in _DICTS.values():
        if ELEMENTS in value:
            raise ValueError(f"{name} is a state of an optimizer, of which this rank has its own "
                             "elements: save takes optimizers as the third argument")
        return {type(value).__name__: [
            [_packed_key(key, name), pack(x, f"{name}[{key!r}]", tensors)]
            for key, x in value.items()]}
    _refuse_what_is_saved_anyway(value, name)
    if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        return pack(value.state_dict(), name, tensors)
    raise ValueError(f"{name} is a {type(value).__name__}: a checkpoint can hold numbers, strings, "
                     "None, tensors, lists, tuples and dicts of these, and what has a state_dict()")


def unpack(packed: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """What was packed. Raises ValueError for what `pack` does not give."""
    if isinstance(packed, list):
        return [unpack(x, tensor_of) for x in packed]
    if not isinstance(packed, Mapping):
        return packed
    [(kind, content)] = packed.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensor_of(content)
    if kind == "tuple":
        return tuple(unpack(content, tensor_of))
    if kind in _DICTS:
        pairs = [(_unpacked_key(key), unpack(x, tensor_of)) for key, x in content]
        return _DICTS[kind](dict(pairs))
    raise ValueError(f"{kind!r} is no type that a checkpoint holds")


def writable(value: Tensor, name: str) -> Tensor:
    """The tensor as a file can hold it: on the CPU, dense, without a graph."""
    if value.layout != torch.strided or dtype_of(value) not in DTYPES:
        what = value.dtype if value.layout == torch.strided else value.layout
        raise ValueError(f"{name} is a tensor of {what}, which safetensors files cannot hold: give "
                         "it another form, such as torch.view_as_real(…) or .to_dense()")
    value = value.detach().cpu()
    return value.resolve_conj().resolve_neg().contiguous()


def dtype_of(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _packed_key(key, name):
    if type(key) not in (*_KEYS, tuple) or (type(key) is float and not math.isfinite(key)):
        raise ValueError(f"{name} has the key {key!r}: keys can be strings, numbers, None, and "
                         "tuples of these")
    return {"tuple": [_packed_key(x, name) for x in key]} if type(key) is tuple else key


def _unpacked_key(key):
    return tuple(map(_unpacked_key, key["tuple"])) if isinstance(key, Mapping) else key


def _refuse_what_is_saved_anyway(value, name):
    from ..engine.shell import Shell

    inside = [*value.modules()] if isinstance(value, nn.Module) else [value]
    if any(isinstance(one, torch.optim.Optimizer | Shell) for one in inside):
        raise ValueError(f"{name} is a {type(value).__name__}, whose state_dict() would be this "
                         "rank's own: save takes the model, and its optimizer or a list of them, "
                         "as the second and third argument")
