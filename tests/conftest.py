import gc
import os

os.environ.setdefault("ZERO_REF_TIMEOUT", "20")  # a collective that hangs fails within seconds

import pytest
import torch

from zero_ref.ranks import pool

# Each rank would import these anew.
pool.PRELOAD += ["pytest", "zero_ref.commands.measure", "zero_ref.labs.exercises", "zero_ref.viz",
                 "torch.distributed.fsdp", "torch.distributed.checkpoint", "transformers"]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU, and this machine or this torch has none")
        for item in items:
            if item.get_closest_marker("gpu"):  # not in keywords, where the folders are, too
                item.add_marker(skip)


def pytest_collection_finish():
    gc.freeze()  # the collector need not walk again and again through what was imported
