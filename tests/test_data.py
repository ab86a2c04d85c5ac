"""The data are real, the files are checked, and the ranks share every batch."""

import gzip
import struct

import numpy as np
import pytest
import torch

import zero_ref
from zero_ref.commands.train import train
from zero_ref.tasks import data


def test_digits():
    task = data.load("digits")
    images, labels = task.train.tensors
    assert images.shape == (1437, 1, 8, 8) and len(task.held_out) == 360
    assert images.min() == 0 and images.max() == 1 and set(labels.tolist()) == set(range(10))
    # UCI's own count of each digit in this file.
    both = torch.cat([labels, task.held_out.tensors[1]])
    assert both.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_text_targets_are_the_next_characters():
    x, y = data.load("text").train.tensors
    assert x.shape == y.shape and x.shape[1] == data.CONTEXT
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1])


@pytest.mark.parametrize("task", ["digits", "text"])
def test_a_step_sees_the_same_samples_at_any_world_size(task):
    task = data.load(task)

    def samples(world_size, step):
        parts = [list(data.batches(task, step + 1, 12, rank, world_size, seed=1))[step]
                 for rank in range(world_size)]
        assert all(len(x) == 12 // world_size for x, _ in parts)
        x = torch.cat([x for x, _ in parts]).flatten(1).float()
        return sorted(map(tuple, x.tolist()))

    as_task = data.task("digits", None, 3, 12, seed=1)
    order = list(data.batches(data.load("digits"), 130, 12, 2, 3, seed=1))
    for step in (0, 118, 119, 129):  # also in the second epoch, which begins with step 119
        assert all(map(torch.equal, as_task.batch(step, 2), order[step]))
    for step in (0, 3):
        assert len({tuple(samples(n, step)) for n in (1, 2, 3, 4)}) == 1
    assert samples(2, 0) != samples(2, 1)


@pytest.mark.parametrize("batch_size, fits", [(10, 9), (2, 3), (0, 3), (3000, 1437)])
def test_batch_size(batch_size, fits):
    with pytest.raises(ValueError, match=f"batch size {batch_size}: .* {fits} would work"):
        data.batches(data.load("digits"), 1, batch_size, 0, 3, seed=0)


def test_unknown_task():
    with pytest.raises(ValueError, match="task 'cifar': must be one of digits, cnn, mnist, text"):
        data.load("cifar")


# ---- MNIST ---------------------------------------------------------------------------------------

NAMES = {"train-images-idx3-ubyte": 60, "train-labels-idx1-ubyte": 60,
         "t10k-images-idx3-ubyte": 20, "t10k-labels-idx1-ubyte": 20}


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """Four small IDX files, one of them zipped: noise, and labels that depend on it."""
    random = np.random.default_rng(0)
    for name, count in NAMES.items():
        if "images" in name:
            array = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        else:
            array = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / name).write_bytes(idx(array))
    name = "t10k-images-idx3-ubyte"
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    (tmp_path / name).unlink()
    return tmp_path


def test_mnist_files(mnist):
    task = data.load("mnist", mnist)
    x, y = task.train.tensors
    assert x.shape == (60, 1, 28, 28) and x.dtype == torch.float32 and 0.9 < x.max() <= 1
    assert y.tolist() == [i % 10 for i in range(60)]
    assert task.held_out.tensors[0].shape == (20, 1, 28, 28)


def test_mnist_trains(mnist):
    reports = zero_ref.launch(
        lambda: train(lambda: data.task("mnist", mnist, 2, 10, "sgd"), 3, steps=2, device="cpu",
                      seed=0), 2)
    assert reports[0]["metric"] == "accuracy" and reports[0]["loss"] == reports[1]["loss"]


def swap(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize("break_it, sentence", [
    (lambda path: path.unlink(), "has no train-labels-idx1-ubyte"),
    (lambda path: path.write_bytes(path.read_bytes()[:-7]), "says it holds 60 bytes, but has 53"),
    (swap(b""), "is no IDX file .* begins with nothing"),
    (swap(b"PK\3\4 something else"), "begins with 50 4b 03 04, not 00 00 08 01"),
    (swap(idx(np.zeros((60, 28, 28), np.uint8))), "begins with 00 00 08 03"),
    (swap(idx(np.zeros(59, np.uint8))), "has 59 labels for 60 images"),
    (swap(idx(np.full(60, 11, np.uint8))), "has label 11"),
    (lambda path: (path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes())[:-9]),
                   path.unlink()), "cannot be read"),
])
def test_mnist_files_that_are_wrong(mnist, break_it, sentence):
    break_it(mnist / "train-labels-idx1-ubyte")
    with pytest.raises(ValueError, match=sentence):
        data.load("mnist", mnist)


def test_mnist_needs_a_folder():
    with pytest.raises(ValueError, match="needs --data-dir, a folder with the four MNIST files"):
        data.load("mnist")
