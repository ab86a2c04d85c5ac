"""Models of the transformers library, unchanged, tiny, and called as its users call them."""

from importlib import import_module

import pytest
import torch
import torch.distributed as dist
import toy

import zero_ref

pytest.importorskip("transformers", reason="needs the transformers library")

STAGES = (0, 1, 2, 3)
IDS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {  # the module of transformers: model, config and layer class, and what to configure
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", "GPT2Block", {
        **IDS, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", "LlamaDecoderLayer", {
        **IDS, **WIDTHS, "num_key_value_heads": 1}),
    "t5": ("T5ForConditionalGeneration", "T5Config", "T5Block", {
        **IDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "dropout_rate": 0.0, "decoder_start_token_id": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", "BertLayer", {
        **IDS, **WIDTHS, **NO_DROPOUT, "max_position_embeddings": 16}),
    "vit": ("ViTForImageClassification", "ViTConfig", "ViTLayer", {
        **WIDTHS, **NO_DROPOUT, "image_size": 8, "patch_size": 4, "num_labels": 5}),
}


def build(name):
    """The model and its layer class. Only ranks call this: to import a model takes seconds."""
    model, config, layer, options = MODELS[name]
    library = import_module(f"transformers.models.{name}.modeling_{name}")
    return (getattr(library, model)(getattr(library, config)(**options)),
            getattr(library, layer))


def batch(name, step, rank):
    """Different data on every rank and at every step, with padding for who reads text."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
                "labels": torch.randint(0, 5, (2,), generator=generator)}
    ids = torch.randint(3, 50, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5 + rank :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def wrapped(name, stage, meta=False, checkpointing=False, by_class=False, **options):
    """The model at this stage, or in torch's DDP. Different initial values on every rank."""
    torch.manual_seed(dist.get_rank())
    with torch.device("meta" if meta else "cpu"):
        module, layer = build(name)
    if checkpointing:
        module.gradient_checkpointing_enable()
    if stage == "ddp":
        return torch.nn.parallel.DistributedDataParallel(module)
    return zero_ref.wrap(module, stage, units=layer if by_class else None, **options)


def train(name, stage, steps=2, optimizer="sgd", **options):
    """A few steps on this rank: the model, its losses, and how many forwards its parts ran."""
    model = wrapped(name, stage, **options)
    opt = toy.OPTIMIZERS[optimizer](model.parameters())
    losses, calls = [], []
    for part in model.modules():
        part.register_forward_pre_hook(lambda part, args: calls.append(part))
    for step in range(steps):
        output = model(**batch(name, step, dist.get_rank()))
        output.loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(output.loss.item())
    return model, losses, len(calls)


def train_stages(name, stages=STAGES, **options):
    runs = []
    for stage in stages:
        model, losses, calls = train(name, stage, **options)
        weights = (model.module if stage == "ddp" else model).state_dict()
        runs.append({"weights": weights, "losses": losses, "calls": calls})
    return runs


def check_stages_agree(name, world_size=2, **options):
    by_rank = toy.ranks(train_stages, world_size, name, **options)
    for rank, runs in enumerate(by_rank):
        for stage, run in zip(STAGES, runs):
            assert toy.equal(run["weights"], by_rank[0][0]["weights"]), (stage, rank)
            assert run["losses"] == runs[0]["losses"], (stage, rank)
    return by_rank[0]


@pytest.mark.parametrize("world_size, by_class", [(2, False), (3, True)])
@pytest.mark.parametrize("name", MODELS)
def test_all_stages_equal_each_other_and_torch_ddp(name, world_size, by_class):
    # SGD: the gradient of a key's bias is all rounding, and Adam would make large steps of it.
    ours = check_stages_agree(name, world_size, by_class=by_class)
    ddp = toy.ranks(train_stages, world_size, name, ["ddp"])[0][0]
    assert all(toy.close(run["weights"], ddp["weights"]) for run in ours)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing(name):
    plain = check_stages_agree(name)
    for stage, run in enumerate(check_stages_agree(name, checkpointing=True)):
        assert toy.equal(run["weights"], plain[stage]["weights"]), stage
        assert run["calls"] > plain[stage]["calls"]  # or nothing was recomputed


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mixed_precision(name):
    bf16 = zero_ref.MixedPrecision(torch.bfloat16)
    mixed = check_stages_agree(name, steps=1, mixed_precision=bf16)[0]
    full = toy.ranks(train_stages, 2, name, [0], steps=1)[0][0]
    assert mixed["losses"] == pytest.approx(full["losses"], rel=0.01)
    assert not toy.equal(mixed["weights"], full["weights"])  # or it was not mixed
    assert all(w.dtype == full["weights"][k].dtype for k, w in mixed["weights"].items())


def generate(name):
    """What each stage writes after two steps. Sampled, for greedy search may repeat one token."""
    prompt = batch(name, 0, 0)["input_ids"]
    tokens = []
    for stage in STAGES:
        model = train(name, stage)[0].eval()
        torch.manual_seed(0)
        with model.full_params():
            tokens.append(model.module.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6,
                do_sample=True))
    return tokens


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generate_inside_full_params(name):
    by_rank = toy.ranks(generate, 2, name)
    assert by_rank[0][0].unique().numel() > 6  # more than the start and the end
    assert all(torch.equal(t, by_rank[0][0]) for tokens in by_rank for t in tokens)


def load_into_bare_model(name):
    weights = train(name, 3)[0].state_dict()
    fresh, _ = build(name)
    fresh.load_state_dict(weights, strict=True)
    return weights, fresh.state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_loads_into_a_bare_model(name):
    for weights, loaded in toy.ranks(load_into_bare_model, 2, name):
        assert toy.equal(weights, loaded)


def initial_values(name, **options):
    """For each stage all weights and buffers, also those that no state dict has."""
    values = []
    for stage in STAGES:
        model = wrapped(name, stage, **options)
        values.append({**dict(model.module.named_buffers()), **model.state_dict()})
    return values


@pytest.mark.parametrize("name", MODELS)
def test_meta_device_gives_every_stage_the_values_that_transformers_would(name):
    by_rank = toy.ranks(initial_values, 2, name, meta=True)
    assert all(toy.equal(values, by_rank[0][0]) for stages in by_rank for values in stages)
    for key, usual in toy.ranks(initial_values, 2, name)[0][0].items():
        value = by_rank[0][0][key]
        if "inv_freq" in key or "position_ids" in key or usual.min() == usual.max():
            assert torch.equal(value, usual), key
        elif usual.numel() >= 64:  # random: other values, from the same distribution
            assert value.std().item() == pytest.approx(usual.std().item(), rel=0.3), key


@pytest.mark.parametrize("name", MODELS)
def test_training_what_was_built_on_the_meta_device(name):
    check_stages_agree(name, meta=True, optimizer="adamw")
