"""What users start: `zero-ref compare` and `zero-ref train`, in one process and under torchrun."""

import json
import subprocess
import sys

import pytest
import torch

import zero_ref
from zero_ref.commands import compare as compare_module
from zero_ref.commands.cli import PER_RANK, STEPS, main
from zero_ref.commands.train import train
from zero_ref.tasks import data

FEW = ["--world-size", "2", "--steps", "4", "--batch-size", "8"]


def test_import_draws_nothing():
    code = ("import sys, zero_ref; "
            "print([m for m in ('matplotlib', 'rich', 'IPython', 'PIL') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.alone
@pytest.mark.parametrize("task", ["cnn", "text"])
def test_compare(task, tmp_path, capsys):
    report_file, figure = tmp_path / "report.json", tmp_path / "figure.png"
    status = main(["compare", "--task", task, *FEW, "--json", str(report_file),
                   "--figure", str(figure)])
    text = capsys.readouterr().out
    assert status == 0 and "All 20 promises hold" in text, text
    assert figure.read_bytes().startswith(b"\x89PNG")

    report = json.loads(report_file.read_text())
    names = ["DDP", "FSDP2", "stage 0", "stage 1", "stage 2", "stage 3"]
    assert [row["system"] for row in report["systems"]] == names
    unit = 1e6 if max(row["peak_bytes"] for row in report["systems"]) > 1e7 else 1e3
    for row in report["systems"]:
        assert f"{row['loss']:.4f}" in text
        assert f"{sum(row['resident_bytes'].values()) / unit:,.1f}" in text
        assert f"{row['peak_bytes'] / unit:,.1f}" in text
        assert all(row["promises"].values())
        assert row["formula_bytes"] in (None, row["resident_bytes"])
        # What is alive is what the ledger says, and at most a few buffers and a batch beside it.
        held = sum(row["resident_bytes"].values())
        assert held <= row["together_bytes"] <= held + 100_000
    sent = [row["sent_bytes_per_step"] for row in report["systems"][2:]]
    assert sent[0] == sent[1] == sent[2] and sent[3] * 2 == sent[0] * 3
    held = [sum(row["resident_bytes"].values()) for row in report["systems"][2:]]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    for row in report["systems"]:
        if row["counted_by_kernel"] and row["formula_sent_bytes"]:
            # The kernel counts TCP's headers too.
            assert 0 <= row["counted_by_kernel"] / row["formula_sent_bytes"] - 1 < 0.05


def test_compare_with_a_number_of_ranks_alone(tmp_path):
    file = tmp_path / "report.json"
    assert main(["compare", "--world-size", "3", "--task", "cnn", "--steps", "2", "--stages", "3",
                 "--optimizer", "sgd", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [row["system"] for row in report["systems"]] == ["DDP", "FSDP2", "stage 0", "stage 3"]
    assert report["optimizer"] == "SGD"


def test_compare_fails_if_a_promise_does_not_hold(monkeypatch, capsys):
    def run_and_spoil(*args, **kwargs):
        report = run(*args, **kwargs)
        report["failed_promises"].append("stage 3: nothing holds")
        return report

    run = compare_module.run
    monkeypatch.setattr(compare_module, "run", run_and_spoil)
    assert main(["compare", "--task", "cnn", *FEW, "--stages", "3"]) == 1
    assert "1 of 10 promises do NOT hold:\n  stage 3: nothing" in capsys.readouterr().out


def test_digits_are_learnt():
    """Held-out accuracy above 95 %, with the command's own defaults."""
    def digits():
        return data.task("digits", None, 4, 4 * PER_RANK)

    report = zero_ref.launch(lambda: train(digits, 3, steps=STEPS, device="cpu", seed=0), 4)[0]
    assert report["held_out"] > 0.95


def test_train(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main(["train", "--stage", "2", *FEW, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["stage"], report["world_size"], report["steps"]) == (2, 2, 4)
    assert "digits, stage 2, 2 ranks on cpu" in capsys.readouterr().out


def test_train_under_torchrun_gives_the_same_result(tmp_path):
    mine, theirs = tmp_path / "launch.json", tmp_path / "torchrun.json"
    options = ["train", "--stage", "3", "--steps", "4", "--batch-size", "8"]
    main([*options, "--world-size", "2", "--json", str(mine)])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "-m", "zero_ref", *options, "--json", str(theirs)],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out accuracy") == 1  # rank 0 only
    mine, theirs = (json.loads(file.read_text()) for file in (mine, theirs))
    assert mine["held_out"] == theirs["held_out"]
    # In fp32, where kernels sum in the order of their threads, and torchrun leaves one to a rank.
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("arguments, sentence", [
    (["compare", "--world-size", "0"], "world_size=0: must be a whole number, 1 or more"),
    (["compare", "--steps", "1"], "steps=1: at least 2"),
    (["compare", "--batch-size", "10", "--world-size", "3"], "9 would work"),
    (["compare", "--json", "/no/such/folder/file.json"], "the folder /no/such/folder does not"),
    (["compare", "--task", "mnist"], "needs --data-dir"),
    (["compare", "--task", "mnist", "--data-dir", "/no/such/folder"], "/no/such/folder has no"),
    (["train", "--stage", "1", "--backend", "nccl"], "'nccl' does not work on the CPU"),
    (["train", "--stage", "1", "--steps", "0"], "steps=0: at least 1"),
])
def test_bad_arguments(arguments, sentence, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert main(["train", "--stage", "1", "--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_torchrun_started_another_number_of_ranks(monkeypatch, capsys):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--stage", "1", "--world-size", "4"]) == 2
    assert "--world-size 4, but torchrun started 2 ranks" in capsys.readouterr().err
