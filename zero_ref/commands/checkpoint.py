"""`zero-ref show`: what is in a checkpoint, as tables."""

from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..checkpoint import folder
from ..checkpoint.loading import Source, as_damaged


def show(path: Path) -> None:
    """Raises ValueError if there is no checkpoint, or if it is damaged."""
    checkpoint = folder.newest(path)
    folder.check_files(checkpoint)
    try:
        _show(checkpoint)
    except Exception as error:  # whatever a stranger's file makes of its readers
        raise as_damaged(checkpoint, error) from None


def _show(checkpoint):
    with ExitStack() as opened:
        source = Source(checkpoint, opened)
        size = sum(facts["bytes"] for facts in source.manifest["files"].values())
        ranks = source.manifest.get("world_size")
        print(f"{checkpoint}: {size:,} bytes in {len(source.manifest['files'])} files, "
              + (f"written by {ranks} ranks" if ranks else "imported"))
        for part, shards in source.parts.items():
            table = Table(title=part, title_justify="left", box=box.SIMPLE_HEAD)
            table.add_column("tensor", overflow="fold")
            for heading in ("shape", "dtype"):
                table.add_column(heading, no_wrap=True)
            for heading in ("bytes", "ranks", "boxes"):
                table.add_column(heading, justify="right", no_wrap=True)
            for name, (dtype, shape) in shards.listed.items():
                boxes = shards.boxes_of(name)
                table.add_row(_printable(name), str(tuple(shape)), dtype,
                              f"{prod(shape) * getattr(torch, dtype).itemsize:,}",
                              _of_ranks(file for _, file in boxes), str(len(boxes)))
            Console(highlight=False, markup=False, emoji=False).print(table)
        for optimizer in source.optimizers or ():
            for number, group in enumerate(optimizer["groups"]):
                options = ", ".join(f"{key}={value!r}" for key, value in source.unpacked(
                    group["options"]).items())
                print(_printable(f"{optimizer['class']}, group {number} of {len(group['params'])} "
                                 f"parameters: {options}"))
        for name, value in source.extra().items():
            text = repr(value)
            print(_printable(f"{name}: {text if len(text) <= 200 else text[:200] + '…'}"))


def _of_ranks(files):
    """Whose files these are: of ranks one after another, as their slices are."""
    ranks = [int(file.removeprefix("rank").partition("-")[0]) for file in files]
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"


def _printable(text: str) -> str:
    """Strangers' names may hold what a terminal obeys."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
