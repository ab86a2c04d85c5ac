"""Snippets on the pages print what stands below them, words are where they are said to be, and the
scripts and settings for other libraries hold what the stages hold."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from ast import literal_eval
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import toy

import zero_ref
from zero_ref import MixedPrecision, course, memory
from zero_ref.commands.measure import most_bytes
from zero_ref.tasks.models import GPT

DOCS = Path(__file__).parent.parent / "docs"
ELSEWHERE = DOCS / "elsewhere"
HELD = ("parameters", "gradients", "optimizer")


def page(name):
    return (DOCS / name).read_text()


def script(name):
    """A script of docs/elsewhere as a module, on the rank that asks for it."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ELSEWHERE / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- snippets ------------------------------------------------------------------------------------


def run_snippets(name, scope):
    """Runs a page's Python from top to bottom. Returns [what it printed, what the page says]."""
    found = []
    for code, says in re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", page(name), re.DOTALL):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, name, "exec"), scope)
        found.append((printed.getvalue(), says))
    return found


@pytest.fixture(scope="module")
def which_stage():
    """What the page prints and says, and the names that it defines."""
    scope = {"__name__": "which_stage"}
    return run_snippets("which_stage.md", scope), scope


@pytest.mark.parametrize("part", [0, 1])
def test_which_stage_prints_what_the_page_says(which_stage, part):
    printed, says = which_stage[0][part]
    assert printed == says


def test_hybrid_sharding_prints_what_the_page_says():
    scope = {"__name__": "__main__"}  # so that its functions travel to the ranks by value
    (printed, says), = run_snippets("after_the_paper.md", scope)
    assert printed == says


SMALL = {"vocab": 4000, "width": 128, "heads": 4, "layers": 6}


def peak_of_a_step(stage, context):
    model = zero_ref.wrap(GPT(context=context, **SMALL), stage)
    optimizer = torch.optim.Adam(model.parameters())
    ids = torch.ones(1, context).long()

    def step():
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return sum(memory.resident(model, optimizer).values()) + most_bytes(torch.device("cpu"), step)


@pytest.mark.parametrize("context, most", [(2, 1.1), (512, 1.3)])
def test_which_stage_estimates_the_peak(which_stage, context, most):
    """Of a step with next to no activations, and of one with many. It adds up what is seldom there
    at one time, so it may be too much; it is too little by less than SPARE."""
    scope = which_stage[1]
    model = scope["measure"](torch.float32, context=context, **SMALL)
    measured = zero_ref.launch(
        lambda: [peak_of_a_step(stage, context) for stage in range(4)], 4)
    for stage in range(4):
        estimate = (sum(memory.model_states(model["psi"], 4, stage).values())
                    + scope["in_flight"](model, stage) + model["sample"])
        peak = max(peaks[stage] for peaks in measured)
        assert peak / 1.1 <= estimate <= most * peak, (stage, peak, estimate)


def sent_in_a_step(stage, mixed):
    model = zero_ref.wrap(course.build(), stage,
                          mixed_precision=MixedPrecision() if mixed else None)
    optimizer = torch.optim.Adam(model.parameters())
    images, labels = course.batch(0, model.rank)
    with zero_ref.trace() as t:
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
    return t.wire_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_stage_counts_what_is_sent(which_stage, dtype):
    psi = toy.padded([[p.numel() for p in layer.parameters()] for layer in course.build()], 4,
                     dtype.itemsize)
    sent = zero_ref.launch(lambda mixed: [sent_in_a_step(stage, mixed) for stage in range(4)], 4,
                           dtype != torch.float32)
    for stage in range(4):
        expected = which_stage[1]["sent"]({"psi": psi, "dtype": dtype}, 4, stage)
        assert [of_rank[stage] for of_rank in sent] == [expected] * 4


# ---- other libraries -----------------------------------------------------------------------------


