"""What a reader of the notebooks does in JupyterLab, in a real browser. Each test goes on where the
one before it stopped."""

import sys
import time
from statistics import median

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

CELLS = ["""
import sys, torch, torch.nn.functional as F, zero_ref
from zero_ref import viz
from zero_ref.observe.recorder import record
%load_ext zero_ref
print(sys.executable)
""", """
def second_step(stage):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16),
                              torch.nn.ReLU(), torch.nn.Linear(16, 4))
    model = zero_ref.wrap(net, stage)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
        with record(model, optimizer) as recording:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return recording

stage0, stage3 = [zero_ref.launch(second_step, 4, stage) for stage in (0, 3)]
viz.stepper(stage3, stage0)
""", """
viz.explore_figure1()
""", """
%%ranks 2
print("this is rank", rank)
""", """
%%ranks 2
import time
print("waits for ever")
if rank == 0:
    dist.barrier()
else:
    time.sleep(600)
""", """
%%ranks 2
print("works again")
"""]
SETUP, STEPPER, FIGURE1, RANKS, DEADLOCK, AFTER = range(len(CELLS))

# In the browser: how long after the next input another picture is there, whole and in sight.
STOPWATCH = """output => {
    const shown = () => [...output.querySelectorAll("img.widget-image")].find(i => i.offsetParent);
    const before = shown().src;
    let input;
    for (const kind of ["keydown", "pointermove"])
        window.addEventListener(kind, () => { input ??= performance.now(); }, {capture: true});
    output.seconds = new Promise(resolve => {
        const look = () => {
            const image = shown();
            if (image && image.src !== before && image.complete && image.naturalWidth)
                resolve((performance.now() - input) / 1000);
            else
                requestAnimationFrame(look);
        };
        look();
    });
}"""


def image(lab, cell):
    return lab.output(cell).locator("img.widget-image:visible")


def slider(lab, cell, number=0):
    return lab.output(cell).locator(".noUi-handle").nth(number)


def position(lab):
    """The number beside the stepper's slider."""
    return lab.output(STEPPER).locator(".widget-readout")


def time_input(lab, cell, do):
    """Returns how many seconds after this input another picture was there."""
    lab.output(cell).evaluate(STOPWATCH)
    do()
    return lab.output(cell).evaluate("output => output.seconds")


def time_key(lab, key, cell, number=0):
    handle = slider(lab, cell, number)
    handle.focus()
    return time_input(lab, cell, lambda: lab.page.keyboard.press(key))


def report(what, seconds):
    print(f"\n{what}: median {median(seconds) * 1e3:.0f} ms, at most {max(seconds) * 1e3:.0f} ms "
          f"({len(seconds)} times)", end=" ")
    assert max(seconds) < 5


def test_runs_and_shows(lab):
    lab.press(DEADLOCK, "Escape")  # select it
    lab.command("notebook:run-all-above")
    lab.cell(RANKS).get_by_text("[4]:").wait_for()
    assert lab.output(SETUP).text_content().strip() == sys.executable
    for cell in (STEPPER, FIGURE1):
        image(lab, cell).wait_for()
    assert lab.output(RANKS).text_content().splitlines() == [
        "[rank 0] this is rank 0", "[rank 1] this is rank 1"]
    assert len(lab.processes()) == 1 + 4 + 2
    lab.screenshot("run.png")


def test_arrow_keys(lab):
    time_key(lab, "Home", STEPPER)
    report("new picture", [time_key(lab, "ArrowRight", STEPPER) for _ in range(10)])
    expect(position(lab)).to_have_text("10")
    report("picture shown before", [time_key(lab, "ArrowLeft", STEPPER) for _ in range(10)])
    expect(position(lab)).to_have_text("0")


def test_dragging(lab):
    mouse, base = lab.page.mouse, lab.output(STEPPER).locator(".noUi-base")
    handle, track = slider(lab, STEPPER).bounding_box(), base.bounding_box()
    last = int(slider(lab, STEPPER).get_attribute("aria-valuemax").split(".")[0])
    y = track["y"] + track["height"] / 2
    mouse.move(handle["x"] + handle["width"] / 2, y)
    mouse.down()
    report("dragged by one event", [
        time_input(lab, STEPPER, lambda x=track["x"] + track["width"] * event / last:
                   mouse.move(x, y))
        for event in range(1, last + 1)])
    mouse.up()
    expect(position(lab)).to_have_text(str(last))
    lab.screenshot("dragged.png")


def test_play(lab):
    time_key(lab, "Home", STEPPER)
    lab.output(STEPPER).locator(".fa-play").click()
    seen = set()
    for event in range(1, 5):
        expect(position(lab)).to_have_text(str(event))
        seen.add(image(lab, STEPPER).get_attribute("src"))
    assert len(seen) == 4
    lab.output(STEPPER).locator(".fa-pause").click()


def test_figure1(lab):
    keys = "ArrowRight", "ArrowLeft", "ArrowRight", "ArrowLeft"
    report("figure 1", [time_key(lab, key, FIGURE1, i) for i, key in enumerate(keys)])


def deadlock(lab):
    lab.press(DEADLOCK, "Control+Enter")
    expect(lab.output(DEADLOCK)).not_to_contain_text("Interrupted")  # of the run before
    expect(lab.output(DEADLOCK)).to_contain_text("[rank 1] waits for ever", timeout=20_000)
    lab.kernel("Busy").wait_for()


def test_interrupt(lab):
    before = lab.processes()
    deadlock(lab)
    time_key(lab, "End", STEPPER)  # the stepper does not wait for the kernel
    start = time.monotonic()
    lab.page.locator('[data-command="notebook:interrupt-kernel"]').first.click()
    lab.kernel("Idle").wait_for()
    seconds = time.monotonic() - start
    print(f"\ninterrupted: idle after {seconds:.2f} s", end=" ")
    assert seconds < 5
    for text in ("Interrupted", "rank 0 was still at", "dist.barrier()", "rank 1 was still at",
                 "time.sleep(600)"):
        expect(lab.output(DEADLOCK)).to_contain_text(text)
    left = lab.processes()
    assert left < before and len(left) == 1 + 4  # the four did not take part
    lab.screenshot("interrupted.png")
    lab.press(AFTER, "Control+Enter")
    expect(lab.output(AFTER)).to_contain_text("[rank 1] works again", timeout=20_000)


def test_restart(lab):
    deadlock(lab)
    assert len(lab.processes()) == 1 + 4 + 2
    lab.command("notebook:restart-kernel")
    start = time.monotonic()
    lab.page.locator(".jp-Dialog .jp-mod-accept").click()
    lab.wait_until_no_process()
    print(f"\nrestarted: no rank left after {time.monotonic() - start:.2f} s", end=" ")
    lab.kernel("Idle").wait_for()
