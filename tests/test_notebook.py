"""Ranks in a notebook, in a real kernel: the magic, its output, errors, interrupt, restart."""

import os
import re
import signal
import time

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.fixture(scope="module")
def kernel():
    with Kernel() as kernel:
        kernel.run("%load_ext zero_ref")
        yield kernel


class Kernel:
    """A real kernel that runs one cell at a time."""

    def __enter__(self):
        self.book = nbformat.v4.new_notebook()
        self.client = nbclient.NotebookClient(self.book, timeout=60, allow_errors=True)
        self.manager = self.client.create_kernel_manager()
        self.client.start_new_kernel()
        self.client.start_new_kernel_client()
        return self

    def __exit__(self, *_):
        self.client._cleanup_kernel()

    def run(self, source):
        """Returns the cell's text and, if it failed, the traceback that it shows."""
        cell = nbformat.v4.new_code_cell(source)
        self.book.cells.append(cell)
        self.client.execute_cell(cell, len(self.book.cells) - 1)
        text = "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream")
        errors = ["\n".join(o.traceback) for o in cell.outputs if o.output_type == "error"]
        return text, re.sub(r"\x1b\[[0-9;]*m", "", errors[0]) if errors else None

    def pids(self, world_size):
        self.run("import os, zero_ref")
        text, _ = self.run(f"print(zero_ref.launch(os.getpid, {world_size}))")
        return [int(pid) for pid in re.findall(r"\d+", text)]


def gone(pids, seconds):
    end = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_cell_runs_on_every_rank_and_its_names_stay(kernel):
    text, error = kernel.run("%%ranks 3\nx = torch.ones(2) * rank\ndist.all_reduce(x)\nx")
    assert error is None
    assert text.splitlines() == [f"[rank {r}] tensor([3., 3.])" for r in range(3)]
    text, _ = kernel.run("%%ranks 3\nprint(x[0].item() + rank, world_size, device)")
    assert text.splitlines()[2] == "[rank 2] 5.0 3 cpu"
    assert kernel.run("%%ranks 3\nx * 2;") == ("", None)


def test_ranks_start_where_all_names_were_deleted():
    """%reset takes away __main__.__spec__, too."""
    with Kernel() as kernel:
        kernel.run("%reset -f")
        assert kernel.pids(1)


def test_values_are_fetched_from_ranks(kernel):
    kernel.run("%%ranks 2\nmine = rank * 10\nx = 0")
    kernel.run("from zero_ref.ranks.notebook import fetch")
    assert kernel.run("print(fetch('mine', 2))")[0] == "[0, 10]\n"
    error = kernel.run("fetch('yours', 2)")[1]
    assert "NameError: no %%ranks cell has defined 'yours' on these ranks" in error


def test_lines_end_up_in_rank_order(kernel):
    text, _ = kernel.run("%%ranks 3\nimport time\nfor i in range(3):\n"
                         "    time.sleep(0.05 * (3 - rank))\n    print(i)")
    assert text.splitlines() == [f"[rank {r}] {i}" for r in range(3) for i in range(3)]


def test_a_line_does_not_wait_for_ever_and_the_order_is_right_in_the_end(kernel):
    text, _ = kernel.run("%%ranks 2\nimport time\nprint('first')\nif rank == 0:\n"
                         "    time.sleep(2.6)\nprint('last')")
    assert text.splitlines() == ["[rank 0] first", "[rank 0] last", "[rank 1] first",
                                 "[rank 1] last"]


def test_many_lines_arrive(kernel):
    text, _ = kernel.run("%%ranks 2\nfor i in range(3000):\n    print(i)")
    assert text.splitlines() == [f"[rank {r}] {i}" for r in range(2) for i in range(3000)]
    outputs = [o for o in kernel.book.cells[-1].outputs if o.output_type == "stream"]
    assert len(outputs) < 100  # a front end takes 1,000 messages per second


def test_what_else_a_cell_shows_stays(kernel):
    text, _ = kernel.run("import time, zero_ref, torch.distributed as dist\ndef late():\n"
                         "    print('first')\n    time.sleep(2.6 * (dist.get_rank() == 0))\n"
                         "    print('last')\nprint('mine')\nzero_ref.launch(late, 2);")
    assert text.startswith("mine\n") and text.count("[rank") == 4


def test_names_and_classes_of_cells(kernel):
    kernel.run("%%ranks 2\nclass P:\n    pass\nfor rank in range(2):\n    pass")
    text, error = kernel.run("%%ranks 2\nout = [None, None]\ndist.all_gather_object(out, P())\n"
                             "[type(p).__name__ for p in out], rank")
    assert error is None and text.splitlines()[0] == "[rank 0] (['P', 'P'], 0)"


