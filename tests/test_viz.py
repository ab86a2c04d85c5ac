"""The pictures show what was recorded: pixels and widgets, without a browser."""

import base64
import colorsys
import copy
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex
from PIL import Image

import zero_ref
from zero_ref import course, memory, viz
from zero_ref.observe.recorder import (
    ABSENT,
    EMPTY,
    IN_FLIGHT,
    OWNED,
    TEMPORARY,
    Frame,
    Layout,
    Recording,
    Span,
    layout,
    record,
)
from zero_ref.observe.trace import Event
from zero_ref.viz import cheatsheet, figures
from zero_ref.viz.collectives import simulate
from zero_ref.viz.palette import KINDS, PAPER, bytes_text, tint
from zero_ref.viz.picture import Picture
from zero_ref.viz.steps import StepDrawing, fitting


def step(stage, overlap, build=course.build, all_tensors=True):
    model = zero_ref.wrap(build(), stage, overlap=overlap, bucket_cap_mb=0)
    optimizer = torch.optim.Adam(model.parameters())
    for i in range(2):
        x, y = course.batch(i, model.rank)
        with record(model, optimizer, all_tensors=all_tensors) as recording:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return recording


@pytest.fixture(scope="module")
def recordings():
    """{(stage, world_size): one per rank}."""
    return {(stage, n): zero_ref.launch(step, n, stage, stage == 3)
            for stage in range(4) for n in (2, 4)}


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_cell_of_every_frame_has_its_colour(recordings, stage):
    by_rank = recordings[stage, 4]
    drawing = StepDrawing([by_rank], recordings[0, 4])
    ax = drawing.grids[0][0].axes
    seen = set()
    for i in range(len(drawing.moments)):
        image = pixels(drawing.png(i))
        for (unit, rank, kind, s), square in drawing.corners.items():
            letter = by_rank[rank].frames[i].held[unit][kind][s]
            seen.add(letter)
            expected = {OWNED: KINDS[kind], TEMPORARY: tint(KINDS[kind]), EMPTY: "#FFFFFF",
                        ABSENT: PAPER}
            x, y = ax.transData.transform(np.mean(square, axis=0))
            colour = image[image.shape[0] - 1 - int(y), int(x)]
            if letter != IN_FLIGHT:  # hatched
                assert abs(colour - rgb(expected[letter])).max() <= 4, (i, unit, rank, kind, s)
    assert seen >= {OWNED, IN_FLIGHT, TEMPORARY}


def test_moving_the_slider_shows_that_event(recordings):
    by_rank = recordings[3, 2]
    widget = viz.stepper(by_rank, recordings[0, 2], start=2)
    (controls, stack), drawing = widget.children, StepDrawing([by_rank], recordings[0, 2])
    play, slider = controls.children
    assert slider.value == stack.selected_index == 2
    assert play.max == slider.max == len(stack.children) - 1 == len(by_rank[0].frames) - 1
    for event, image in enumerate(stack.children):  # which the browser shows for that event
        assert image.value == drawing.png(event)
    assert len({image.value for image in stack.children}) == len(stack.children)


def test_a_widget_carries_a_still_picture_and_words(recordings):
    widget = viz.stepper(recordings[3, 2], start=4)
    data, metadata = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    still = widget.children[1].children[4].value
    assert base64.b64decode(data["image/png"]) == still
    assert data["text/plain"].startswith("Stage 3 on 2 ranks, event by event: start, all_gather 1")
    assert metadata["image/png"]["alt"] == data["text/plain"]


def test_stages_side_by_side_stop_at_what_all_compute(recordings):
    widget = viz.side_by_side(*[recordings[stage, 4] for stage in range(4)])
    names = [f"{what} {unit}".strip() for what, unit in
             StepDrawing([recordings[s, 4] for s in range(4)]).moments]
    assert names == ["start", *(f"forward {unit}" for unit in range(1, 7)),
                     *(f"backward {unit}" for unit in range(6, 0, -1)), "step", "end"]
    assert widget.children[1].selected_index == names.index("backward 6")


def test_eight_ranks():
    by_rank = zero_ref.launch(step, 8, 3, True)
    drawing = StepDrawing([by_rank])
    moments = range(0, len(drawing.moments), 6)
    assert len({drawing.png(i) for i in moments}) == len(moments)


