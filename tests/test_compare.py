"""Models of one's own in `zero_ref.compare` and `zero-ref compare --model`: what works beside DDP
and FSDP2, what is refused at once, and that the tables say what was measured."""

import json
import os
import subprocess
import sys
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zero_ref
from zero_ref.commands import bench
from zero_ref.commands import compare as compare_module
from zero_ref.commands.cli import main
from zero_ref.commands.report import what_to_look_at
from zero_ref.tasks import configs, files

STAGES = ["stage 0", "stage 1", "stage 2", "stage 3"]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(compare_module, "ROUNDS", 0)  # of timing


def mlp(dropout=0.0):
    blocks = [nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 6))
              for _ in range(3)]
    return nn.Sequential(*blocks)


def batch(step, rank):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def loss(model, x):
    return model(x).square().mean()


def compare(build=mlp, batch=batch, loss=loss, **options):
    return zero_ref.compare(build, batch, loss, **{"world_size": 2, "steps": 3, **options})


def check(report, promises=20):
    rows = {row["system"]: row for row in report["systems"]}
    assert list(rows) == ["DDP", "FSDP2", *STAGES]
    assert [row["failed"] for row in rows.values()] == [None] * 6
    assert report["failed_promises"] == []
    assert sum(len(row["promises"]) for row in rows.values()) == promises
    assert rows["DDP"]["float64_difference"] < 1e-9
    assert abs(rows["FSDP2"]["loss"] - rows["stage 3"]["loss"]) < 1e-3  # both train, in fp32
    return rows


# ---- models --------------------------------------------------------------------------------------


def test_a_plain_model():
    rows = check(compare())
    for row in rows.values():
        assert row["peak_bytes"] > sum(row["resident_bytes"].values())
    held = [sum(rows[stage]["resident_bytes"].values()) for stage in STAGES]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4


def test_dropout_is_seeded():
    check(compare(lambda: mlp(dropout=0.5)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


def test_a_resnet():
    def images(step, rank):
        generator = torch.Generator().manual_seed(9 * step + rank)
        return torch.randn(4, 1, 8, 8, generator=generator)

    check(compare(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), Residual(), Residual(), nn.Flatten(),
                                        nn.Linear(144, 3)), images))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.lstm = nn.Embedding(11, 6), nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        return self.head(self.lstm(self.token(ids))[0])


def test_an_rnn():
    def tokens(step, rank):
        return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(9 * step + rank))

    check(compare(Recurrent, tokens, lambda model, ids: F.cross_entropy(
        model(ids).flatten(0, 1), ids.flatten()), units=(nn.Embedding, nn.LSTM, nn.Linear)))


class Branches(nn.Module):
    """One layer is used twice, one on rank 1 alone, one never, and one is frozen."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.layers[3].requires_grad_(False)

    def forward(self, x, rank):
        twice, sometimes, _, frozen = self.layers
        x = frozen(twice(torch.tanh(twice(x))))
        return sometimes(x) if rank == 1 else x


def test_unused_frozen_and_repeated_parts():
    report = compare(Branches, lambda step, rank: (batch(step, rank), rank),
                     lambda model, batch: model(*batch).square().mean(),
                     units=lambda module: isinstance(module, nn.Linear))
    rows = {row["system"]: row for row in report["systems"]}
    assert report["failed_promises"] == []
    assert sum(len(row["promises"]) for row in rows.values()) == 12  # of bytes sent: no formula
    failed = {name: row["failed"] for name, row in rows.items() if row["failed"]}
    assert failed.keys() == {"FSDP2", "stage 3"}
    assert "'layers.1.bias' gets a gradient on some ranks only" in failed["FSDP2"]
    assert "'layers.1' runs on some ranks only" in failed["stage 3"]
    assert rows["DDP"]["resident_bytes"] == rows["DDP"]["formula_bytes"]
    assert report["unused"] == ["layers.2.bias", "layers.2.weight"]
    assert "have no simple formula" in " ".join(str(report).split())


def test_activations_are_counted_where_they_are():
    """The first unit keeps its input and the sigmoid's output, the second its input."""
    def build():
        return nn.Sequential(nn.Sequential(nn.Linear(6, 20), nn.Sigmoid()), nn.Tanh(),
                             nn.Sequential(nn.Linear(20, 3)))

    kept = compare(build, stages=(0,), units=nn.Sequential)["activations"]
    assert kept == {"in_units": 4 * 4 * (6 + 20 + 20), "largest_unit": 4 * 4 * (6 + 20),
                    "inputs": 4 * 4 * (6 + 20)}


