"""A Task by name: a user's file or module, a Hugging Face config, or one of the package's own."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .named import NAMED
from .task import Task, adam

TEMPLATE = '''\
"""A model of my own, for `zero-ref compare --model THIS_FILE`."""

import torch
import torch.nn.functional as F
from torch import nn


def build():
    """The module. Each block of the nn.Sequential is a unit: gathered, reduced and freed together.
    """
    blocks = [nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128))
              for _ in range(6)]
    return nn.Sequential(nn.Linear(64, 128), *blocks, nn.Linear(128, 10))


def batch(step, rank):
    """What this rank sees at this step: other samples on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, 64, generator=generator)
    return x, x[:, :10].argmax(1)


def loss(model, batch):
    """A scalar: the mean over this rank's samples."""
    x, y = batch
    return F.cross_entropy(model(x), y)


# These two may be left out.

def optimizer(params):
    return torch.optim.AdamW(params, lr=1e-3)


units = None  # or a module class, a tuple of them, or a function of a module: see zero_ref.wrap
'''


def load(name: str, world_size: int) -> Task:
    """The Task of a file my_model.py or a module my_package.my_module with the functions build,
    batch and loss, and maybe optimizer and units; of a Hugging Face config, a config.json or the
    folder that it is in; or of one of NAMED. Raises ValueError if there is no such thing, or
    something is missing."""
    if name in NAMED:
        return NAMED[name](world_size)
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        from .configs import load_config

        return load_config(path)
    module = _module_of(name)
    missing = [f for f in ("build", "batch", "loss") if not callable(getattr(module, f, None))]
    if missing:
        raise ValueError(f"{name} has no {' and no '.join(missing)}: it needs functions build(), "
                         "batch(step, rank) and loss(model, batch); `zero-ref compare --template` "
                         "prints a file to start from")
    return Task(name, module.build, module.batch, module.loss,
                getattr(module, "optimizer", adam), getattr(module, "units", None))


def load_function(name: str) -> Callable:
    """The function of "file.py:function" or "package.module:function"."""
    where, _, function = name.rpartition(":")
    if not where:
        raise ValueError(f"{name}: give a file or a module and a function in it, such as "
                         "my_system.py:wrap_like")
    found = getattr(_module_of(where), function, None)
    if not callable(found):
        raise ValueError(f"{where} has no function {function}")
    return found


def _module_of(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"there is no file {name}")
    if path.suffix != ".py" and "/" in name:
        raise ValueError(f"{name}: give a file that ends with .py, a module such as "
                         "my_package.my_module, or a config.json or its folder")
    try:
        if path.suffix == ".py":
            return _from_file(path.resolve())
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(name)
    except Exception as error:
        known = f"there is no module {name}, and no model of that name: {', '.join(NAMED)}"
        what = known if _is_missing(error, name) else (
            f"{name} cannot be imported: {type(error).__name__}: {error}")
        raise ValueError(what) from error


def _from_file(path: Path) -> ModuleType:
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # for what it imports from beside it
    name = f"model_of_{path.stem}"  # so that my random.py does not hide Python's
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _is_missing(error: Exception, name: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and name.startswith(error.name or " ")