def test_the_figures_are_drawn_anew(tmp_path):
    written = figures.draw(tmp_path)
    assert {path.name for path in written} == {"stepper.png", "memory_over_step.png",
                                               "timeline.png"}
    committed = Path(__file__).parent.parent / "figures"
    for path in written:
        new, old = (pixels((folder / path.name).read_bytes()) for folder in (tmp_path, committed))
        assert new.shape == old.shape
        if path.name != "timeline.png":  # no times in the others
            assert (new == old).all(), f"{path.name} is not what make figures draws"


def uneven():
    torch.manual_seed(0)
    linear = torch.nn.Linear
    return torch.nn.Sequential(torch.nn.Flatten(), linear(64, 40), linear(40, 40), linear(40, 2),
                               torch.nn.Tanh(), linear(2, 10))


def test_units_are_as_wide_as_they_are_large_and_tiny_ones_can_be_seen():
    by_rank = zero_ref.launch(step, 4, 3, True, uneven)
    drawing = StepDrawing([by_rank])
    sizes = {unit.name: unit.padded_numel for unit in by_rank[0].units}

    def span(unit):
        left, right = (drawing.corners[unit, 0, "parameters", s][corner][0]
                       for s, corner in ((0, 0), (3, 1)))
        return left, right

    width = {unit: right - left for unit, (left, right) in ((u, span(u)) for u in sizes)}
    assert width["1"] / width["2"] == pytest.approx(sizes["1"] / sizes["2"], rel=0.02)
    assert all(wide >= 22 for wide in width.values()), width
    spans = [span(unit) for unit in sizes]
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(spans))
    labels = drawing.grids[0][0].axes.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_equal_units_are_equally_wide_also_side_by_side(recordings):
    drawing = StepDrawing([recordings[stage, 4] for stage in range(4)])
    cells = {round(c[1][0] - c[0][0], 6) for c in drawing.corners.values()}
    assert len(cells) == 1 and cells.pop() > 4
    drawing.png(3)
    axes = [grid[0].axes for grid in drawing.grids]
    for ax in axes:  # or else some would be drawn with a pixel more
        edges = [ax.transData.transform(corner)[0] for square in drawing.corners.values()
                 for corner in square]
        assert np.abs(np.array(edges) - np.round(edges)).max() < 1e-6
    texts = [text for ax in axes for text in (*ax.get_xticklabels(), *ax.texts)]
    for ax, following in itertools.pairwise(axes):
        assert ax.texts[0].get_window_extent().x1 < following.get_window_extent().x0
    for box in (text.get_window_extent() for text in texts):
        assert 0 <= box.x0 and box.x1 <= drawing.width
    for ax in axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def blocks(stage):
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"transformer": torch.nn.ModuleList(
        torch.nn.Linear(64, 64) for _ in range(9))})
    net.forward = lambda x: torch.nn.Sequential(*net["transformer"])(x.flatten(1))
    model = zero_ref.wrap(net, stage, bucket_cap_mb=0)
    for i in range(2):
        with record(model) as recording:
            model(course.batch(i, model.rank)[0]).sum().backward()
    return recording


def test_titles_and_names_of_units_fit():
    by_rank = zero_ref.launch(blocks, 2, 2)
    drawing = StepDrawing([by_rank])
    ax = drawing.grids[0][0].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(i) for i in range(9)]
    for i in range(len(drawing.moments)):
        drawing.png(i)
        assert drawing.title.get_window_extent().x1 <= drawing.width
    names, size = fitting(["encoder.attention.self", "decoder.attention.cross"], 60)
    assert all(len(name) * size * 0.72 <= 62 for name in names)


def test_a_step_that_failed_can_be_drawn(recordings, tmp_path):
    failed = copy.deepcopy(recordings[3, 2])
    for recording in failed:
        recording.events[-1].end = recording.events[-1].awaited = None
    assert pixels(viz.timeline(failed).png()).std() > 10
    viz.chrome_trace(failed, tmp_path / "trace.json")


def test_recordings_that_do_not_fit_are_refused(recordings):
    with pytest.raises(ValueError, match="differently partitioned"):
        viz.stepper(recordings[3, 2], zero_ref.launch(blocks, 2, 0))
    with pytest.raises(ValueError, match=r"1 rank\(s\): the stepper draws 2 to 8"):
        viz.stepper(recordings[0, 2][:1])
    with pytest.raises(ValueError, match="went through different events, from number 1 on"):
        viz.stepper([recordings[0, 2][0], recordings[3, 2][1]])
    with pytest.raises(ValueError, match="differently partitioned"):
        viz.side_by_side(recordings[0, 2], recordings[1, 4])
    with pytest.raises(ValueError, match="0 recordings to draw: give at least one"):
        viz.memory_over_step()
    with pytest.raises(ValueError, match="no units to draw"):
        viz.partition_map([])


