"""What a recorded step says of storages and events is what they are."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from toy import batch, build, ranks

import zero_ref
from zero_ref.observe.recorder import ABSENT, EMPTY, IN_FLIGHT, OWNED, TEMPORARY, record


def recorded(stage, step=1, bucket_cap_mb=0, **options):
    model = zero_ref.wrap(build(), stage, bucket_cap_mb=bucket_cap_mb, **options)
    optimizer = torch.optim.Adam(model.parameters())
    for i in range(step + 1):
        x, y = batch(i, model.rank)
        with zero_ref.trace() as t, record(model, optimizer) as recording:
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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recording_changes_no_bit(stage):
    with_it, without = ranks(recorded, 2, stage)[0][3], ranks(not_recorded, 2, stage)[0]
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
