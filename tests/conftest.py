import os

os.environ.setdefault("ZERO_REF_TIMEOUT", "20")  # a collective that hangs fails within seconds

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU, and this machine or this torch has none")
        for item in items:
            if item.get_closest_marker("gpu"):  # not in keywords, where the folders are, too
                item.add_marker(skip)