def test_the_partition_map_says_who_owns_what():
    picture = viz.partition_map(
        zero_ref.launch(lambda: layout(zero_ref.wrap(course.build(), 1)), 3)[0])
    assert picture.text.splitlines() == [
        f"unit {unit}: {unit}.1.weight 256 | {unit}.1.bias 16 | padding 4; 3 slices of 92"
        for unit in range(1, 7)]
    assert pixels(picture.png()).std() > 10


def test_labels_are_above_the_borders_of_slices():
    layouts = zero_ref.launch(lambda: layout(zero_ref.wrap(course.build(), 1)), 4)[0]
    (ax, *_) = viz.partition_map(layouts).figure.axes
    assert min(text.zorder for text in ax.texts) > max(line.zorder for line in ax.lines)
    assert all(text.get_bbox_patch() for text in ax.texts)


def test_memory_over_a_step_marks_rest_and_peak(recordings):
    of_rank_0 = [recordings[stage, 4][0] for stage in range(4)]
    sizes = [unit.sizes for unit in of_rank_0[0].units]
    formula = {s: sum(memory.model_states(sizes, 4, s).values()) for s in range(4)}
    picture = viz.memory_over_step(*of_rank_0, formula=formula)
    for stage, line in enumerate(picture.text.splitlines()):
        frames = of_rank_0[stage].frames
        peak = max(sum(frame.bytes.values()) for frame in frames)
        total = max(frame.total for frame in frames)
        assert line.startswith(f"stage {stage}: {bytes_text(formula[stage])} at rest, "
                               f"{bytes_text(peak)} of model states at the peak")
        assert f"{bytes_text(total)} of all tensors at theirs (between " in line
    assert pixels(picture.png()).std() > 10


def test_recordings_of_one_stage_are_told_apart(recordings):
    def names(*given):
        picture = viz.memory_over_step(*given)
        *panels, together = picture.figure.axes
        found = [line.split(":")[0] for line in picture.text.splitlines()]
        assert [ax.get_title(loc="left").splitlines()[0] for ax in panels] == found
        assert [text.get_text() for text in together.get_legend().texts] == found
        return found

    first, second = recordings[3, 4][:2]
    assert names(first, first) == ["stage 3 (1)", "stage 3 (2)"]
    assert names(first, second) == ["stage 3, rank 0", "stage 3, rank 1"]
    assert names(recordings[0, 4][0], first) == ["stage 0", "stage 3"]


def test_all_tensors_are_drawn_where_they_were_recorded_and_only_then(recordings):
    recording = recordings[3, 4][0]
    ax = viz.memory_over_step(recording).figure.axes[0]
    (line,) = [line for line in ax.lines if line.get_label() == "all tensors"]
    drawn = [round(y * 1e3) for y in line.get_ydata()]
    assert drawn[:-1] == [frame.total for frame in recording.frames[1:]]
    assert line.get_drawstyle() == "steps-post"  # from a frame to the next
    without = copy.deepcopy(recording)
    for frame in without.frames:
        frame.total = None
    picture = viz.memory_over_step(without)
    assert "all tensors" not in picture.text
    assert not [line for line in picture.figure.axes[0].lines if line.get_label() == "all tensors"]


def test_the_timeline_and_its_trace_file(recordings, tmp_path):
    by_rank = recordings[3, 2]
    picture = viz.timeline(by_rank)
    assert "stage 3 on 2 ranks, overlapped" in picture.text
    assert pixels(picture.png()).std() > 10
    viz.chrome_trace(by_rank, tmp_path / "trace.json")
    entries = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sent = [e["args"]["wire_bytes"] for e in entries if e["pid"] == 0 and "op" in e.get("args", {})]
    assert sum(sent) == by_rank[0].frames[-1].sent
    lanes = {}
    for e in entries:
        if "op" in e.get("args", {}):
            lanes.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    assert any(len(bars) > 1 for bars in lanes.values())
    for bars in lanes.values():
        assert all(end <= start + 1e-3 for (_, end), (start, _) in itertools.pairwise(sorted(bars)))
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in entries if e["ph"] == "X")


