"""Exercises on what a plan costs before anything runs: bytes, time, and the number of ranks."""

import operator

import torch

from ..observe import memory
from . import simulated
from .exercise import Exercise, Mistake, Observed

# ---- the paper's table 1 -------------------------------------------------------------------------

# GB (1e9 bytes) of model states per rank as the paper (arXiv 1910.02054v3) prints them.
# {parameters: {ranks: stages 1, 2 and 3}}
TABLE_1 = {
    7_500_000_000: {
        1: "120 120 120", 4: "52.5 41.3 30", 16: "35.6 21.6 7.5", 64: "31.4 16.6 1.88",
        256: "30.4 15.4 0.47", 1024: "30.1 15.1 0.12"},
    128_000_000_000: {
        1: "2048 2048 2048", 4: "896 704 512", 16: "608 368 128", 64: "536 284 32",
        256: "518 263 8", 1024: "513 257 2"},
    1_000_000_000_000: {
        1: "16000 16000 16000", 4: "7000 5500 4000", 16: "4750 2875 1000", 64: "4187 2218 250",
        256: "4046 2054 62.5", 1024: "4011 2013 15.6"},
}


def is_printed_as(gigabytes: float, printed: str) -> bool:
    """The paper rounds one column and truncates the others, so that a number may be off by less
    than one unit of the last digit."""
    return abs(gigabytes - float(printed)) < 10.0 ** -len(printed.partition(".")[2])


def model_state_bytes(numel, world_size, stage, K):
    """Bytes of model states on one rank, as the paper computes them: 2 for each parameter, 2 for
    its gradient and K for the optimizer. What is cut need not divide evenly."""
    params, grads, states = 2 * numel, 2 * numel, K * numel
    if stage >= 1:
        states /= world_size
    if stage >= 2:
        grads /= world_size
    if stage >= 3:
        params /= world_size
    return params + grads + states


def _observe_table(answer) -> Observed:
    found: Observed = {}
    for numel, by_ranks in TABLE_1.items():
        found[_of_model(numel)] = cells = {}
        for world_size, row in by_ranks.items():
            for stage, printed in zip((1, 2, 3), row.split()):
                nbytes = answer(numel, world_size, stage, 12)
                cells[f"world_size {world_size}, stage {stage}"] = (
                    printed if nbytes is not None and is_printed_as(nbytes / 1e9, printed)
                    else _rounded(nbytes, 1e9))
    found["bytes for 1,000 parameters on 3 ranks"] = {
        f"stage {stage}, K = {K}": _rounded(answer(1000, 3, stage, K))
        for K in (12, 8, 4) for stage in range(4)}
    return found


def _of_model(numel):
    return f"GB for {numel / 1e9:,g} billion parameters"


def _rounded(nbytes, unit=1):
    return "nothing" if nbytes is None else f"{round(float(nbytes) / unit, 3):g}"


def _always_adam(numel, world_size, stage, K):
    return model_state_bytes(numel, world_size, stage, 12)


def _whole_numbers(numel, world_size, stage, K):
    params, grads, states = 2 * numel, 2 * numel, K * numel
    if stage >= 1:
        states //= world_size
    if stage >= 2:
        grads //= world_size
    if stage >= 3:
        params //= world_size
    return params + grads + states


