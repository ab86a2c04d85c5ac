"""Between checkpoints and the single safetensors files that others write and read."""

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import folder
from .loading import Source
from .pack import DTYPES
from .shards import HEADER, check_header

_AT_A_TIME = 1 << 24  # elements


def export(checkpoint: Path, out: Path) -> int:
    """Write the model's tensors into one safetensors file, a few at a time. Needs no ranks. Returns
    their number.

    The format is a header in JSON, with its length before it, and then the tensors' bytes.
    """
    aside = out.with_name(f".{out.name}.writing")
    if any((parent / folder.MANIFEST).exists() for parent in out.resolve().parents):
        raise ValueError(f"{out} would lie in a checkpoint: name a file outside")
    with ExitStack() as opened:
        checkpoint = folder.newest(checkpoint)
        folder.check_files(checkpoint)
        source = Source(checkpoint, opened).parts["model"]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in source.listed.items():
            begin, end = end, end + math.prod(shape) * getattr(torch, dtype).itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        try:
            with open(aside, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name, (dtype, shape) in source.listed.items():
                    numel = math.prod(shape)
                    for begin in range(0, numel, _AT_A_TIME):
                        part = torch.empty(min(_AT_A_TIME, numel - begin),
                                           dtype=getattr(torch, dtype))
                        source.read(name, part, begin)
                        file.write(part.view(torch.uint8).numpy())
            folder.sync(aside)
            aside.replace(out)
        except OSError as error:
            raise OSError(f"{out}: {error.strerror or error}") from None
        finally:
            aside.unlink(missing_ok=True)
    return len(source.listed)


def import_(files: list[Path], path: Path) -> Path:
    """Commit a checkpoint, in the folder `path`, of a state dict's safetensors files: of a model
    alone. Returns its path. Raises ValueError for what is no such file."""
    tensors: dict[str, list] = {}
    torchs_name = {theirs: ours for ours, theirs in DTYPES.items()}
    for file in files:
        try:
            if file.exists() and not file.is_file():
                raise OSError("it is no ordinary file")
            check_header(file)
            with safe_open(file, "pt") as opened:
                if HEADER in (opened.metadata() or {}):
                    raise ValueError(f"{file} has one rank's part of the tensors of a checkpoint, "
                                     "which can be loaded as it is, or made one file by export")
                for name in opened.keys():
                    if name in tensors:
                        raise ValueError(f"{name!r} is in {file}, and in another file, too")
                    part = opened.get_slice(name)
                    if part.get_dtype() not in torchs_name:
                        raise ValueError(f"{file}: {name!r} is {part.get_dtype()}, which a "
                                         "checkpoint cannot hold")
                    tensors[name] = [torchs_name[part.get_dtype()], part.get_shape()]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
    aside = folder.begin(path)
    try:
        for part in ("model", "rest"):
            (aside / part).mkdir()
        written = [aside / f"model/rank0-{number}.safetensors" for number in range(len(files))]
        for file, copy in zip(files, written):
            shutil.copyfile(file, copy)
            folder.sync(copy)
        rest = aside / "rest/rank0.json"
        folder.to_disk(rest, json.dumps({"extra": {}, "optimizers": None}).encode())
        facts = {str(file.relative_to(aside)): folder.facts(file) for file in (*written, rest)}
        return folder.commit(aside, {"files": facts, "tensors": {"model": tensors}}, keep=None)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