def bars(picture):
    """{(rank, lane, colour): [(start, end)] in milliseconds}."""
    ax, lanes, rank, found = picture.figure.axes[0], {}, "", {}
    for y, label in zip(ax.get_yticks(), ax.get_yticklabels()):
        *ranks, lane = label.get_text().split("  ")
        rank = ranks[0] if ranks else rank
        lanes[y] = rank, lane
    for collection in ax.collections:
        faces = collection.get_facecolor()
        for path in collection.get_paths():
            (left, bottom), (right, top) = path.get_extents().get_points()
            y = min(lanes, key=lambda lane: abs(lane - (bottom + top) / 2))
            colour = to_hex(faces[0]).upper() if len(faces) else "none"
            if right - left > 1e-6:
                found.setdefault((*lanes[y], colour), []).append((round(left, 3), round(right, 3)))
    return found


def test_the_timeline_tells_waiting_for_another_rank_from_sending():
    """Rank 1 issues an all_gather 4 ms after rank 0. Each needs the result 1 ms after it did."""
    unit = Layout("6", ["6.weight"], [(4,)], [0], 4, 4, 2, False)
    frame = Frame("start", "", "", 100.0, {}, {}, 0)
    by_rank = []
    for rank, start in enumerate([100.002, 100.006]):
        event = Event(rank, "all_gather", "6", "forward", 4, torch.float32, 16, 8, start,
                      awaited=start + 0.001, end=100.009)
        by_rank.append(Recording(rank, 2, 3, True, [unit], [frame], [event],
                                 [Span("backward", "6", 100.01, 100.02)]))
    picture = viz.timeline(by_rank)
    late, sends = viz.palette.LATE, viz.palette.COMMUNICATION
    assert {key: value for key, value in bars(picture).items() if key[2] in (late, sends)} == {
        ("rank 0", "all_gather", late): [(2, 6)], ("rank 0", "all_gather", sends): [(6, 9)],
        ("rank 0", "computes", late): [(3, 6)], ("rank 0", "computes", sends): [(6, 9)],
        ("rank 1", "all_gather", sends): [(6, 9)], ("rank 1", "computes", sends): [(7, 9)]}
    assert [text.get_text() for text in picture.figure.axes[0].texts] == ["6"] * 4


def test_names_stand_only_on_bars_that_are_wide_enough(recordings):
    picture = viz.timeline(recordings[3, 2])
    ax = picture.figure.axes[0]
    picture.png()
    assert ax.texts
    for text in ax.texts:
        box = text.get_window_extent()
        x, y = ax.transData.inverted().transform([(box.x0, box.y0), (box.x1, box.y1)]).T
        assert any(p.get_extents().x0 <= x[0] and x[1] <= p.get_extents().x1
                   and p.get_extents().y0 <= min(y) and max(y) <= p.get_extents().y1
                   for collection in ax.collections for p in collection.get_paths())


def test_a_collective_ends_as_it_should_and_sends_what_it_should():
    ranks = range(4)
    ends = {
        "broadcast": {(rank, s): {0} for rank in ranks for s in ranks},
        "all_gather": {(rank, s): {s} for rank in ranks for s in ranks},
        "all_reduce": {(rank, s): {0, 1, 2, 3} for rank in ranks for s in ranks},
        "reduce_scatter": {(rank, rank): {0, 1, 2, 3} for rank in ranks},
    }
    sends = {"broadcast": [12, 0, 0, 0], "all_gather": [3] * 4, "reduce_scatter": [3] * 4,
             "all_reduce": [6] * 4}
    for op, expected in ends.items():
        moments = simulate(op)
        held = moments[-1][0]
        assert {place: set(held[place]) for place in expected} == expected
        assert all(len(values) == len(set(values)) for values in held.values())  # nothing twice
        sent = [sum(len(slices) for _, messages in moments for sender, _, slices in messages
                    if sender == rank) for rank in ranks]
        assert sent == sends[op]
        assert f"send: {', '.join(map(str, sent))}." in viz.collective(op).text
    with pytest.raises(ValueError, match="op='gather': must be broadcast"):
        viz.collective("gather")