def train(stage, steps=3):
    """A stage as the scripts have it."""
    model = zero_ref.wrap(course.build(), stage)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        images, labels = course.batch(step, model.rank)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        held = memory.resident(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return held | {"loss": loss.item()}


def train_with_all():
    kept = {"reshard_after_forward": False}
    return {"ddp_stage0.py": script("ddp_stage0.py").train(), "stage 0": train(0),
            "zero_redundancy_stage1.py": script("zero_redundancy_stage1.py").train(),
            "stage 1": train(1), "stage 2": train(2),
            "fsdp2_stage3.py": script("fsdp2_stage3.py").train(),
            "  --no-reshard-after-forward": script("fsdp2_stage3.py").train(**kept),
            "stage 3": train(3)}


@pytest.fixture(scope="module")
def by_rank():
    """{system: what it held and its loss} of each of four ranks."""
    return zero_ref.launch(train_with_all, 4)


def test_torch_holds_what_the_stages_hold(by_rank):
    whole = 4 * sum(p.numel() for p in course.build().parameters())
    states = sum(systems["zero_redundancy_stage1.py"]["optimizer"] for systems in by_rank)
    assert states == 2 * whole  # each of Adam's two states once
    for systems in by_rank:
        def held(name, *kinds, systems=systems):
            return [systems[name][kind] for kind in kinds]

        assert held("ddp_stage0.py", *HELD) == held("stage 0", *HELD) == [whole, whole, 2 * whole]
        assert (held("zero_redundancy_stage1.py", "parameters", "gradients")
                == held("stage 1", "parameters", "gradients") == [whole, whole])
        for name in ("fsdp2_stage3.py", "  --no-reshard-after-forward"):
            assert held(name, *HELD) == held("stage 3", *HELD) == [whole / 4, whole / 4, whole / 2]
        one_layer = whole / 6  # in full, beside a quarter of the others
        assert held("fsdp2_stage3.py", "in forward") == [one_layer + (whole - one_layer) / 4]
        assert held("  --no-reshard-after-forward", "in forward") == [whole]
        for name, found in systems.items():
            assert found["loss"] == pytest.approx(systems["stage 0"]["loss"], rel=1e-4), name


def test_the_bytes_on_the_page(by_rank):
    lines = [f"{'':28}" + "".join(f"{kind:>12}" for kind in HELD)]
    lines += [f"{name:28}" + "".join(f"{found[kind]:12,}" for kind in HELD)
              for name, found in by_rank[0].items()]
    assert "<!-- bytes -->\n```text\n" + "\n".join(lines) + "\n```\n" in page("elsewhere/README.md")


def test_fsdp2_on_three_ranks():
    """There FSDP2 pads to whole rows, and stage 3 to 16 bytes."""
    layers = [list(layer.parameters()) for layer in course.build()[1:]]
    ours = memory.model_states([[p.numel() for p in layer] for layer in layers], 3, 3)
    rows = [[-(-p.shape[0] // 3) * p[0].numel() for p in layer] for layer in layers]
    for held in zero_ref.launch(lambda: script("fsdp2_stage3.py").train(), 3):
        assert held["parameters"] == held["gradients"] == 4 * sum(map(sum, rows))
        padding = 4 * sum(3 * sum(mine) - sum(p.numel() for p in layer)
                          for mine, layer in zip(rows, layers))
        assert 0 <= held["parameters"] - ours["parameters"] <= padding / 3


def test_fsdp2_under_torchrun(by_rank):
    """As the page says, but with one rank, which holds everything."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "1", ELSEWHERE / "fsdp2_stage3.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    held = literal_eval(re.fullmatch(r"rank 0: (\{.*\})\n", done.stdout)[1])
    assert [held[kind] for kind in HELD] == [by_rank[0]["stage 0"][kind] for kind in HELD]


# ---- DeepSpeed -----------------------------------------------------------------------------------

# As its documentation lists them, https://www.deepspeed.ai/docs/config-json/
OPTIONS = {"stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
           "allgather_partitions", "allgather_bucket_size", "stage3_prefetch_bucket_size",
           "stage3_max_live_parameters", "stage3_max_reuse_distance",
           "stage3_param_persistence_threshold"}


def settings(stage):
    return json.loads((ELSEWHERE / f"deepspeed_stage{stage}.json").read_text())


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_files_have_the_settings_of_the_course(stage):
    found = settings(stage)
    zero = found.pop("zero_optimization")
    assert found == {
        "train_micro_batch_size_per_gpu": len(course.batch(0, 0)[1]),
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam",
                      "params": {"lr": 0.01, "torch_adam": True, "adam_w_mode": False}},
        "fp16": {"enabled": False}, "bf16": {"enabled": False}}
    assert zero.keys() <= OPTIONS and zero["stage"] == stage
    layer = sum(p.numel() for p in course.build()[1].parameters())
    assert all(zero[option] == layer for option in zero if option.endswith("bucket_size"))
    if stage == 3:
        assert zero["stage3_max_live_parameters"] == 2 * layer
        assert zero["stage3_max_reuse_distance"] == zero["stage3_param_persistence_threshold"] == 0
    # What a small model needs and what the page says of it.
    for option, value in zero.items():
        if option.endswith(("size", "parameters", "distance", "threshold")):
            assert re.search(rf"\| `{option}` \| {value}\b", page("elsewhere/README.md")), option


def train_with_deepspeed(config):
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    return script("with_deepspeed.py").train(config)


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
def test_deepspeed_really_shards_a_small_model(by_rank):
    """With the file as it is, and without each of the options that make it so."""
    whole = settings(3)
    tries = {"deepspeed_stage3.json": whole} | {
        f"without {option}": whole | {"zero_optimization": {
            name: value for name, value in whole["zero_optimization"].items() if name != option}}
        for option in whole["zero_optimization"] if option.startswith("stage3")}
    lines = []
    for name, config in tries.items():
        found = zero_ref.launch(train_with_deepspeed, 4, config)
        assert len({of_rank["elements"] for of_rank in found}) == 1
        lines.append(f"{name:42}{found[0]['elements']:7,}")
    says = "<!-- deepspeed -->\n```text\n" + "\n".join(lines) + "\n```\n"
    assert says in page("elsewhere/README.md")
    for stage in range(4):
        found = zero_ref.launch(train_with_deepspeed, 4, settings(stage))
        for ours, theirs in zip(by_rank, found):
            assert theirs["loss"] == pytest.approx(ours["stage 0"]["loss"], rel=1e-4)


# ---- links and words -----------------------------------------------------------------------------


def test_the_page_of_the_folder_links_to_all_its_files():
    links = re.findall(r"\]\(([^)\s]+)\)", page("elsewhere/README.md"))
    files = {path.name for path in ELSEWHERE.iterdir() if path.suffix in (".py", ".json")}
    assert {link for link in links if "://" not in link} == files


def rows(title):
    """(word, where) of a table of docs/words.md."""
    table = page("words.md").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| ([^|]+) \| [^|]+ \| \[[^\]]+\]\(([^)]+)\) \|$", table, re.MULTILINE)


def plain_text(path):
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


@pytest.mark.parametrize("title, count", [("Symbols", 14), ("Words", 55)])
def test_words_are_in_order_and_where_the_page_says(title, count):
    found = rows(title)
    words = [word for word, _ in found]
    assert len(found) >= count
    assert words == sorted(set(words), key=lambda word: word.strip("(").casefold())
    for word, link in found:
        text = " ".join(plain_text(DOCS / link).replace("#", " ").split())
        if title == "Symbols":  # a letter by itself
            there = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)
        else:
            pattern = "[ _-]?".join(map(re.escape, re.split("[ _]", word)))
            there = re.search(rf"(?<![a-z]){pattern}", text, re.IGNORECASE)
        assert there, (word, link)
