"""A folder of checkpoints: what is committed stays, what is not was never there.

    path/latest                     the name of the newest one
    path/checkpoint-000007/         a committed one; manifest.json lists all that is in it
    path/.writing-000008-5f3a…/     one that is being written, or was when the run was killed

A checkpoint is written aside. When every file of it is on disk, the manifest is written, and then
renaming the directory commits it: that happens wholly or not at all. `latest` moves after that, and
only then are older ones removed.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

MANIFEST, LATEST, FORMAT = "manifest.json", "latest", 1
_LARGEST_JSON = 1 << 28  # bytes
_MOST_VALUES = 4_000_000  # in a JSON file: in memory, each may take some 200 bytes
_NAME = re.compile(r"checkpoint-(\d{6,})")
_FILE = re.compile(r"(model|optimizer-\d+|rest)/rank\d+(-\d+)?\.(safetensors|json)")


class Damaged(ValueError):
    """A checkpoint that is not what was committed."""


class NoCheckpoint(ValueError):
    """There is none to load: nothing was ever committed there."""


# ---- writing -------------------------------------------------------------------------------------


def begin(path: Path) -> Path:
    """Make the folder of a new checkpoint, aside; what earlier runs have left there goes. Called on
    one rank."""
    if (path / MANIFEST).exists():
        raise ValueError(f"{path} is a checkpoint itself: name the folder around it, in which save "
                         "commits the next one")
    if (path / LATEST).is_dir():
        raise ValueError(f"{path / LATEST} is a directory: the name of the newest checkpoint is to "
                         "be written there")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no folder")
    if not path.exists():
        path.mkdir(parents=True)
        sync(path.parent)
    for left in path.glob(".writing-*"):  # of another run, perhaps: it may not commit half of it
        with suppress(OSError):
            left.rename(path / left.name.replace("writing", "removed"))
    for left in path.glob(".removed-*"):
        shutil.rmtree(left, ignore_errors=True)
    number = max([0, *map(_number, committed(path))]) + 1
    aside = path / f".writing-{number:06}-{secrets.token_hex(4)}"  # nor write into this one
    aside.mkdir()
    return aside


def to_disk(file: Path, content: bytes) -> None:
    """Write a file, and return when it is on disk."""
    with open(file, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def sync(path: Path) -> None:
    """Return when this file, or the names in this directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def facts(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": _sha256(opened)}


def commit(aside: Path, manifest: dict[str, Any], keep: int | None) -> Path:
    """All files are on disk: from here on it is the newest checkpoint. Called on one rank."""
    to_disk(aside / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1).encode())
    for directory in (*{aside / Path(name).parent for name in manifest["files"]}, aside):
        sync(directory)
    path = aside.parent
    final = path / f"checkpoint-{aside.name.split('-')[1]}"
    aside.rename(final)
    try:
        sync(path)
        to_disk(path / f".{LATEST}", f"{final.name}\n".encode())
        (path / f".{LATEST}").replace(path / LATEST)
        sync(path)
        for old in committed(path)[: -keep] if keep else ():
            removed = path / old.name.replace("checkpoint", ".removed")
            old.rename(removed)  # at no time is it half a checkpoint
            shutil.rmtree(removed, ignore_errors=True)
    except OSError as error:
        raise OSError(f"{final} was committed and is the newest one; but after that: {error}"
                      ) from None
    return final


# ---- finding and checking ------------------------------------------------------------------------


def committed(path: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    try:
        found = [p for p in path.iterdir() if _NAME.fullmatch(p.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=_number)


def newest(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest in that folder."""
    if path.name.startswith((".writing-", ".removed-")):
        raise ValueError(f"{path} was never committed: name the folder around it")
    if (path / MANIFEST).exists():
        return path
    if found := committed(path):
        return found[-1]
    what = "there is no such folder" if not path.exists() else "no checkpoint was committed there"
    raise NoCheckpoint(f"{path}: {what}")


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """What is to be in it. Raises Damaged."""
    file = checkpoint / MANIFEST
    try:
        found = read_json(file, checkpoint)
        names = found["files"]
        assert found["format"] == FORMAT and isinstance(names, dict)
    except OSError as error:
        raise Damaged(f"{file}: {error.strerror}") from None
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise Damaged(f"{file} is no manifest of a checkpoint: {error or 'its form is another'}"
                      ) from None
    for name in names:
        if not _FILE.fullmatch(name):
            raise Damaged(f"{file} lists {name!r}, which is no name of a checkpoint's file")
    return found


def check_files(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Raise Damaged unless the files are what was committed. share: (rank, world_size), for the
    part that this rank checks."""
    listed = manifest_of(checkpoint)["files"]
    for name in sorted(listed)[share[0] :: share[1]]:
        try:
            with open_plain(checkpoint / name, checkpoint) as opened:
                size, wanted = os.fstat(opened.fileno()).st_size, listed[name]["bytes"]
                if type(wanted) is not int:
                    raise TypeError
                if size != wanted:
                    raise Damaged(f"{checkpoint / name} has {size:,} bytes, and {wanted:,} were "
                                  "written")
                if _sha256(opened) != listed[name]["sha256"]:
                    raise Damaged(f"{checkpoint / name} is not what was written: its checksum is "
                                  "another")
        except OSError as error:
            raise Damaged(f"{checkpoint / name}: {error.strerror}") from None
        except (KeyError, TypeError):
            raise Damaged(f"{checkpoint / MANIFEST} says neither size nor checksum of {name}"
                          ) from None


def open_plain(file: Path, checkpoint: Path):
    """Open a file for reading that is no link and no device, and that lies in the checkpoint."""
    if Path(os.path.realpath(file)) != Path(os.path.realpath(checkpoint), file.relative_to(
            checkpoint)):
        raise Damaged(f"{file} is a link, or lies behind one, to outside of the checkpoint")
    opened = open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise Damaged(f"{file} is no ordinary file")
    return opened


def read_json(file: Path, checkpoint: Path) -> Any:
    """Raises ValueError for what is none, or too large."""
    with open_plain(file, checkpoint) as opened:
        content = opened.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise ValueError(f"it has more than {_LARGEST_JSON:,} bytes")
    return from_json(content)


def from_json(content: bytes) -> Any:
    """Raises ValueError for what is none, or would take too much memory."""
    if sum(map(content.count, (b",", b":", b"[", b"{"))) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values")

    def unique(pairs):
        if len(pairs) != len({key for key, _ in pairs}):
            raise ValueError("a name is there twice")
        return dict(pairs)

    return json.loads(content, object_pairs_hook=unique)


def _sha256(opened):
    return hashlib.file_digest(opened, "sha256").hexdigest()


def _number(checkpoint):
    return int(checkpoint.name.partition("-")[2])
