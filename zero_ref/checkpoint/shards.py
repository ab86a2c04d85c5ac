"""Tensors of which each rank has some elements: in safetensors files, several for each rank.

A name may be in a file once, so a rank's first boxes of all tensors go into one file, its second
ones into another, and so on. Where a box lies in its tensor is in the file's header, in the form
that torch.distributed.checkpoint's HuggingFaceStorageReader reads.
"""

import json
import math
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import folder
from .boxes import Box, boxes
from .contents import Piece
from .folder import Damaged
from .pack import DTYPES

HEADER = "DCP_SHARDING_INFO"
_LARGEST_HEADER = 1 << 25  # bytes: some 200,000 tensors


def write(directory: Path, pieces: Sequence[Piece], rank: int) -> list[Path]:
    """Write this rank's pieces. Returns the files, which are on disk then."""
    files: list[dict[str, tuple[Box, Tensor]]] = []
    for piece in pieces:
        found = boxes(piece.shape, piece.begin, piece.begin + piece.values.numel())
        if 0 in piece.shape and rank == 0:
            found = [Box((0,) * len(piece.shape), piece.shape, 0)]
        for number, box in enumerate(found):
            if number == len(files):
                files.append({})
            values = piece.values[box.begin - piece.begin : box.end - piece.begin]
            files[number][piece.name] = box, values.view(box.sizes)
    written = []
    for number, content in enumerate(files):
        written.append(directory / f"rank{rank}-{number}.safetensors")
        where = {name: {"saved_offsets": box.offsets} for name, (box, _) in content.items()}
        _save({name: values for name, (_, values) in content.items()}, written[-1],
              {HEADER: json.dumps(where)})
    return written


def write_plain(file: Path, tensors: dict[str, Tensor]) -> Path:
    """Whole tensors, which are on disk then."""
    _save(tensors, file, {})
    return file


def _save(tensors, file, header):
    own, end = {}, 0
    for name, values in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        begin = values.data_ptr()  # safetensors refuses what shares memory
        own[name] = values.clone() if begin < end else values
        end = max(end, begin + values.nbytes)
    try:
        save_file(own, file, {"format": "pt", **header})
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None
    if _header_bytes(file) > _LARGEST_HEADER:
        raise OSError(f"{file}: {len(tensors):,} tensors are too many for the header of a file")
    file.chmod(file.parent.stat().st_mode & 0o666)  # who may read the folder may read the file
    folder.sync(file)


class Shards:
    """The tensors in one directory of a checkpoint, of which any elements can be read: a context.

    listed: name → [dtype, shape], all that has to be there. Raises Damaged if something is missing,
    or is there twice, or is another.
    """

    def __init__(self, checkpoint: Path, files: Iterable[str], listed: dict[str, list]):
        self.directory, self.listed = checkpoint, listed
        for name, (dtype, shape) in listed.items():
            whole = type(shape) is list and all(  # 5.0 would equal a 5
                type(n) is int and n >= 0 for n in shape)
            if dtype not in DTYPES or not whole or math.prod(n or 1 for n in shape) >= 1 << 63:
                raise Damaged(f"{checkpoint / folder.MANIFEST}: {name!r} would be {shape!r} "
                              f"{dtype!r}")
        self._opened = ExitStack()
        self._boxes: dict[str, list[tuple[Box, Any, Path]]] = {name: [] for name in listed}
        try:
            for file in sorted(files):
                self._look_into(checkpoint / file)
            for name in listed:
                self._check_complete(name)
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, name: str, out: Tensor, begin: int = 0) -> None:
        """Fill `out`, (n,), with the elements from `begin` on."""
        end = begin + out.numel()
        for saved, file, _ in self._boxes[name]:
            low, high = max(begin, saved.begin), min(end, saved.end)
            for box in boxes(saved.sizes, low - saved.begin, high - saved.begin):
                at = saved.begin + box.begin - begin
                out[at : at + math.prod(box.sizes)].view(box.sizes).copy_(_part(file, name, box))

    def boxes_of(self, name: str) -> list[tuple[Box, str]]:
        """The boxes of a tensor in its order, and the file in which each lies."""
        return [(box, path.stem) for box, _, path in self._boxes[name]]

    def whole(self, name: str) -> Tensor:
        """A tensor on the CPU."""
        dtype, shape = self.listed[name]
        out = torch.empty(math.prod(shape), dtype=getattr(torch, dtype))
        self.read(name, out)
        return out.view(shape)

    def _look_into(self, path):
        check_header(path)
        try:
            file = self._opened.enter_context(safe_open(path, "pt"))
            offsets = folder.from_json((file.metadata() or {}).get(HEADER, "{}").encode())
            for name in file.keys():
                if name not in self.listed:
                    raise Damaged(f"{path}: {name!r} is there, and the manifest does not list it")
                self._boxes[name].append((self._box(path, file, name, offsets), file, path))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError,
                RecursionError) as error:
            if isinstance(error, Damaged):
                raise
            raise Damaged(f"{path} is no file of a checkpoint: {error}") from None

    def _box(self, path, file, name, offsets):
        dtype, shape = self.listed[name]
        there = file.get_slice(name)
        sizes = tuple(there.get_shape())
        where = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(sizes)
        if there.get_dtype() != DTYPES.get(dtype):
            raise Damaged(f"{path}: {name!r} is {there.get_dtype()}, and {dtype} was written")
        if not (len(where) == len(sizes) == len(shape) and all(type(n) is int for n in where)):
            raise Damaged(f"{path}: {name!r} has {len(sizes)} dimensions there, and {len(shape)} "
                          "in the manifest")
        begin = sum(n * math.prod(shape[i + 1 :]) for i, n in enumerate(where))
        box = Box(where, sizes, begin)
        if math.prod(sizes) and boxes(shape, begin, box.end) != [box]:
            raise Damaged(f"{path}: {name!r} has {sizes} at {where}, which is no part of "
                          f"{tuple(shape)}")
        return box

    def _check_complete(self, name):
        self._boxes[name].sort(key=lambda part: (part[0].begin, part[0].end))
        numel, end = math.prod(self.listed[name][1]), 0
        for box, *_ in self._boxes[name]:
            if box.begin != end:
                break
            end = box.end
        else:
            if end == numel and self._boxes[name]:
                return
        raise Damaged(f"{self.directory}: of {name!r}, the elements from {end} on are missing, or "
                      "there twice")


def check_header(path: Path) -> None:
    """Before a reader allocates what a header asks for."""
    length = _header_bytes(path)
    if not 0 < length <= min(_LARGEST_HEADER, path.stat().st_size - 8):
        raise Damaged(f"{path} is no safetensors file: its header would have {length:,} bytes")


def _header_bytes(path):
    with open(path, "rb") as opened:
        start = opened.read(8)
    return struct.unpack("<Q", start)[0] if len(start) == 8 else 0


def _part(file, name, box):
    if not box.sizes:
        return file.get_tensor(name)
    return file.get_slice(name)[tuple(slice(begin, begin + size)
                                      for begin, size in zip(box.offsets, box.sizes))]
