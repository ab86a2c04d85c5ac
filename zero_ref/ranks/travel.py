"""What goes from the caller to the ranks and back, as bytes.

Functions, classes and data of a script or a notebook cell travel by value, with cloudpickle.
"""

import functools
import inspect
import io
import pickle
import pkgutil
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import cloudpickle
import torch


def dumps(value: object) -> bytes:
    """`value` as bytes, for `pickle.loads` in a process that can import the same modules."""
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def job(fn: Callable, args: tuple) -> bytes:
    """What the ranks are to run. Raises ValueError, which names what cannot travel to them."""
    try:
        return dumps((fn, args))
    except Exception as error:
        name = getattr(fn, "__qualname__", type(fn).__name__)
        parts = [(name, fn), *((f"argument {i} of {name}", a) for i, a in enumerate(args, 1))]
        what = next(_culprits(parts, set()), name)
        raise ValueError(f"{what} cannot travel to the ranks ({said(error)}): create it on the "
                         "ranks, inside the function that they run") from None


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Pickler(cloudpickle.Pickler):
    """cloudpickle's, with three differences.

    A cached function travels as the function that it caches, with an empty cache.
    torch has modules of classes of its own, such as torch.backends.cudnn and torch.ops. They and
    torch's operators travel by name, too. And code keeps the name of its file, or cell, which
    tracebacks show; cloudpickle 3.1.3 replaces it.
    """

    def reducer_override(self, obj):
        if type(obj) is types.CodeType:
            make, parts = self.dispatch_table[types.CodeType](obj)
            return _named_code, (obj.co_filename, make, parts)
        if type(obj) is functools._lru_cache_wrapper and obj.__module__ == "__main__":
            return _cached, (obj.__wrapped__, obj.cache_parameters())
        name = None
        if issubclass(type(obj), types.ModuleType) and type(obj) is not types.ModuleType:
            name = obj.__name__
        elif isinstance(obj, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            name = f"torch.ops.{obj}"
        with suppress(ImportError, AttributeError, TypeError, ValueError):
            if name is not None and pkgutil.resolve_name(name) is obj:
                return pkgutil.resolve_name, (name,)
        return super().reducer_override(obj)


def by_value(pickler: object, obj: object) -> object:
    """The `reducer_override` of another pickler: functions and classes of a script, which have come
    here by value, go on by value."""
    by_name = type | types.FunctionType | functools._lru_cache_wrapper
    if isinstance(obj, by_name) and obj.__module__ == "__main__":
        return pickle.loads, (dumps(obj),)
    return NotImplemented


def _cached(fn, parameters):
    return functools.lru_cache(**parameters)(fn)


def _named_code(filename, make, parts):
    return make(*parts).replace(co_filename=filename)


# ---- what cannot travel --------------------------------------------------------------------------


def _culprits(parts: list[tuple[str, Any]], seen: set[int]) -> Iterator[str]:
    """The names of what cannot travel among `parts`, as far inside as they can be told."""
    for what, part in parts:
        try:
            dumps(part)
        except Exception:
            if id(part) not in seen:
                seen.add(id(part))
                yield from _culprits(_made_of(part), seen)
                yield what


def _made_of(value: Any) -> list[tuple[str, Any]]:
    """The variables that a function uses, or the attributes of an object, with their names."""
    if isinstance(value, types.MethodType):
        return _made_of(value.__self__)
    where, variables = type(value).__name__, {}
    if isinstance(value, types.FunctionType):
        where = value.__qualname__
        with suppress(ValueError):  # a variable that has no value yet
            uses = inspect.getclosurevars(value)
            variables = {**uses.nonlocals, **uses.globals}
    elif type(value).__getstate__ is object.__getstate__:
        variables = getattr(value, "__dict__", {})
    return [(f"{name!r} in {where}", part) for name, part in variables.items()]
