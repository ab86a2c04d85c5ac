"""What a recorded step says of storages and events is what they are."""

import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from toy import batch, build, ranks

import zero_ref
from zero_ref import comm, course
from zero_ref.commands.measure import most_bytes
from zero_ref.observe.hooks import HookCall
from zero_ref.observe.recorder import ABSENT, EMPTY, IN_FLIGHT, OWNED, TEMPORARY, record
from zero_ref.observe.tensors import Tensors
from zero_ref.observe.trace import Trace, recording_into


def recorded(stage, step=1, bucket_cap_mb=0, all_tensors=False, **options):
    model = zero_ref.wrap(build(), stage, bucket_cap_mb=bucket_cap_mb, **options)
    optimizer = torch.optim.Adam(model.parameters())
    for i in range(step + 1):
        x, y = batch(i, model.rank)
        with zero_ref.trace() as t, record(
                model, optimizer, all_tensors=all_tensors) as recording:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return pickle.loads(pickle.dumps(recording)), t.events, zero_ref.memory.resident(
        model, optimizer), model.state_dict()


def not_recorded(stage):
    model = zero_ref.wrap(build(), stage)
    optimizer = torch.optim.Adam(model.parameters())
    for i in range(2):
        x, y = batch(i, model.rank)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("overlap, bucket_cap_mb", [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_letters_events_and_bytes_agree(stage, world_size, overlap, bucket_cap_mb):
    by_rank = ranks(recorded, world_size, stage, overlap=overlap, bucket_cap_mb=bucket_cap_mb)
    for rank, (recording, events, resident, _) in enumerate(by_rank):
        assert (recording.rank, recording.world_size, recording.stage) == (rank, world_size, stage)
        frames = recording.frames
        assert [(f.what, f.unit) for f in frames] == [
            (f.what, f.unit) for f in by_rank[0][0].frames]  # every rank sees the same step
        assert [(f.what, f.unit) for f in frames if f.wire_bytes or f.what == "broadcast"] == [
            (e.op, e.unit) for e in events if e.wire_bytes or e.op == "broadcast"]
        assert frames[-1].sent == sum(e.wire_bytes for e in events)
        assert frames[-1].bytes == resident
        units = {u.name: u for u in recording.units}
        for frame in frames:
            counted = {kind: 0 for kind in frame.bytes}
            for name, held in frame.held.items():
                unit = units[name]
                numel = unit.padded_numel // world_size  # of a slice
                size = numel * 4
                for kind in ("parameters", "gradients"):
                    counted[kind] += size * sum(letter != ABSENT for letter in held[kind])
                # Beside a full buffer that is there for a while, the own slice has its memory.
                if stage == 3 and ABSENT not in held["parameters"]:
                    counted["parameters"] += size
                if stage >= 2 and set(held["gradients"]) <= {TEMPORARY, IN_FLIGHT}:
                    counted["gradients"] += size
                owned = [len(range(max(start, s * numel), min(start + n, (s + 1) * numel)))
                         for s, letter in enumerate(held["optimizer"]) if letter == OWNED
                         for start, n in zip(unit.starts, unit.sizes)]
                counted["optimizer"] += 2 * 4 * sum(owned)
            assert frame.bytes == counted, (frame.what, frame.unit)


def test_what_each_stage_holds_at_rest():
    letters = {}
    for stage in range(4):
        recording = ranks(recorded, 3, stage)[1][0]
        letters[stage] = recording.frames[0].held["blocks.0"]
    assert letters == {
        0: {"parameters": OWNED * 3, "gradients": EMPTY * 3, "optimizer": OWNED * 3},
        1: {"parameters": "tot", "gradients": EMPTY * 3, "optimizer": " o "},
        2: {"parameters": "tot", "gradients": " e ", "optimizer": " o "},
        3: {"parameters": " o ", "gradients": " e ", "optimizer": " o "},
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_not_temporary_once_they_are_summed(stage):
    recording = ranks(recorded, 2, stage, overlap=False)[0][0]
    summed = set()
    for frame in recording.frames:
        assert not [u for u in summed if TEMPORARY in frame.held[u]["gradients"]], frame
        if frame.what in ("reduce_scatter", "all_reduce"):
            summed.add(frame.unit)
    assert summed == {unit.name for unit in recording.units if not unit.frozen}


@pytest.mark.parametrize("all_tensors", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recording_changes_no_bit(stage, all_tensors):
    with_it = ranks(recorded, 2, stage, all_tensors=all_tensors)[0][3]
    without = ranks(not_recorded, 2, stage)[0]
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_the_first_step_begins_without_gradients_and_optimizer_states():
    frame = ranks(recorded, 2, 1, step=0)[0][0].frames[0]
    assert frame.held["blocks.0"] == {"parameters": "ot", "gradients": "  ", "optimizer": "  "}
    assert frame.bytes["gradients"] == frame.bytes["optimizer"] == 0


def test_only_wrapped_models_are_recorded():
    with pytest.raises(ValueError, match="this is a Toy"):
        with record(build()):
            pass


def test_times_are_in_order_and_waits_lie_inside():
    for recording, *_ in ranks(recorded, 2, 3):
        times = [frame.time for frame in recording.frames]
        assert times == sorted(times) and recording.spans and recording.events
        for span in recording.spans:
            assert times[0] <= span.start <= span.end <= times[-1]
        for event in recording.events:
            assert times[0] <= event.start <= event.awaited <= event.end <= times[-1] or (
                event.start <= event.end < event.awaited)  # it was there before it was needed


# ---- all tensors ---------------------------------------------------------------------------------


def alone(stage):
    """On one rank nothing is sent. Returns the peak twice, as two instruments have it."""
    model = zero_ref.wrap(course.build(), stage, bucket_cap_mb=0)
    optimizer = torch.optim.Adam(model.parameters())

    def step(number):
        x, y = batches[number]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = [course.batch(number, 0) for number in range(4)]
    step(0)
    step(1)
    at_rest = sum(zero_ref.memory.resident(model, optimizer).values())
    with record(model, optimizer, all_tensors=True) as recording:
        step(2)
    return (max(frame.total for frame in recording.frames),
            at_rest + most_bytes(torch.device("cpu"), lambda: step(3)))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_peak_of_all_tensors_is_what_compare_measures(stage):
    peak, by_compare = ranks(alone, 1, stage)[0]
    assert peak == by_compare


class Wasteful(torch.nn.Module):
    """Needs `nbytes` for a moment of its forward."""

    def __init__(self, inside, nbytes):
        super().__init__()
        self.inside, self.nbytes = inside, nbytes

    def forward(self, x):
        torch.empty(self.nbytes, dtype=torch.uint8)
        return self.inside(x)


def with_waste(nbytes):
    net = course.build()
    net[3] = Wasteful(net[3], nbytes)
    model = zero_ref.wrap(net, 3, bucket_cap_mb=0)
    x, y = course.batch(0, model.rank)
    for _ in range(2):
        with record(model, all_tensors=True) as recording:
            F.cross_entropy(model(x), y).backward()
        model.zero_grad()
    return [(frame.what, frame.unit, frame.total, sum(frame.bytes.values()))
            for frame in recording.frames]


def test_a_tensor_that_lives_for_a_moment_is_seen_at_that_moment():
    none, some = ranks(with_waste, 2, 0)[0], ranks(with_waste, 2, 1_000_000)[0]
    assert [f[:2] for f in none] == [f[:2] for f in some]
    after = none.index(next(f for f in none if f[:2] == ("forward", "3"))) + 1
    for i, (before, now) in enumerate(zip(none, some)):
        gained = now[2] - before[2]
        assert 990_000 < gained <= 1_000_000 if i == after else gained == 0, (i, now)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_tensors_are_at_least_the_model_states_from_frame_to_frame(stage):
    for recording, *_ in ranks(recorded, 2, stage, all_tensors=True):
        held = [sum(frame.bytes.values()) for frame in recording.frames]
        totals = [frame.total for frame in recording.frames]
        assert totals[0] == held[0]
        assert all(total >= max(a, b) for total, a, b in zip(totals[1:], held, held[1:]))
        assert max(totals) > max(held)  # activations, at least
    assert all(frame.total is None for frame in ranks(recorded, 2, stage)[0][0].frames)


def messages(numel):
    group = dist.group.WORLD
    trace = Trace()
    flat, out = torch.ones(3 * numel), torch.empty(numel)
    tensors = Tensors(trace, torch.device("cpu"))
    with recording_into(trace), tensors.counting():
        tensors.mark()
        handle = comm.reduce_scatter(out, flat, group, unit="1", phase="backward")
        tensors.mark()
        handle.wait()
        tensors.mark()
        handle = comm.all_gather(flat, out, group, unit="1", phase="forward")
        tensors.mark()
        handle.wait()
        tensors.mark()
        tensors.mark()
    return tensors.most


def test_landing_buffers_are_seen_though_another_thread_allocates_them():
    """In a reduce_scatter, everyone's part of this rank's slice. An all_gather lands in place."""
    for most in ranks(messages, 3, 1000):
        assert most == [0, 0, 2 * 1000 * 4, 0, 0, 0]


def test_what_is_recorded_of_all_tensors_is_the_same_each_time():
    first, second = ([[f.total for f in recording.frames] for recording, *_ in
                      ranks(recorded, 2, 3, all_tensors=True)] for _ in range(2))
    assert first == second


# ---- hooks ---------------------------------------------------------------------------------------


def calls_of(stage, overlap):
    model = zero_ref.wrap(course.build(), stage, overlap=overlap, bucket_cap_mb=0)
    optimizer = torch.optim.Adam(model.parameters())
    for i in range(2):
        x, y = course.batch(i, model.rank)
        with record(model, optimizer) as recording, record(model, optimizer) as inner:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert recording.calls == inner.calls
    assert not [name for name in vars(model) if name.startswith(("_pre_", "_post_", "_on_"))]
    F.cross_entropy(model(x), y).backward()
    assert recording.calls == inner.calls  # nothing is noted any more
    return recording.calls


def test_hooks_of_stage_3_are_noted_in_the_order_of_their_calls():
    forward, backward = [], []
    for unit in "123456":
        forward += [HookCall("_pre_forward", unit, [("all_gather", unit), ("unshards", unit)]),
                    HookCall("_post_forward", unit, [("reshards", unit)])]
    for unit in "654321":
        begins = [("begins", "")] if unit == "6" else []
        backward.append(HookCall("_pre_backward", unit, [
            *begins, ("all_gather", unit), ("unshards", unit)]))
        if unit == "6":  # it has begun
            backward.append(HookCall("_begin_backward", ""))
        backward += [HookCall("_on_grad", unit, [("collects", unit)]), HookCall("_on_grad", unit)]
        if unit != "1":  # whose input needs no gradient
            backward.append(HookCall("_post_backward", unit, [
                ("reshards", unit), ("reduce_scatter", unit), ("delivers", unit)]))
    backward.append(HookCall("_finish_backward", "", [
        ("reduce_scatter", "1"), ("delivers", "1"), ("ends", ""), ("reshards", "1")]))
    expected = [*forward, *backward, HookCall("_after_step", "1+2+3+4+5+6")]
    assert ranks(calls_of, 2, 3, False) == [expected, expected]


def test_with_overlap_the_next_unit_is_gathered_before_this_one_runs():
    calls = ranks(calls_of, 2, 3, True)[0]
    assert calls[0] == HookCall("_pre_forward", "1", [
        ("all_gather", "1"), ("unshards", "1"), ("all_gather", "2")])
    (left,) = [call for call in calls if (call.hook, call.unit) == ("_post_backward", "5")]
    assert left.did == [("reshards", "5"), ("delivers", "6"), ("reduce_scatter", "5")]


def test_stage_1_sends_parameters_after_the_step():
    calls = ranks(calls_of, 2, 1, False)[0]
    assert {call.hook for call in calls} == {
        "_pre_forward", "_begin_backward", "_on_grad", "_finish_backward", "_after_step"}
    assert calls[-1].did == [("all_gather", unit) for unit in "123456"]