def test_mixed_precision():
    report = compare(mixed_precision=zero_ref.MixedPrecision(torch.bfloat16))
    assert report["failed_promises"] == []
    rows = {row["system"]: row for row in report["systems"]}
    parameters = [rows[system]["resident_bytes"]["parameters"] for system in ("DDP", "stage 0")]
    assert parameters[1] < parameters[0]


CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50,
             "n_positions": 16, "architectures": ["GPT2LMHeadModel"]},
    "vit": {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "image_size": 16,
            "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8,
            "architectures": ["ViTForImageClassification"]},
    "t5": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2,
           "num_heads": 2, "vocab_size": 50, "decoder_start_token_id": 0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hugging_face_config(name, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    file = tmp_path / "report.json"
    where = tmp_path if name == "vit" else tmp_path / "config.json"
    assert main(["compare", "--model", str(where), "--world-size", "2", "--steps", "2",
                 "--stages", "3", "--json", str(file)]) == 0, capsys.readouterr()
    report = json.loads(file.read_text())
    assert report["task"].startswith(name) and report["failed_promises"] == []
    assert {row["failed"] for row in report["systems"]} == {None}


# ---- files and modules ---------------------------------------------------------------------------


def test_the_template_runs(tmp_path, monkeypatch, capsys):
    assert main(["compare", "--template"]) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text(capsys.readouterr().out)
    few = ["--world-size", "2", "--steps", "2", "--json", "report.json"]
    assert main(["compare", "--model", "my_model.py", *few, "--figure", "report.png"]) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["optimizer"] == "AdamW" and "All 20 promises hold" in text
    for row in report["systems"]:
        assert {"system", "peak_bytes", "seconds_per_step", "held_out"} <= row.keys()
        assert f"{row['held_out']:.4f}" in text and f"{row['peak_bytes'] / 1e6:,.1f}" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(bench, "OVERHEAD_AT", (1,))
    assert main(["train", "--stage", "3", "--model", "my_model.py", *few]) == 0
    assert "my_model.py, stage 3, 2 ranks" in capsys.readouterr().out
    assert main(["bench", "--model", "my_model.py", "--rounds", "1", "--steps", "1",
                 "--systems", "stage 3"]) == 0
    assert "my_model.py with Ψ" in capsys.readouterr().out


MINE = """
import torch
from torch.nn.parallel import DistributedDataParallel

class Mine(torch.nn.Module):  # with names that a model of this package has, too
    def __init__(self, module):
        super().__init__()
        self.module, self.units = DistributedDataParallel(module), [torch.zeros(250_000)]

    def forward(self, x):
        return self.module(x)

    def state_dict(self):
        return self.module.state_dict()

def wrap_like(module, stage):
    return Mine(module)
"""


def test_a_module_and_systems_of_my_own(tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "my_module.py").write_text(files.TEMPLATE)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--model", "my_package.my_module", "--world-size", "2", "--steps", "2",
                 "--stages", "1", "--system", "mine.py:wrap_like", "--system", "mine.py:Mine",
                 "--json", "report.json"]) == 0
    rows = {row["system"]: row for row in json.loads(
        (tmp_path / "report.json").read_text())["systems"]}
    assert list(rows) == ["DDP", "FSDP2", "stage 0", "stage 1", "wrap_like, stage 1",
                          "Mine, stage 1"]
    assert "takes 2 positional" in rows["Mine, stage 1"]["failed"]
    mine = rows["wrap_like, stage 1"]
    assert mine["digest"] == rows["DDP"]["digest"] and mine["peak_bytes"] > 1_000_000
    assert mine["together_bytes"] > 1_000_000 + sum(mine["resident_bytes"].values())
    if mine["counted_by_kernel"]:  # of everything on the loopback device, headers included
        assert mine["counted_by_kernel"] >= rows["DDP"]["formula_sent_bytes"]


