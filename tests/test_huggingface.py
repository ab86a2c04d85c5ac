"""Models of the transformers library, unchanged, tiny, and called as its users call them."""

from importlib import import_module

import pytest
import torch
import torch.distributed as dist
import toy
from toy import STAGES, seed

import zero_ref

pytest.importorskip("transformers", reason="needs the transformers library")

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
    seed(dist.get_rank())
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


def trained(stage, name, **options):
    model, losses, calls = train(name, stage, **options)
    weights = (model.module if stage == "ddp" else model).state_dict()
    return {"weights": weights, "losses": losses, "calls": calls}


@pytest.mark.parametrize("name, world_size", [*zip(MODELS, [2, 3, 2, 3, 2])])
def test_all_stages_equal_each_other_and_torch_ddp(name, world_size):
    # SGD: the gradient of a key's bias is all rounding, and Adam would make large steps of it.
    # transformers computes the loss of text in fp32 whatever the dtype is, but alike in both.
    by_class = world_size == 3
    toy.stages_agree(trained, world_size, name, by_class=by_class)
    ours, ddp = toy.ranks(lambda: (trained(3, name, by_class=by_class), trained("ddp", name)),
                          world_size, dtype=torch.float64)[0]
    assert toy.close(ours["weights"], ddp["weights"])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing(name):
    plain = toy.stages_agree(trained, 2, name)[0]
    for stage, run in enumerate(toy.stages_agree(trained, 2, name, checkpointing=True)[0]):
        assert toy.equal(run["weights"], plain[stage]["weights"]), stage
        assert run["calls"] > plain[stage]["calls"]  # or nothing was recomputed


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mixed_precision(name):
    bf16 = zero_ref.MixedPrecision(torch.bfloat16)
    mixed = toy.stages_agree(trained, 2, name, steps=1, mixed_precision=bf16)[0][0]
    full = toy.ranks(trained, 2, 0, name, steps=1)[0]
    # bf16 rounds by 2**-9 at most, which is 0.2 %, and a loss is a mean of many roundings.
    assert mixed["losses"] == pytest.approx(full["losses"], rel=0.01)
    assert not toy.equal(mixed["weights"], full["weights"])  # or it was not mixed
    assert all(w.dtype == full["weights"][k].dtype for k, w in mixed["weights"].items())


def generate(name):
    """What each stage writes after two steps. Sampled, for greedy search may repeat one token."""
    prompt = batch(name, 0, 0)["input_ids"]
    tokens = []
    for stage in STAGES:
        model = train(name, stage)[0].eval()
        seed(0)
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
        elif usual.numel() >= 64:
            # Random: other values, from the same distribution. The deviation of 64 of them is
            # known to 9 %; these depend on seeds, and on no machine.
            assert value.std().item() == pytest.approx(usual.std().item(), rel=0.3), key


@pytest.mark.parametrize("name", MODELS)
def test_training_what_was_built_on_the_meta_device(name):
    toy.stages_agree(trained, 2, name, meta=True, optimizer="adamw")
