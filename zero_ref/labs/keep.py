"""`keep(Stage1)`: the learner's own file, my_zero.py, piece by piece."""

import ast
import inspect
import linecache
import re
import textwrap
from pathlib import Path
from typing import Any

from ..course import wrapped
from . import small
from .judge import check

# In the order of the file, with the exercises that they are the answers to.
PIECES = {"flatten": ["3.2"], "shard_bounds": ["3.1"], "Stage0": ["2.1", "2.2"], "Stage1": ["4.2"],
          "Stage2": ["5.1"], "Sharded": ["6.1"], "Stage3": ["6.2"]}
_HEAD = '''"""My ZeRO."""

import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from zero_ref import comm
'''


def keep(piece: Any, file: str | Path = "my_zero.py") -> None:
    """Write a function or class that is right into my_zero.py, in place of an earlier one of that
    name: it is checked before. What is not there yet is imported from the package, so that the file
    works."""
    print(wrapped(_keep(piece, file)))


def _keep(piece, file):
    name = getattr(piece, "__name__", str(piece))
    if name not in PIECES:
        return f"{name} is not a piece of my_zero.py. Its pieces are {', '.join(PIECES)}."
    source = _source(piece)
    if re.search(r"\btodo\(", source):
        return f"{name} is not kept: there is still a todo(…) in it."
    for exercise in PIECES[name]:
        if not check(exercise, piece):
            return f'{name} is not kept: check("{exercise}", {name}) says that it is not right yet.'
    path = Path(file)
    kept = pieces_in(path.read_text()) if path.exists() else {}
    kept[name] = source
    path.write_text(_file(kept))
    missing = [piece for piece in PIECES if piece not in kept]
    rest = f"Still the package's: {', '.join(missing)}." if missing else "All of it is yours."
    return f"{name} is in {path}. {rest}"


def _source(piece):
    """What was written. Of a class in a notebook's cell, `inspect` finds only the methods."""
    code = next((f.__code__ for f in (piece, *vars(piece).values()) if inspect.isfunction(f)), None)
    if code is None:
        return inspect.getsource(piece)
    text = "".join(linecache.getlines(code.co_filename))
    found = [node for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == piece.__name__
             and node.lineno <= code.co_firstlineno <= (node.end_lineno or 0)]
    return textwrap.dedent(ast.get_source_segment(text, found[-1], padded=True) or "").rstrip()


def pieces_in(text: str) -> dict[str, str]:
    """The learner's pieces of a my_zero.py, by name."""
    found = {}
    for part in re.split(r"\n\n\n(?=class |def )", text):
        if (match := re.match(r"(?:class|def) (\w+)", part)) and match[1] in PIECES:
            found[match[1]] = part.rstrip()
    return found


def _file(kept):
    missing = [piece for piece in PIECES if piece not in kept]
    head = _HEAD
    if missing:
        head += f"from zero_ref.labs.small import {', '.join(missing)}  # not mine yet\n"
    given = [inspect.getsource(thing).rstrip() for thing in (small.Unit, small.Frame)]
    mine = [kept[piece] for piece in PIECES if piece in kept]
    return "\n\n\n".join([head.rstrip(), *given, *mine, inspect.getsource(small.wrap)])
