"""Bad input gets one clear sentence on every rank, and never a wait."""

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn

import zero_ref


def refusal(fn):
    """The sentence with which `fn` is refused on this rank."""
    try:
        fn()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(fn, world_size=2):
    answers = zero_ref.launch(lambda: refusal(fn), world_size)
    for answer in answers:
        assert "\n" not in answer, answer
    return answers


def expect(fn, *sentences):
    """`fn` is refused in the same words on every rank, and they contain `sentences`."""
    first, second = refusals(fn)
    assert first == second
    for sentence in sentences:
        assert sentence in first


# ---- wrap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [4, -1, "3", None, 1.0, True])
def test_stage(stage):
    expect(lambda: zero_ref.wrap(toy.build(), stage),
           f"ValueError: stage={stage!r}: must be 0, 1, 2 or 3")


def test_no_process_group():
    with pytest.raises(RuntimeError, match=r"no process group: call zero_ref.init\(\)"):
        zero_ref.wrap(toy.build(), 1)


@pytest.mark.parametrize("module", [nn.ReLU, lambda: nn.Linear(2, 2).requires_grad_(False),
                                    lambda: nn.Linear(0, 0)])
def test_nothing_to_train(module):
    expect(lambda: zero_ref.wrap(module(), 1), "has no trainable parameters")


@pytest.mark.parametrize("units, sentences", [
    (nn.Conv2d, ["units=Conv2d matches no submodule", "it has:", "Block", "Linear"]),
    ((nn.Conv2d, nn.Conv1d), ["units=Conv2d or Conv1d matches no"]),
    (lambda m: False, ["matches no submodule with parameters"]),
    (nn.ReLU, ["units=ReLU matches no"]),
    ("Block", ["units='Block': give a module class"]),
    (nn.ModuleList, ["unit 'blocks' is a ModuleList, which has no forward of its own"]),
])
def test_units(units, sentences):
    expect(lambda: zero_ref.wrap(toy.build(), 3, units=units), "ValueError", *sentences)


def test_mixed_devices():
    def wrap():
        module = toy.build()
        module.blocks[0].down.to("meta")
        zero_ref.wrap(module, 2)

    expect(wrap, "unit 'blocks.0' mixes devices", "'blocks.0.down.weight' is meta", "is cpu")


def differ(change):
    """Wrap a Toy that rank 1 has changed."""
    module = toy.build()
    if dist.get_rank() == 1:
        change(module)
    zero_ref.wrap(module, 2)


@pytest.mark.parametrize("change, sentences", [
    (lambda m: setattr(m.blocks[0], "up", nn.Linear(7, 9)),
     ["rank 0 has blocks.0.up.weight (8, 7)", "rank 1 has blocks.0.up.weight (9, 7)"]),
    (lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(3))), ["extra (3,)"]),
    (lambda m: m.blocks[2].down.weight.requires_grad_(False), ["blocks.2.down.weight", "frozen"]),
    (lambda m: m.register_buffer("more", torch.ones(3)),
     ["rank 0 has buffer norm.running_mean (7,)", "rank 1 has buffer more (3,)"]),
])
def test_modules_that_differ_between_ranks(change, sentences):
    expect(lambda: differ(change), "ValueError: the module differs between the ranks", *sentences)


def test_stages_that_differ_between_ranks():
    expect(lambda: zero_ref.wrap(toy.build(), dist.get_rank()),
           "the module differs between the ranks, first here: rank 0 has stage = 0, "
           "rank 1 has stage = 1")


def test_a_mistake_on_one_rank_is_an_error_on_all():
    first, second = refusals(lambda: zero_ref.wrap(toy.build(), 5 if dist.get_rank() else 2))
    assert first == "ValueError: rank 1 reports: stage=5: must be 0, 1, 2 or 3"
    assert second == "ValueError: stage=5: must be 0, 1, 2 or 3"


@pytest.mark.parametrize("stage", [0, 3])
def test_wrapped_twice(stage):
    def twice():
        module = toy.build()
        model = zero_ref.wrap(module, stage)
        zero_ref.wrap(module, stage)
        return model

    expect(twice, "ValueError: this Toy is wrapped already")
    expect(lambda: zero_ref.wrap(zero_ref.wrap(toy.build(), stage), stage),
           "is wrapped already")


def test_a_part_that_belongs_to_another_model():
    def share():
        actor, critic = toy.build(), toy.build()
        critic.blocks = actor.blocks
        model = zero_ref.wrap(actor, 1)
        zero_ref.wrap(critic, 1)
        return model

    expect(share, "ValueError: submodule 'blocks' of this Toy is wrapped already")


