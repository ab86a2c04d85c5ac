"""The launcher: results, output, failures, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import zero_ref


def test_results_come_in_rank_order_and_arguments_arrive():
    results = zero_ref.launch(lambda a, b: (dist.get_rank(), dist.get_world_size(), a + b), 3, 1, 2)
    assert results == [(0, 3, 3), (1, 3, 3), (2, 3, 3)]


def test_ranks_stay_for_the_next_call():
    assert zero_ref.launch(os.getpid, 2) == zero_ref.launch(os.getpid, 2)


def test_ranks_follow_environment_and_folder(monkeypatch, tmp_path):
    def ask():
        return os.environ.get("HELLO"), os.getcwd()

    zero_ref.launch(ask, 2)
    monkeypatch.setenv("HELLO", "there")
    monkeypatch.chdir(tmp_path)
    assert zero_ref.launch(ask, 2) == [("there", str(tmp_path))] * 2
    monkeypatch.undo()
    assert zero_ref.launch(ask, 2) == [(None, os.getcwd())] * 2


def test_printed_lines_are_labelled(capsys):
    zero_ref.launch(lambda: print("hello\nfrom", dist.get_rank()), 2)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == ["[rank 0] from 0", "[rank 0] hello", "[rank 1] from 1",
                             "[rank 1] hello"]


def fail_on_one(rank):
    if dist.get_rank() == rank:
        raise KeyError("the cause")
    dist.barrier()


def test_an_exception_reaches_the_caller_with_its_traceback():
    before = zero_ref.launch(os.getpid, 3)
    start = time.monotonic()
    with pytest.raises(zero_ref.RankError, match=r"^rank 1 raised KeyError: 'the cause'") as caught:
        zero_ref.launch(fail_on_one, 3, 1)
    assert time.monotonic() - start < 5
    text = str(caught.value)
    assert "in fail_on_one" in text and 'raise KeyError("the cause")' in text
    for rank in (0, 2):  # these waited, or noticed that rank 1 was gone
        assert f"rank {rank} was still at" in text or f"rank {rank} raised" in text
    assert "dist.barrier()" in text
    assert (caught.value.rank, caught.value.kind) == (1, "KeyError")
    assert not any(alive(pid) for pid in before)
    assert zero_ref.launch(dist.get_rank, 3) == [0, 1, 2]  # the next call works


class Odd(Exception):
    """Cannot be pickled."""

    def __init__(self):
        super().__init__("odd")
        self.lock = threading.Lock()


def fail_oddly():
    try:
        {}["first"]
    except KeyError:
        raise Odd from ValueError("the direct cause")


def test_an_exception_that_cannot_be_pickled_is_reported_with_its_causes():
    with pytest.raises(zero_ref.RankError, match="raised Odd: odd") as caught:
        zero_ref.launch(fail_oddly, 2)
    text = str(caught.value)
    assert "raise Odd from ValueError" in text
    assert "ValueError: the direct cause\nThe above was the direct cause of this:" in text


def test_ranks_stay_when_launched_while_an_exception_is_handled():
    try:
        raise KeyError
    except KeyError:
        before = zero_ref.launch(os.getpid, 2)
    assert zero_ref.launch(os.getpid, 2) == before


def die_on_one():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_rank_that_dies_is_reported():
    with pytest.raises(zero_ref.RankError, match=r"rank 1 raised ProcessDied: .*SIGKILL"):
        zero_ref.launch(die_on_one, 2)


def test_an_answer_that_cannot_be_sent_is_an_error():
    with pytest.raises(zero_ref.RankError, match="cannot pickle 'generator' object"):
        zero_ref.launch(lambda: (i for i in range(3)), 2)


class Unspeakable(Exception):
    def __str__(self):
        raise KeyError


def fail_unspeakably():
    raise Unspeakable


def test_an_exception_whose_message_raises_is_reported():
    with pytest.raises(zero_ref.RankError, match=r"raised Unspeakable: \(its message raised"):
        zero_ref.launch(fail_unspeakably, 2)


@pytest.mark.parametrize("world_size", [0, -1, 1.5, "2", True])
def test_bad_world_size(world_size):
    with pytest.raises(ValueError, match=f"world_size={world_size!r}: must be a whole number"):
        zero_ref.launch(dist.get_rank, world_size)


def test_launch_inside_a_rank_is_refused():
    with pytest.raises(zero_ref.RankError, match="a rank already"):
        zero_ref.launch(lambda: zero_ref.launch(dist.get_rank, 2), 2)


def test_several_threads_may_launch():
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(zero_ref.launch, dist.get_rank, 2) for _ in range(8)]
        assert all(call.result() == [0, 1] for call in calls)


def load_with_workers():
    data = torch.utils.data.TensorDataset(torch.arange(4))
    return [x.item() for x, in torch.utils.data.DataLoader(data, num_workers=1, batch_size=None)]


def test_a_rank_may_have_workers():
    assert zero_ref.launch(load_with_workers, 1) == [[0, 1, 2, 3]]


def test_init_outside_torchrun():
    with pytest.raises(RuntimeError, match="RANK, WORLD_SIZE, LOCAL_RANK not set"):
        zero_ref.init()


# ---- scripts -------------------------------------------------------------------------------------


def start(tmp_path, text, **env):
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env=os.environ | env)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, seconds=5):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        pass
    return not any(map(alive, pids))


def test_from_a_script_without_a_main_guard(tmp_path):
    process = start(tmp_path, "import torch.distributed as dist, zero_ref\n"
                              "def double(x):\n    return 2 * x + dist.get_rank()\n"
                              "print(zero_ref.launch(double, 2, 5))\n")
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("[10, 11]\n", 0), err


STUCK = """
import os, torch.distributed as dist, zero_ref
def stuck():
    print(os.getpid())
    if dist.get_rank() == 0:
        dist.barrier()          # rank 1 never comes
    else:
        while True:
            pass
zero_ref.launch(stuck, 2)
"""


@pytest.mark.parametrize("how, whom", [("SIGINT", "all"), ("SIGINT", "caller"),
                                       ("SIGTERM", "caller"), ("SIGKILL", "caller")])
def test_no_orphans_after_ctrl_c_or_worse(tmp_path, how, whom):
    process = start(tmp_path, STUCK)
    pids = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
    began = time.monotonic()
    if whom == "all":  # as a terminal does
        for pid in pids:
            os.kill(pid, getattr(signal, how))
    process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=20)
    assert gone(pids) and time.monotonic() - began < 6
    assert ("Interrupted. All ranks were ended" in err) == (how == "SIGINT")


def test_a_hung_collective_fails_and_says_where(tmp_path):
    process = start(tmp_path, STUCK, ZERO_REF_TIMEOUT="1")
    _, err = process.communicate(timeout=30)
    assert "rank 0 raised RuntimeError" in err and "dist.barrier()" in err
    assert "rank 1 was still at" in err and err.count("in stuck") == 2


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def test_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import torch.distributed as dist, zero_ref\n"
                      "device = zero_ref.init()\n"
                      "with open(f'{__file__}.{dist.get_rank()}', 'w') as file:\n"
                      "    config = dist.get_backend_config()\n"
                      "    print(dist.get_world_size(), device, config, file=file)\n"
                      "dist.destroy_process_group()\n")
    done = subprocess.run([*TORCHRUN, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        expected = "2 cpu cpu:gloo,cuda:gloo\n"
        if torch.cuda.device_count() >= 2:
            expected = f"2 cuda:{rank} cpu:gloo,cuda:nccl\n"
        assert (tmp_path / f"script.py.{rank}").read_text() == expected