def test_a_system_that_fails_keeps_its_row():
    def broken(module, stage):
        if stage == 3:
            raise NotImplementedError("stage 3 is not written yet")
        return zero_ref.wrap(module, stage)

    report = compare(systems={"mine": broken}, stages=(0, 3))
    assert "mine, stage 3" in str(report)
    rows = {row["system"]: row for row in report["systems"]}
    assert rows["mine, stage 0"]["failed"] is None and not report["failed_promises"]
    assert rows["mine, stage 3"]["failed"] == "NotImplementedError: stage 3 is not written yet"
    assert "mine, stage 3 failed: NotImplementedError: stage 3 is not" in str(report)


def test_a_system_that_does_not_average_is_found_out():
    class Alone(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    report = compare(systems={"mine": lambda module, stage: Alone(module)}, stages=(0,))
    assert "mine, stage 0 differs in float64, too: that is not rounding" in str(report)
    assert "DDP differs in float64" not in str(report)


def test_compare_under_torchrun(tmp_path):
    (tmp_path / "my_model.py").write_text(files.TEMPLATE)
    file = tmp_path / "report.json"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "-m", "zero_ref", "compare", "--model", "my_model.py", "--steps", "2",
                           "--stages", "3", "--json", str(file)],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("What a rank holds and sends") == 1  # rank 0 alone
    assert json.loads(file.read_text())["world_size"] == 2


# ---- what does not fit ---------------------------------------------------------------------------


GENERATOR, ONE = torch.Generator(), mlp()


def raises(*_):
    raise TypeError("no such width")


@pytest.mark.parametrize("options, sentence", [
    ({"build": lambda: raises()}, r"build\(\) of this model failed with TypeError.*no such width"),
    ({"build": lambda: {}}, r"build\(\) of this model returned a dict: it has to return a torch"),
    ({"build": lambda: nn.Sequential(nn.Embedding(3, 2, max_norm=1.0))}, "'0' has max_norm=1.0"),
    ({"build": lambda: nn.ReLU()}, "ReLU has no trainable parameters"),
    ({"units": nn.Conv2d}, "units=Conv2d matches no submodule"),
    ({"batch": raises}, r"batch\(0, 0\) of this model failed with TypeError.*no such width"),
    ({"batch": lambda step, rank: torch.ones(4, 6)}, "gives every rank the same data"),
    ({"loss": raises}, "failed with TypeError.*at line .* of test_compare.py: no such width"),
    ({"loss": lambda model, x: model(x)}, r"returned a tensor of shape \(4, 6\): it has to return"),
    ({"loss": lambda model, x: 1.0}, "returned a float: it has to return a scalar tensor"),
    ({"loss": lambda model, x: x.sum()}, "returned a tensor that needs no gradient"),
    ({"loss": lambda model, x: model(x).sum() * float("nan")}, "is NaN at the first step"),
    ({"batch": lambda step, rank: torch.randn(4, 6, generator=GENERATOR)}, "gives other data when"),
    ({"batch": lambda step, rank: UserDict(x=batch(step, rank))}, "in which no tensors were found"),
    ({"build": lambda: ONE}, "returns the same module each time"),
    ({"optimizer": lambda params: None}, "returned a NoneType: it has to return a torch.optim"),
    ({"mixed_precision": torch.bfloat16}, "give a zero_ref.MixedPrecision"),
    ({"stages": (4,)}, r"stages=\[4\]: each must be 0, 1, 2 or 3"),
    ({"steps": 1}, "steps=1: at least 2"),
    ({"device": "cuda"}, "no CUDA GPU"),
])
def test_what_does_not_fit(options, sentence):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=sentence):
        compare(**options)