def test_parameters_that_share_memory():
    def wrap():
        module = toy.build()
        module.blocks[0].up.bias.data = module.blocks[2].up.bias.data
        zero_ref.wrap(module, 0)

    expect(wrap, "'blocks.2.up.bias' and 'blocks.0.up.bias' are two parameters that share their",
           "tie them by using one nn.Parameter")


def test_a_step_with_gradients_that_were_never_reduced():
    def step():
        model = zero_ref.wrap(toy.build(), 2)
        opt = torch.optim.Adam(model.parameters())
        with model.no_sync():
            model(toy.batch(0, 0)[0]).sum().backward()
        opt.step()

    expect(step, "RuntimeError: Adam.step() with a gradient of", "has not been reduced",
           "has to run outside")


def test_a_module_can_be_wrapped_again_once_its_model_is_gone():
    def again():
        module = toy.build()
        for stage in (0, 1, 2):
            model = zero_ref.wrap(module, stage)
            model(toy.batch(0, 0)[0]).sum().backward()
            del model
            module(toy.batch(0, 0)[0]).sum().backward()  # bare again: no hook stayed behind
            assert module.head.weight.grad is not None

    assert refusals(again) == ["nothing was refused"] * 2


def test_moving_a_wrapped_model():
    expect(lambda: zero_ref.wrap(toy.build(), 1).to(torch.float64),
           "RuntimeError: a wrapped model cannot be moved or cast", "before zero_ref.wrap")


# ---- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_of_the_bare_modules_parameters(stage, when):
    def step():
        module = toy.build()
        if when == "before":
            opt = torch.optim.Adam(module.parameters())
        model = zero_ref.wrap(module, stage)
        if when == "after":
            opt = torch.optim.Adam(module.parameters())
        model(toy.batch(0, 0)[0]).sum().backward()
        opt.step()

    expect(step, "RuntimeError: this Adam holds", "of the bare module",
           "build it from model.parameters()")


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Adafactor])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_that_is_not_elementwise(stage, optimizer):
    def step():
        model = zero_ref.wrap(toy.build(), stage)
        opt = optimizer(model.parameters())
        model(toy.batch(0, 0)[0]).sum().backward()
        opt.step(lambda: 0.0)

    expect(step, f"RuntimeError: {optimizer.__name__} is not known to update every element",
           f"stage {stage}", "use stage 0, or one of SGD, Adam")


def test_other_optimizers_are_not_touched():
    def step():
        model = zero_ref.wrap(toy.build(), 2)
        other = nn.Parameter(torch.ones(3))
        opt = torch.optim.LBFGS([other])
        opt.step(lambda: other.square().sum())
        return model

    assert refusals(step) == ["nothing was refused"] * 2


# ---- parameters that are not gathered ------------------------------------------------------------


@pytest.mark.parametrize("touch", [
    lambda model: model.module(toy.batch(0, 0)[0]),
    lambda model: model.module.blocks[1].weight.sum(),
    lambda model: model.module.blocks[1].weight.tolist(),
    lambda model: model.module.blocks[1].weight.data,
    lambda model: model.module.blocks[1].weight.detach(),
    lambda model: model.module.state_dict(),
    lambda model: model.module.blocks[1].weight.add_(1),
    lambda model: torch.save(model.module, "/dev/null"),
])
def test_reading_what_is_not_gathered(touch):
    expect(lambda: touch(zero_ref.wrap(toy.build(), 3)), "is not gathered",
           "with model.full_params():")


def test_what_is_not_gathered_can_be_looked_at():
    def look():
        module = toy.build()
        kept = module.blocks[1].weight
        model = zero_ref.wrap(module, 3)
        weight = module.blocks[1].weight
        assert repr(weight) == ("Placeholder for 'blocks.1.weight', shape (2,), not gathered")
        assert f"{weight}" == repr(weight)
        assert isinstance(weight, nn.Parameter) and weight.shape == (2,) and weight.numel() == 2
        assert weight.dtype == torch.float32 and weight.device == torch.device("cpu")
        assert weight.untyped_storage().nbytes() == 0
        assert module.head.weight is module.token.weight  # still tied
        assert kept.tolist() == []  # a reference from before is empty, and not dangling
        assert sum(p.numel() for p in module.parameters()) == sum(
            p.numel() for p in toy.build().parameters())
        return model

    assert refusals(look) == ["nothing was refused"] * 2