def _rounded_up(numel, world_size, stage, K):
    return sum(memory.model_states(numel, world_size, stage, param_dtype=torch.float16,
                                   grad_dtype=torch.float16,
                                   optimizer_dtypes=[torch.float32] * (K // 4)).values())


def _master_on_top(numel, world_size, stage, K):
    return model_state_bytes(numel, world_size, stage, K + 4)


def _k_is_all(numel, world_size, stage, K):
    return model_state_bytes(numel, world_size, stage, K - 4)


def _everything_is_cut(numel, world_size, stage, K):
    return (4 + K) * numel / (world_size if stage else 1)


def _in_gigabytes(numel, world_size, stage, K):
    return model_state_bytes(numel, world_size, stage, K) / 1e9


# ---- what is sent when ---------------------------------------------------------------------------


def schedule(units):
    """One unit ahead, issued before the unit in front of it computes. Backward begins with the
    unit that forward has ended with, which stays."""
    yield "gather", 0
    for unit in range(units):
        if unit < units - 1:
            yield "gather", unit + 1
        yield "forward", unit
        if unit < units - 1:
            yield "free", unit
    for unit in reversed(range(units)):
        if unit > 0:
            yield "gather", unit - 1
        yield "backward", unit
        yield "free", unit
        yield "reduce", unit


def _observe_schedule(answer) -> Observed:
    with_3, with_9 = _what_comes_of(answer(3)), _what_comes_of(answer(9))
    return {**_what_comes_of(answer(6)), "with 3 units": with_3, "with 9 units": with_9}


def _what_comes_of(schedule):
    step = simulated.run(schedule)
    return {"what is computed": ", ".join(step.computed) or "nothing",
            "gradients that are not reduced": len(step.not_reduced),
            "most units in full at one time": step.most,
            "units left in full at the end": step.left,
            **{f"the last {what} ends after, in f": step.ends.get(what)
               for what in ("forward", "backward", "reduce")}}


def package(units, ahead=1):
    """What the package does with `prefetch` units ahead: all are freed after their forward."""
    for what, order in ("forward", range(units)), ("backward", range(units)[::-1]):
        for unit in order[:ahead]:
            yield "gather", unit
        for place, unit in enumerate(order):
            for following in order[place + ahead :][:1]:
                yield "gather", following
            yield what, unit
            yield "free", unit
            if what == "backward":
                yield "reduce", unit


def _nothing_ahead(units):
    return package(units, ahead=0)


def _two_ahead(units):
    return package(units, ahead=2)


def _all_first(units):
    for unit in range(units):
        yield "gather", unit
    for unit in range(units):
        yield "forward", unit
    for unit in reversed(range(units)):
        yield "backward", unit
        yield "reduce", unit
        yield "free", unit


def _forward(units):
    """As it should be: the last unit stays."""
    return list(schedule(units))[: 3 * units - 1]


def _behind_its_forward(units):
    yield "gather", 0
    for unit in range(units):
        yield "forward", unit
        if unit < units - 1:
            yield "gather", unit + 1
            yield "free", unit
    yield from list(schedule(units))[3 * units - 1 :]


def _all_stay(units):
    yield from [(what, unit) for what, unit in _forward(units) if what != "free"]
    for unit in reversed(range(units)):
        yield "backward", unit
        yield "free", unit
        yield "reduce", unit


def _behind_the_reduction(units):
    yield from _forward(units)
    for unit in reversed(range(units)):
        yield "backward", unit
        yield "free", unit
        yield "reduce", unit
        if unit > 0:
            yield "gather", unit - 1


def _behind_its_backward(units):
    yield from _forward(units)
    for unit in reversed(range(units)):
        yield "backward", unit
        yield "free", unit
        if unit > 0:
            yield "gather", unit - 1
        yield "reduce", unit


def _gathers_from_the_first(units):
    yield from _forward(units)
    for unit in reversed(range(units)):
        if unit > 0:
            yield "gather", units - 1 - unit
        yield "backward", unit
        yield "free", unit
        yield "reduce", unit


def _reduces_at_the_end(units):
    yield from [(what, unit) for what, unit in schedule(units) if what != "reduce"]
    for unit in reversed(range(units)):
        yield "reduce", unit


def _returns_nothing(units):
    list(schedule(units))


# ---- which stage, on how many ranks --------------------------------------------------------------

# What a model is, and what it is to run on: arguments of `choose`.
PLANS = {
    "a small model": (124_000_000, 39_000_000, 6_016_000_000, 8_000_000_000, 8),
    "1.5 billion parameters": (1_500_000_000, 80_000_000, 18_000_000_000, 40_000_000_000, 8),
    "7 billion": (7_000_000_000, 200_000_000, 10_000_000_000, 80_000_000_000, 64),
    "7 billion, 2 of them in one unit": (
        7_000_000_000, 2_000_000_000, 15_900_000_000, 80_000_000_000, 64),
    "1 billion, most of them in one unit": (
        1_000_000_000, 600_000_000, 3_800_000_000, 16_000_000_000, 16),
    "13 billion on at most 4 GPUs": (
        13_000_000_000, 320_000_000, 25_440_000_000, 80_000_000_000, 4),
    "70 billion on at most 8 GPUs": (
        70_000_000_000, 860_000_000, 10_000_000_000, 80_000_000_000, 8),
    "more activations than memory": (
        1_000_000_000, 50_000_000, 30_000_000_000, 24_000_000_000, 1024),
}


def _needed(numel, unit, world_size, stage):
    """Bytes on one rank, activations aside."""
    in_flight = {2: 4, 3: 8}.get(stage, 0) * unit  # gradients of a unit in full, and parameters
    return sum(memory.model_states(numel, world_size, stage).values()) + in_flight


def choose(numel, unit, activations, gpu_bytes, gpus):
    """The fewest ranks on which the model fits, and of the stages that fit there the lowest."""
    for world_size in range(1, gpus + 1):
        for stage in range(4):
            held = sum(memory.model_states(numel, world_size, stage).values()) + activations
            if stage >= 2:
                held += 4 * unit  # its gradients in full
            if stage == 3:
                held += 4 * unit  # its parameters in full
            if held <= gpu_bytes:
                return stage, world_size
    return None


def _observe_plans(answer) -> Observed:
    return {what: _described(answer(*plan), *plan) for what, plan in PLANS.items()}


def _described(chosen, numel, unit, activations, gpu_bytes, gpus):
    """With what a rank would hold, whatever the answer thinks of it."""
    try:
        stage, world_size = map(operator.index, chosen)
        held = _needed(numel, unit, world_size, stage) + activations
    except (TypeError, ValueError):
        return repr(chosen)
    return (f"stage {stage}, {world_size} {'rank' if world_size == 1 else 'ranks'} with "
            f"{held / 1e9:.1f} of {gpu_bytes / 1e9:.0f} GB")


def _lowest_stage_first(numel, unit, activations, gpu_bytes, gpus):
    for stage in range(4):
        for world_size in range(1, gpus + 1):
            if _needed(numel, unit, world_size, stage) + activations <= gpu_bytes:
                return stage, world_size
    return None


def _always_stage_3(numel, unit, activations, gpu_bytes, gpus):
    for world_size in range(1, gpus + 1):
        if _needed(numel, unit, world_size, 3) + activations <= gpu_bytes:
            return 3, world_size
    return None


def _stage_3_says_how_many(numel, unit, activations, gpu_bytes, gpus):
    most = _always_stage_3(numel, unit, activations, gpu_bytes, gpus)
    for stage in range(4):
        if most and _needed(numel, unit, most[1], stage) + activations <= gpu_bytes:
            return stage, most[1]
    return None


def _all_gpus(numel, unit, activations, gpu_bytes, gpus):
    for stage in range(4):
        if _needed(numel, unit, gpus, stage) + activations <= gpu_bytes:
            return stage, gpus
    return None


def _states_alone(numel, unit, activations, gpu_bytes, gpus):
    return choose(numel, unit, 0, gpu_bytes, gpus)


def _activations_are_cut(numel, unit, activations, gpu_bytes, gpus):
    for world_size in range(1, gpus + 1):
        for stage in range(4):
            held = _needed(numel, unit, world_size, stage) + activations / world_size
            if held <= gpu_bytes:
                return stage, world_size
    return None


def _nothing_in_flight(numel, unit, activations, gpu_bytes, gpus):
    return choose(numel, 0, activations, gpu_bytes, gpus)


def _one_gpu_less(numel, unit, activations, gpu_bytes, gpus):
    return choose(numel, unit, activations, gpu_bytes, gpus - 1)


def _not_quite_full(numel, unit, activations, gpu_bytes, gpus):
    return choose(numel, unit, activations, gpu_bytes - 1, gpus)


def _always_something(numel, unit, activations, gpu_bytes, gpus):
    return choose(numel, unit, activations, gpu_bytes, gpus) or (3, gpus)


def _the_other_way_round(numel, unit, activations, gpu_bytes, gpus):
    chosen = choose(numel, unit, activations, gpu_bytes, gpus)
    return chosen and chosen[::-1]


# ---- the exercises -------------------------------------------------------------------------------

_ALL = ("At the end of forward all units are there at once, as at stage 2. How many does it take "
        "for one to compute and one to be on its way?")
_SIZES = "That is right for 6 units. What in your schedule depends on their number?"
_DRAW = "Print simulated.run(schedule(4)), and look for gaps in the lane that computes."

ON_PLANNING = {
    "0.2": Exercise(
        "a function (numel, world_size, stage, K) → bytes", _observe_table, model_state_bytes, [
            Mistake(_always_adam, "The table is right, but another optimizer keeps as much as Adam "
                    "here: K is not used."),
            Mistake(_whole_numbers, "The table is right, but // rounds each part down. The paper "
                    "divides where nothing divides evenly, too."),
            Mistake(_rounded_up, "The table is right, but you round slices up, as the package "
                    "does where it pads them. The paper just divides."),
            Mistake(_master_on_top, "K is all that the optimizer keeps: the master copy is one of "
                    "its numbers already."),
            Mistake(_k_is_all, "K does not include the 16-bit parameters or gradients."),
            Mistake(_everything_is_cut, "Every stage cuts everything here. Which of the three "
                    "kinds does stage 1 leave whole?"),
            Mistake(_in_gigabytes, "Right, but in gigabytes. The answer has to be in bytes."),
        ],
        {**dict.fromkeys(map(_of_model, TABLE_1), "Stage 1 cuts the optimizer states. What does "
                         "each of the next two stages cut as well?"),
         "bytes for 1,000 parameters on 3 ranks": "The table is right. Now look at how your "
         "answer depends on K, and at what it rounds."}, (1,)),
    "8.1": Exercise(
        'a function units → a list of pairs such as ("gather", 0)',
        _observe_schedule, schedule, [
            Mistake(_nothing_ahead, "The rank waits for each gather. Issued earlier, it would be "
                    "on its way while another unit computes."),
            Mistake(_all_first, _ALL),
            Mistake(_two_ahead, "A third unit is in memory, and nothing comes of it: the network "
                    "has as much to send as before."),
            Mistake(package, "One gather too many is not hidden: the last unit's, when backward "
                    "begins. Where was this unit just before?"),
            Mistake(_behind_its_forward, "In forward, a gather is issued when the unit before it "
                    "has computed. That is too late to hide."),
            Mistake(_all_stay, _ALL),
            Mistake(_behind_the_reduction, "In backward, each gather queues behind a reduction, "
                    "and the rank waits for both. Which of the two does it need sooner?"),
            Mistake(_behind_its_backward, "In backward, each gather is sent before a reduction "
                    "now, but it is issued when there is nothing left to compute until it "
                    "arrives."),
            Mistake(_gathers_from_the_first, "Backward comes to a unit that is not there. In which "
                    "order does it need them?", r"backward \d+: unit \d+ is not there"),
            Mistake(_reduces_at_the_end, "All reductions come when there is nothing left to "
                    "compute. Only the last one has to."),
            Mistake(_returns_nothing, "Return the list, or yield its pairs.",
                    "'NoneType' object is not iterable"),
        ],
        {"what is computed": "Forward goes from the first unit to the last, and then backward from "
         "the last to the first.",
         "gradients that are not reduced": "Every unit has to be reduced.",
         "most units in full at one time": "One unit computes, and one is on its way: gather no "
         "more than one ahead, and free each when it has computed.",
         "units left in full at the end": "Free each unit after its backward.",
         "the last forward ends after, in f": _DRAW, "the last backward ends after, in f": _DRAW,
         "the last reduce ends after, in f": "The last reduction can begin when the last backward "
         "ends.",
         "with 3 units": _SIZES, "with 9 units": _SIZES}, (1,)),
    "9.1": Exercise(
        "a function (numel, unit, activations, gpu_bytes, gpus) → (stage, world_size) or None",
        _observe_plans, choose, [
            Mistake(_always_stage_3, "Stage 3 sends more than the others. Where a lower stage fits "
                    "on as many ranks, take that."),
            Mistake(_lowest_stage_first, "A low stage on many ranks comes before a higher one on "
                    "few. Here the number of ranks is to be as low as possible first."),
            Mistake(_stage_3_says_how_many, "Stage 3 does not always need the fewest ranks: what "
                    "it has in flight may be more than what it saves."),
            Mistake(_all_gpus, "It need not be all GPUs that there are."),
            Mistake(_states_alone, "The activations need memory, too."),
            Mistake(_activations_are_cut, "No stage shards the activations: each rank has its own "
                    "samples, however many ranks there are."),
            Mistake(_nothing_in_flight, "At stages 2 and 3, one unit is there in full beside "
                    "the slices."),
            Mistake(_one_gpu_less, "You may use all GPUs that there are. What is the last number "
                    "of a range?"),
            Mistake(_not_quite_full, "What is just as large as the memory still fits."),
            Mistake(_always_something, "Nothing fits there, and that is the answer: None."),
            Mistake(_the_other_way_round, "The stage comes first, then the number of ranks."),
        ],
        {what: "Which ranks and stages fit? Of these the fewest ranks, and then the lowest stage."
         for what in PLANS}, (1,)),
}