def test_a_model_that_is_not_deterministic_is_said_to_be_so():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + os.urandom(1)[0] / 1000)

    report = compare(lambda: nn.Sequential(Noisy(6, 6), nn.Linear(6, 6)), stages=(0, 1))
    assert not report["deterministic"] and "not deterministic" in str(report)
    assert "differences of weights say nothing" in " ".join(str(report).split())
    assert "float64, too" not in str(report) and report["failed_promises"] == []


def by_shape(params):
    params = list(params)
    return torch.optim.AdamW([{"params": [p for p in params if p.ndim > 1], "weight_decay": 0.5},
                              {"params": [p for p in params if p.ndim <= 1]}], lr=1e-3)


def test_an_optimizer_that_sorts_by_shape_is_found_out():
    report = compare(optimizer=by_shape, stages=(0, 2))
    failed = {row["system"]: row["failed"] for row in report["systems"] if row["failed"]}
    assert failed.keys() == {"stage 2"} and "do not sort by shape" in failed["stage 2"]
    assert "promises that could be checked hold:" in str(report)


class TwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 6, dtype=torch.bfloat16)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).to(self.b.weight.dtype)).to(x.dtype)


def test_parameters_of_two_dtypes():
    assert compare(TwoDtypes, stages=(0, 1))["failed_promises"] == []


def test_a_step_that_fails_everywhere_is_said_once():
    def short(step, rank):
        if step == 2:
            raise IndexError("no more data")
        return batch(step, rank)

    with pytest.raises(ValueError, match="every system failed: IndexError: no more data"):
        compare(batch=short, stages=(0,))


def test_a_report_in_which_the_stages_failed():
    def loss(model, x):
        assert isinstance(model, nn.Sequential), "[/only the bare module]"
        return model(x).sum()

    report = compare(loss=loss, stages=(0,))
    assert [row["system"] for row in report["systems"] if row["failed"] is None] == ["FSDP2"]
    assert "stage 0 failed: AssertionError: [/only the bare module]" in str(report)
    json.dumps(report)


@pytest.mark.parametrize("name, text, sentence", [
    ("missing.py", None, "there is no file"),
    ("no_module_of_this_name", None, "there is no module no_module_of_this_name"),
    ("half.py", "def build(): pass", "has no batch and no loss: it needs functions build"),
    ("broken.py", "import no_such_package", "cannot be imported: ModuleNotFoundError"),
    ("text.json", "{", "cannot be read as a config"),
    ("list.json", "[]", "is not a Hugging Face config"),
    ("remote.json", '{"model_type": "x", "auto_map": {}}', "wants code from its repository"),
    ("new.json", '{"model_type": "of tomorrow"}', "does not know the model_type 'of tomorrow'"),
    ("clip.json", '{"model_type": "clip"}', "takes more than tokens or pixels alone"),
    ("audio.json", '{"model_type": "wav2vec2"}', "takes more than tokens or pixels alone"),
])
def test_a_file_that_does_not_fit(name, text, sentence, tmp_path, capsys):
    where = name
    if "." in name:
        where = str(tmp_path / name)
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["compare", "--model", where, "--world-size", "2"]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_config_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt2"]))
    with pytest.raises(ValueError, match="which needs the package transformers: pip install"):
        configs.load_config(tmp_path)


@pytest.mark.parametrize("options, sentence", [
    (["--model", "a.py", "--batch-size", "4"], "are for --task"),
    (["--system", "a.py"], "a.py: give a file or a module and a function in it"),
])
def test_options_that_do_not_fit(options, sentence, capsys):
    assert main(["compare", *options]) == 2
    assert sentence in capsys.readouterr().err


