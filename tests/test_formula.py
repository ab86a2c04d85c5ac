"""The formula against the paper's own table (arXiv 1910.02054v3, table 1 and figure 1)."""

import pytest
import torch

from zero_ref import memory

# GB (1e9 bytes) of model states per rank as printed. Ψ -> ranks -> stages 1, 2, 3.
TABLE_1 = {
    7.5e9: {
        1: ("120", "120", "120"), 4: ("52.5", "41.3", "30"),
        16: ("35.6", "21.6", "7.5"), 64: ("31.4", "16.6", "1.88"),
        256: ("30.4", "15.4", "0.47"), 1024: ("30.1", "15.1", "0.12"),
    },
    128e9: {
        1: ("2048", "2048", "2048"), 4: ("896", "704", "512"),
        16: ("608", "368", "128"), 64: ("536", "284", "32"),
        256: ("518", "263", "8"), 1024: ("513", "257", "2"),
    },
    1000e9: {
        1: ("16000", "16000", "16000"), 4: ("7000", "5500", "4000"),
        16: ("4750", "2875", "1000"), 64: ("4187", "2218", "250"),
        256: ("4046", "2054", "62.5"), 1024: ("4011", "2013", "15.6"),
    },
}
ROWS = [(psi, ranks, stage, printed) for psi, by_ranks in TABLE_1.items()
        for ranks, row in by_ranks.items() for stage, printed in zip((1, 2, 3), row)]


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
