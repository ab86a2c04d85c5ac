"""The README says what the commands print."""

import json
import re
from pathlib import Path

import pytest
import torch

from zero_ref.commands import bench, compare
from zero_ref.engine import optimizers as optim

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_table_is_what_compare_prints():
    report = compare.compare("digits", [0, 1, 2, 3], 4, steps=2, batch_size=48, optimizer="adam",
                             device="cpu", backend=None, seed=0, data_dir=None)
    rows = [re.split(r" {2,}", line.strip()) for line in README.splitlines()]
    for system in report["systems"]:
        for name, kind in ((system["system"], "resident_bytes"), ("formula", "formula_bytes")):
            held = compare._held(system[kind])
            assert any(row[0] == name and row[1:5] == held for row in rows), (name, held)
        sent = f"{system['formula_sent_bytes'] / 1e3:,.1f}"
        assert any(row[0] == "formula" and row[-1] == sent for row in rows)


def test_the_training_loop_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("[{'parameters': 1")


@pytest.mark.parametrize("kind", optim.ELEMENTWISE)
def test_the_optimizers_it_names(kind):
    assert issubclass(kind, torch.optim.Optimizer) and kind.__name__ in README


def test_the_bench_table_is_what_was_measured(capsys):
    report = json.loads((Path(__file__).parent.parent / "figures" / "bench.json").read_text())
    bench.print_report(report)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    missing = [line for line in printed if line and line not in README.splitlines()]
    assert not missing
