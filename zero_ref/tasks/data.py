"""Real data without a download: handwritten digits, MNIST files, and Python's own help texts."""

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from .models import GPT, cnn, residual_mlp
from .task import OPTIMIZERS, Task, adam

CONTEXT = 64  # characters that the GPT sees at once


@dataclass
class Data:
    """What is trained on what. train and held_out: inputs and targets, sample by sample."""

    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> mean over the batch
    metric: str  # "accuracy" or "loss", on the held-out samples
    train: TensorDataset
    held_out: TensorDataset
    optimizer: Callable[..., torch.optim.Optimizer] = adam

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device | str = "cpu",
                 batch_size: int = 256) -> float:
        """The metric on all held-out samples. At stage 3 every rank must call it."""
        model.eval()
        total = 0.0
        for x, y in DataLoader(self.held_out, batch_size):
            x, y = x.to(device), y.to(device)
            output = model(x)
            if self.metric == "accuracy":
                total += (output.argmax(-1) == y).sum().item()
            else:
                total += self.loss(output, y).item() * len(x)
        model.train()
        return total / len(self.held_out)


def load(name: str, data_dir: Path | str | None = None) -> Data:
    """What the task "digits", "cnn", "mnist" (four IDX files in `data_dir`) or "text" trains on.

    Raises ValueError for MNIST files that are missing, truncated or not IDX.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r}: must be one of {', '.join(TASKS)}")
    return TASKS[name](data_dir)


def task(name: str, data_dir: Path | str | None, world_size: int, batch_size: int,
         optimizer: str | None = None, seed: int = 0) -> Task:
    """The same as a Task. batch_size: samples per step, all ranks together. optimizer: one of
    OPTIMIZERS instead of the task's own.

    Raises ValueError if the batch does not divide, or is larger than the data.
    """
    data = load(name, data_dir)
    per_rank = _per_rank(data, batch_size, world_size)

    @lru_cache(maxsize=1)
    def order(epoch, rank):
        sampler = _sampler(data, world_size, rank, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    def batch(step, rank):
        per_epoch = len(data.train) // world_size // per_rank
        epoch, at = divmod(step, per_epoch)
        return data.train[order(epoch, rank)[at * per_rank :][:per_rank]]

    return Task(name, data.build, batch, lambda model, batch: data.loss(model(batch[0]), batch[1]),
                data.optimizer if optimizer is None else OPTIMIZERS[optimizer],
                evaluate=data.evaluate, metric=data.metric)


def batches(data: Data, steps: int, batch_size: int, rank: int, world_size: int,
            seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches (x, y) for one rank. The samples of a step, all ranks together, are the same
    whatever the world size; each rank gets batch_size / world_size of them.

    Raises ValueError if the batch does not divide, or is larger than the data.
    """
    sampler = _sampler(data, world_size, rank, seed)
    loader = DataLoader(data.train, _per_rank(data, batch_size, world_size), sampler=sampler,
                        drop_last=True)
    return _first(steps, loader, sampler)


def _sampler(data, world_size, rank, seed):
    return DistributedSampler(data.train, world_size, rank, seed=seed, drop_last=True)


def _per_rank(data, batch_size, world_size):
    if batch_size % world_size or not 0 < batch_size <= len(data.train):
        limit = min(batch_size, len(data.train))
        raise ValueError(f"batch size {batch_size}: must divide among {world_size} ranks and be at "
                         f"most {len(data.train)}; {max(world_size, limit - limit % world_size)} "
                         "would work")
    return batch_size // world_size


def _first(steps, loader, sampler):
    for epoch in count():
        sampler.set_epoch(epoch)
        for batch in loader:
            if steps == 0:
                return
            steps -= 1
            yield batch


# ---- the tasks -----------------------------------------------------------------------------------


def _digits(_):
    return replace(_cnn(_), build=lambda: residual_mlp(64, 10),
                   optimizer=lambda params: torch.optim.Adam(params, lr=3e-4))


def _cnn(_):
    images, labels = _digit_images()
    test = np.arange(len(images)) % 5 == 0  # every fifth image is held out
    return _images(images[~test], labels[~test], images[test], labels[test])


@cache
def _digit_images():
    with np.load(str(files(__package__) / "assets" / "digits.npz")) as arrays:
        return arrays["images"] / np.float32(16), arrays["labels"]


def _mnist(data_dir):
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    if data_dir is None:
        raise ValueError("task mnist needs --data-dir, a folder with the four MNIST files "
                         f"{', '.join(names)} (plain or .gz)")
    paths = {name: _find(Path(data_dir), name) for name in names}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{data_dir} has no {', '.join(missing)} (plain or .gz)")
    train_x, train_y, test_x, test_y = [_read_idx(paths[name], 3 if "images" in name else 1)
                                        for name in names]
    for x, y, which in ((train_x, train_y, names[1]), (test_x, test_y, names[3])):
        if len(x) != len(y):
            raise ValueError(f"{paths[which]} has {len(y)} labels for {len(x)} images")
        if len(y) and y.max() > 9:
            raise ValueError(f"{paths[which]} has label {y.max()}; MNIST's are 0 to 9")
    scale = np.float32(255)
    return _images(train_x / scale, train_y, test_x / scale, test_y)


def _text(_):
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics.values())
    alphabet = sorted(set(text))
    place = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([place[character] for character in text])
    windows = (len(ids) - 1) // CONTEXT
    x = ids[: windows * CONTEXT].view(windows, CONTEXT)
    y = ids[1 : windows * CONTEXT + 1].view(windows, CONTEXT)  # the next character
    split = windows * 9 // 10
    return Data(build=lambda: GPT(len(alphabet), CONTEXT),
                loss=lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten()),
                metric="loss", train=TensorDataset(x[:split], y[:split]),
                held_out=TensorDataset(x[split:], y[split:]))


TASKS = {"digits": _digits, "cnn": _cnn, "mnist": _mnist, "text": _text}


def _images(train_x, train_y, test_x, test_y):
    def dataset(x, y):
        return TensorDataset(torch.from_numpy(x).unsqueeze(1), torch.tensor(y, dtype=torch.long))

    height, width = train_x.shape[1:]
    return Data(build=lambda: cnn(height, width), loss=F.nll_loss, metric="accuracy",
                train=dataset(train_x, train_y), held_out=dataset(test_x, test_y))


def _find(folder, name):
    candidates = [folder / name, folder / f"{name}.gz"]
    return next((path for path in candidates if path.is_file()), None)


def _read_idx(path, dims):
    """An IDX file of unsigned bytes: two zero bytes, type 0x08, the number of dimensions, each
    dimension as a big-endian 32-bit number, then the values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    head = 4 + 4 * dims
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path} is no IDX file of unsigned bytes with {dims} dimension(s): it "
                         f"begins with {raw[:4].hex(' ') or 'nothing'}, not 00 00 08 {dims:02x}")
    shape = struct.unpack(f">{dims}I", raw[4:head])
    if len(raw) - head != np.prod(shape, dtype=int):
        raise ValueError(f"{path} says it holds {' x '.join(map(str, shape))} bytes, but has "
                         f"{len(raw) - head}: truncated, or not the file it says it is")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