def test_where_a_rank_waits_names_the_learners_line(kernel):
    kernel.run("import zero_ref\nfrom zero_ref import course\ndef train():\n"
               "    model = zero_ref.wrap(course.build(), 3)\n"
               "    output = model(course.batch(0, model.rank)[0])\n"
               "    if model.rank == 1:\n        raise ValueError('no backward here')\n"
               "    output.sum().backward()")
    error = kernel.run("zero_ref.launch(train, 2)")[1]
    assert "    output.sum().backward()" in error and "in wait" in error


def test_functions_of_a_cell_run_on_ranks(kernel):
    kernel.run("import zero_ref, torch.distributed as dist\ndef double(x):\n"
               "    return x * 2 + dist.get_rank()")
    assert kernel.run("print(zero_ref.launch(double, 2, 5))")[0] == "[10, 11]\n"


def test_an_error_shows_the_learners_lines_and_where_the_others_waited(kernel):
    start = time.monotonic()
    _, error = kernel.run("%%ranks 3\n\nif rank == 1:\n    1 / 0\ndist.barrier()")
    assert time.monotonic() - start < 5
    assert error.startswith("rank 1 raised ZeroDivisionError: division by zero")
    assert re.search(r'File "Cell In\[\d+\]", line 4, in <module>\n    1 / 0', error)
    for rank in (0, 2):
        assert re.search(rf'rank {rank} was still at\n  File "Cell In\[\d+\]", line 5, in <module>'
                         r"\n    dist.barrier\(\)", error)
    assert "zero_ref" not in error and "site-packages" not in error  # no frames of ours or torch's
    assert kernel.run("%%ranks 3\nrank")[1] is None  # the next cell works


def test_an_error_in_a_launched_function_shows_its_cell(kernel):
    kernel.run("def broken():\n    return {}['missing']")
    _, error = kernel.run("zero_ref.launch(broken, 2)")
    assert re.search(r'File "Cell In\[\d+\]", line 2, in broken\n    return {}\[', error)


def test_what_the_magic_refuses(kernel):
    for line in ("", "zero", "0", "2 3"):
        assert "give the number of ranks, for example %%ranks 4" in str(
            kernel.run(f"%%ranks {line}\nrank"))
    before = kernel.pids(2)
    assert "magics, ! and await do not work in a %%ranks cell" in str(
        kernel.run("%%ranks 2\n!ls"))
    assert kernel.pids(2) == before  # nothing ran


def test_interrupt_ends_a_deadlock_and_the_next_cell_works(kernel):
    pids = kernel.pids(2)
    source = ("%%ranks 2\nimport threading, time\nif rank == 1:\n    dist.barrier()\n"
              "threading.Timer(0.5, print, ['stuck']).start()\ntime.sleep(600)")
    cell = nbformat.v4.new_code_cell(source)
    kernel.book.cells.append(cell)
    client = kernel.client
    pressed, process = [], client.process_message

    def press_when_it_has_printed(message, *args):
        if message["msg_type"] == "stream" and not pressed:
            pressed.append(time.monotonic())
            os.kill(client.km.provisioner.pid, signal.SIGINT)  # Kernel → Interrupt
        return process(message, *args)

    client.process_message = press_when_it_has_printed
    try:
        client.execute_cell(cell, len(kernel.book.cells) - 1)
    finally:
        del client.process_message
    assert time.monotonic() - pressed[0] < 2
    error = "\n".join(cell.outputs[-1].traceback)
    assert error.startswith("Interrupted. All ranks were ended; the next call starts new ones.")
    assert "dist.barrier()" in error and "time.sleep(600)" in error
    assert gone(pids, 2)
    assert kernel.run("%%ranks 2\nrank")[0] == "[rank 0] 0\n[rank 1] 1\n"


def test_interrupt_says_who_had_finished(kernel):
    kernel.run("import signal, threading, zero_ref, torch.distributed as dist\ndef skips():\n"
               "    if dist.get_rank() != 1:\n        dist.barrier()\n"
               "main = threading.main_thread().ident")
    error = kernel.run("threading.Timer(1.5, signal.pthread_kill, (main, signal.SIGINT)).start()\n"
                       "zero_ref.launch(skips, 3)")[1]
    assert "rank 1 had finished\nrank 0 was still at" in error and "rank 2 was still at" in error


def test_no_rank_outlives_the_kernel():
    with Kernel() as kernel:
        pids = kernel.pids(2)
        os.kill(kernel.client.km.provisioner.pid, signal.SIGKILL)
        assert gone(pids, 5)