# ---- what is shown -------------------------------------------------------------------------------


def test_a_broken_promise_is_shown(monkeypatch):
    def launch_and_spoil(fn, *args, **kwargs):
        by_rank = zero_ref.launch(fn, *args, **kwargs)
        if fn.__name__ == "measure" and args[2].name == "stage 2":
            by_rank[0]["digest"] = by_rank[1]["digest"] = "another"
        if fn.__name__ == "measure" and args[2].name == "stage 3":
            by_rank[1]["resident"]["gradients"] += 4
            by_rank[1]["sent"] += 4
        if fn.__name__ == "train" and args[2].name == "stage 1":
            by_rank[0]["difference"] = 1e-8
        return by_rank

    monkeypatch.setattr(compare_module, "launch", launch_and_spoil)
    report = compare()
    assert sorted(report["failed_promises"]) == [
        "stage 1: in float64 the weights are DDP's, within 1e-09",
        "stage 2: the weights are those of stage 0, bit for bit",
        "stage 3: bytes sent are those of the formula on every rank",
        "stage 3: resident bytes are those of the formula on every rank"]
    assert "4 of 20 promises do NOT hold" in str(report)


def test_a_notebook_gets_table_and_picture():
    data = compare(stages=(0,))._repr_mimebundle_()
    assert "What a rank holds and sends" in data["text/plain"]
    assert "<pre" in data["text/html"] and "data:image/png;base64," in data["text/html"]


def test_in_a_notebook_nothing_is_shown_beside_that(monkeypatch, capsys):
    report = compare(stages=(0,))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "What a rank holds and sends" in str(report)
    assert capsys.readouterr().out == ""


def sentences(largest, root, child, peaks, numel=1000, states=4000, in_units=10000):
    def row(system, held, peak, sent=6000):
        return {"system": system, "kind": "torch" if system == "DDP" else "ours",
                "failed": None, "peak_bytes": peak, "sent_bytes_per_step": sent,
                "resident_bytes": {"parameters": held, "gradients": 0, "optimizer": 0}}

    rows = [row("DDP", 4 * states, peaks[0]), row("stage 0", 4 * states, peaks[0]),
            row("stage 3", states, peaks[1], 9000)]
    return " ".join(what_to_look_at({
        "systems": rows, "numel": numel, "itemsize": 4, "root_numel": root, "world_size": 4,
        "unit_count": 5,
        "activations": {"in_units": in_units, "largest_unit": in_units // 5, "inputs": 100},
        "largest_unit": {"name": "layer", "kind": "Linear", "numel": largest,
                         "largest_child": child, "tied": False, "frozen": False}}))


def test_what_dominates_is_said_with_its_number():
    assert ("DDP and 5,000 B at stage 3, which sends 9,000 B per step instead of 6,000 B"
            in sentences(100, 0, 0, (17000, 5000)))
    large = sentences(900, 0, 300, (17000, 12000))
    assert "'layer' (Linear), has 90% of the parameters" in large and "would have 1,200 B" in large
    assert "cannot be split" in sentences(900, 0, 0, (17000, 12000))
    assert "The root's own parameters, 3,200 B" in sentences(100, 800, 0, (17000, 9000))
    root = sentences(1000, 1000, 400, (17000, 9000))
    assert "gathers 4,000 B of them at once" in root and "largest child of the model has" in root
    activations = sentences(100, 0, 0, (30000, 18000))
    assert "take about 14.0 kB of the peak" in activations
    assert "of the 5 units about 6,100 B would remain" in activations
    assert "checkpointing" not in sentences(100, 0, 0, (30000, 18000), in_units=1000)
    assert "30.0 kB with DDP and as much at stage 3" in sentences(100, 0, 0, (30000, 30001))
    assert "checkpointing" not in sentences(100, 0, 0, (17000, 5000))