@pytest.mark.parametrize("op", ["broadcast", "reduce_scatter", "all_gather", "all_reduce"])
def test_the_picture_of_a_collective_has_every_slice_and_every_message(op):
    picture, moments = viz.collective(op), simulate(op)
    assert pixels(picture.png()).std() > 10
    for ax, (held, messages) in zip(picture.figure.axes, moments, strict=True):
        written = {(round(text.get_position()[1]), int(text.get_position()[0])): text.get_text()
                   for text in ax.texts if not hasattr(text, "arrow_patch")}
        assert written == {place: "+".join(map(str, values)) for place, values in held.items()}
        assert sum(hasattr(text, "arrow_patch") for text in ax.texts) == len(messages)
        for text in ax.texts:
            assert text.get_window_extent().width <= ax.get_window_extent().width / 4 * 1.05


def test_the_picture_of_hooks_shows_the_first_and_the_last_unit(recordings):
    recording = zero_ref.launch(step, 2, 3, False)[0]
    picture = viz.hooks(recording)
    assert picture.text == """\
model(x)
  _pre_forward: all_gather 1, unshards 1
  _post_forward: reshards 1
⋮ units 2, 3, 4, 5
  _pre_forward: all_gather 6, unshards 6
  _post_forward: reshards 6
loss.backward()
  _pre_backward: begins backward, all_gather 6, unshards 6
  _begin_backward: nothing
  _on_grad ×2: collects 6
  _post_backward: reshards 6, reduce_scatter 6, delivers 6
⋮ units 5, 4, 3, 2
  _pre_backward: all_gather 1, unshards 1
  _on_grad ×2: collects 1
  _finish_backward: reduce_scatter 1, delivers 1, ends backward, reshards 1
optimizer.step()
  _after_step: nothing"""
    assert pixels(picture.png()).std() > 10
    for r in (recording, recordings[3, 4][0], recordings[1, 2][0]):
        picture = viz.hooks(r)
        picture.png()
        ax = picture.figure.axes[0]
        boxes = [text.get_window_extent() for text in ax.texts]
        assert all(0 <= box.x0 and box.x1 <= 1350 for box in boxes)
        for a, b in itertools.combinations(boxes, 2):
            assert a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0


def test_figure_1_has_the_papers_numbers_and_its_sliders_move_it():
    assert viz.figure1().text == (
        "7,500,000,000 parameters on 64 ranks: stage 0: 120.00 GB; stage 1: 31.41 GB; "
        "stage 2: 16.64 GB; stage 3: 1.88 GB")
    widget = viz.explore_figure1()
    numels, ranks, values, stage = [row.children[0] for row in widget.children[:4]]
    assert [row.children[1].value for row in widget.children[:4]] == [
        "7,500,000,000", "64", "2 + 2 + 12, mixed precision, Adam", "3"]
    for control, value in ((ranks, 8), (values, (4, 4, 8)), (stage, 1), (numels, 1_000_000)):
        before = widget.children[4].value
        control.value = value
        assert widget.children[4].value != before
    assert widget.children[4].value == viz.figure1(1_000_000, 8, (4, 4, 8), 1).png()


def seen_by(colour, matrix):
    """A colour as somebody sees it whose eyes lack one kind of cone."""
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4)
              for c in rgb(colour)]
    return np.clip(np.array(matrix) @ linear, 0, 1)


# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision
# Deficiency, 2009, severity 1: protanopia, deuteranopia, tritanopia.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLIND)
def test_the_colours_stay_apart_for_the_colour_blind(kind):
    colours = [*KINDS.values(), viz.palette.COMMUNICATION, viz.palette.LATE,
               viz.palette.ALL_TENSORS]
    seen = [seen_by(colour, BLIND[kind]) for colour in colours]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert np.abs(a - b).max() > 0.1
    hues = {round(colorsys.rgb_to_hsv(*rgb(c) / 255)[0], 1) for c in colours[:4]}
    assert len(hues) == 4


# ---- the page to print ---------------------------------------------------------------------------


def test_the_cheat_sheet_has_the_papers_formulas():
    for stage, (*_, held, sent) in enumerate(cheatsheet.STAGES):
        for numel, ranks in ((64e6, 8), (7.5e9, 64)):
            formula = re.sub(r"(\d+)Ψ", r"\1*numel", held).replace("/N", "/ranks")
            kept = memory.model_states(numel, ranks, stage, **cheatsheet._MIXED)
            assert eval(formula, {"numel": numel, "ranks": ranks}) == sum(kept.values())
        assert sent == ("3Ψ" if stage == 3 else "2Ψ")


def test_nothing_on_the_cheat_sheet_overlaps_or_is_cut_off():
    figure = cheatsheet.draw()
    Picture(figure, "").png()
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    page = figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[:i]), i
