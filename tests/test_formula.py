"""The formula against the paper's own table (arXiv 1910.02054v3, table 1 and figure 1)."""

import pytest
import torch

from zero_ref import memory
from zero_ref.labs.on_planning import TABLE_1

ROWS = [(psi, ranks, stage, printed) for psi, by_ranks in TABLE_1.items()
        for ranks, row in by_ranks.items() for stage, printed in zip((1, 2, 3), row.split())]
assert len(ROWS) == 54


def paper(psi, ranks, stage):
    """Mixed-precision Adam: fp16 parameters and gradients, K = 12 bytes of fp32 states."""
    return memory.model_states(int(psi), ranks, stage, param_dtype=torch.float16,
                               grad_dtype=torch.float16, optimizer_dtypes=[torch.float32] * 3)


@pytest.mark.parametrize("psi, ranks, stage, printed", ROWS)
def test_table_1(psi, ranks, stage, printed):
    # The paper rounds one column and truncates the others: one unit of the last digit is allowed.
    digit = 10.0 ** -len(printed.partition(".")[2])
    assert abs(sum(paper(psi, ranks, stage).values()) / 1e9 - float(printed)) < digit


@pytest.mark.parametrize("stage, gigabytes", [(0, 120), (1, 31.40625), (2, 16.640625), (3, 1.875)])
def test_figure_1(stage, gigabytes):
    assert sum(paper(7.5e9, 64, stage).values()) == gigabytes * 1e9


def test_by_kind():
    assert paper(1000, 4, 2) == {"parameters": 2000, "gradients": 500, "optimizer": 3000}


def test_padding_is_counted_where_it_exists():
    # Parameters of 10 and 3 elements lie at 0 and 12, and one of 1 in another unit. On 2 ranks the
    # slices have 8 and 4: rank 1 owns 2 + 3 elements of the first unit and none of the second.
    def states(rank, stage):
        return memory.model_states([[10, 3], [1]], 2, stage, rank=rank,
                                   optimizer_dtypes=[torch.float32])

    assert states(0, 0) == {"parameters": 96, "gradients": 96, "optimizer": 56}
    assert states(0, 3) == {"parameters": 48, "gradients": 48, "optimizer": 36}
    assert states(1, 3) == {"parameters": 48, "gradients": 48, "optimizer": 20}
    for stage in (1, 2, 3):
        assert sum(states(rank, stage)["optimizer"] for rank in range(2)) == 56


@pytest.mark.parametrize("arguments, sentence", [
    ((10, 0, 1), "rank=0, world_size=0: must be 0 <= rank < world_size"),
    ((10, 2, 4), "stage=4: must be 0, 1, 2 or 3"),
    ((10, 2, -1), "stage=-1: must be 0, 1, 2 or 3"),
])
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        memory.model_states(*arguments)
