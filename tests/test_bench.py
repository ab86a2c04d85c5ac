"""`zero-ref bench` measures what it says. Times themselves are never asserted."""

import importlib.util
import json
from unittest import mock

import pytest
import torch

import zero_ref
from zero_ref.commands import bench
from zero_ref.commands.cli import main

pytestmark = pytest.mark.alone  # the kernel counts what all processes of this machine send

FEW = ["--rounds", "1", "--steps", "2"]
EVERYWHERE = [s for s in bench.SYSTEMS if not s.startswith("DeepSpeed")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A short run of all systems that need nothing installed."""
    folder = tmp_path_factory.mktemp("bench")
    with mock.patch.object(bench, "OVERHEAD_AT", (1, 8)):
        assert main(["bench", "--model", "3M", *FEW, "--systems", *EVERYWHERE,
                     "--json", str(folder / "r.json"), "--figure", str(folder / "r.png")]) == 0
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "r.json").read_text())


def test_all_systems_train_the_same_model_on_the_same_data(report):
    rows = report["parts"][0]["systems"]
    assert [row["system"] for row in rows] == EVERYWHERE
    check_losses({row["system"]: row["loss"] for row in rows})


def test_all_systems_train_the_cnn_too():
    def measure():
        return {system: bench._measure(system, "CNN", "cpu", 1) for system in EVERYWHERE}

    measured = zero_ref.launch(measure, 2)[0]
    check_losses({system: m["loss"] for system, m in measured.items()})
    assert {m["about"]["numel"] for m in measured.values()} == {151_306}


UNUSED = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x)

build = Net

def batch(step, rank):
    return torch.ones(2, 4) + rank

def loss(model, x):
    return model(x).sum()
"""


def test_a_model_of_which_a_layer_is_unused(tmp_path):
    (tmp_path / "my_model.py").write_text(UNUSED)
    name, systems = str(tmp_path / "my_model.py"), ["DDP", "DDP + ZeroRedundancy", "stage 3"]
    measured = zero_ref.launch(
        lambda: [bench._measure(system, name, "cpu", 2)["loss"] for system in systems], 2)[0]
    assert max(measured) - min(measured) < 1e-4


def check_losses(losses):
    alone = losses.pop("floor")
    # They train in fp32, and sum in different orders.
    assert all(abs(loss - losses["DDP"]) < 1e-4 for loss in losses.values())
    assert abs(alone - losses["DDP"]) > 1e-3  # or communication would make no difference


def test_bytes_sent_are_counted(report):
    if report["parts"][0]["systems"][0]["sent_psi"] is None:
        pytest.skip("the kernel does not count what goes over the loopback device")
    sent = {row["system"]: row["sent_psi"] for row in report["parts"][0]["systems"]}
    if sent["floor"] >= 0.02:  # which sends nothing
        pytest.skip("other processes are using the loopback device")
    for stage, psi in [(0, 2), (1, 2), (2, 2), (3, 3), ("3, no reshard", 2)]:
        assert sent[f"stage {stage}"] == pytest.approx(psi / 2, rel=0.02)  # TCP's headers on top


def test_the_table_and_what_is_in_it(report, capsys):
    bench.print_report(report)
    text = capsys.readouterr().out
    for row in report["parts"][0]["systems"]:
        assert f"{row['seconds'] * 1e3:.1f}" in text and f"{row['ratio']:.2f}" in text
        assert 0 < row["least"] <= row["ratio"] <= row["most"]
        assert row["peak_bytes"] > 0
    assert max(map(len, text.splitlines())) <= 100
    assert set(report["overhead_us"]) == {"1", "8"}


@pytest.mark.parametrize("options, sentence", [
    (["--systems", "stage 9"], "systems stage 9: not among floor, DDP, stage 0"),
    (["--rounds", "0"], "at least 1"),
    (["--world-size", "0"], "at least 1"),
    (["--device", "cuda"], "no CUDA GPU"),
    (["--figure", "a.txt"], "must end with .png"),
])
def test_bad_input(options, sentence, capsys):
    if options == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["bench", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_deepspeed_is_named_when_it_is_missing():
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("it is installed")
    with pytest.raises(ValueError, match="DeepSpeed is not installed"):
        bench.bench(["3M"], ["DeepSpeed 1"], [2], rounds=1, steps=1)
