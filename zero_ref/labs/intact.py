"""Whether an answer leaves the package as it is, by which it is observed on its own rank."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from types import FunctionType
from typing import Any

_KINDS = (FunctionType, type, property, classmethod, staticmethod, _lru_cache_wrapper)
_Space = tuple[str, Mapping[str, Any], dict[str, tuple[Any, Any]]]
_spaces: dict[str, list[_Space]] = {}  # by module: it and its classes, and what is in them


@contextmanager
def intact() -> Iterator[None]:
    """Raises RuntimeError if a function, a class or a method of the package is replaced inside."""
    for name in [name for name in sys.modules if name.startswith("zero_ref")]:
        if name not in _spaces:
            module = vars(sys.modules[name])
            classes = [value for value in module.values()
                       if isinstance(value, type) and value.__module__ == name]
            _spaces[name] = [(name, module, _runs(module)), *(
                (f"{name}.{one.__qualname__}", vars(one), _runs(vars(one))) for one in classes)]
    yield
    for where, space, before in [space for spaces in _spaces.values() for space in spaces]:
        now = _runs(space)
        for name in before.keys() | (() if isinstance(space, dict) else now.keys()):
            if name not in now or now[name] != before.get(name):
                raise RuntimeError(f"this replaces {where}.{name}, and an answer is to leave the "
                                   "package as it is")


def _runs(space):
    """Of each function and class, what makes it run. (They are equal if they are the same.)"""
    return {name: (value, getattr(value, "__code__", None)) for name, value in space.items()
            if isinstance(value, _KINDS)}
