"""The launcher: results, output, failures, and nothing left behind."""

import ipaddress
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import zero_ref
from zero_ref import comm


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


# ---- what travels --------------------------------------------------------------------------------


def test_functions_may_mention_all_modules_of_torch():
    cudnn, rnn, quantized = torch.backends.cudnn, torch.backends.cudnn.rnn, torch.backends.quantized
    mkldnn, einsum, matmul = (torch.backends.mkldnn, torch.backends.opt_einsum,
                              torch.backends.cuda.matmul)
    config, ops, aten, add, exact, classes = (torch._inductor.config, torch.ops, torch.ops.aten,
                                              torch.ops.aten.add, torch.ops.aten.add.Tensor,
                                              torch.classes)

    def uses_them():
        cudnn.benchmark = matmul.allow_tf32 = True
        assert torch.backends.cudnn.benchmark and torch.backends.cuda.matmul.allow_tf32
        assert all(sys.modules[m.__name__] is m
                   for m in (cudnn, rnn, quantized, mkldnn, einsum, config, ops, classes))
        assert aten is torch.ops.aten and add is aten.add and exact is add.Tensor
        return cudnn  # and back

    assert zero_ref.launch(uses_them, 2) == [torch.backends.cudnn] * 2


def test_code_keeps_the_name_of_its_file():
    def files():
        return [code.co_filename for code in (files.__code__, (lambda: 0).__code__)]

    assert zero_ref.launch(files, 1) == [[__file__] * 2]


class Holder:
    def __init__(self):
        self.lock = threading.Lock()

    def work(self):
        """Needs the lock."""


def held_back():
    """What cannot travel, as (fn, args, what the error calls it)."""
    lock, numbers, file = threading.Lock(), (i for i in range(3)), open(os.devnull, "wb")

    def outer():
        def inner():
            return lock
        return inner

    def calls_another():
        return outer()

    with file:
        yield lambda: next(numbers), (), "'numbers' in held_back.<locals>.<lambda>"
        yield outer, (), "'lock' in held_back.<locals>.outer"
        yield calls_another, (), "'lock' in held_back.<locals>.outer"
        yield lambda: file.name, (), "'file' in held_back.<locals>.<lambda>"
        yield Holder().work, (), "'lock' in Holder"
        yield print, (1, [lock]), "argument 2 of print"
        yield print, (Holder(),), "'lock' in Holder"


def test_what_cannot_travel_is_named():
    for fn, args, what in held_back():
        with pytest.raises(ValueError, match="cannot travel to the ranks") as caught:
            zero_ref.launch(fn, 2, *args)
        text = str(caught.value)
        assert text.startswith(f"{what} cannot travel to the ranks (") and "annot pickle" in text
        assert text.endswith("create it on the ranks, inside the function that they run")


def test_what_cannot_travel_in_a_comparison_is_named_before_anything_is_trained():
    lock, net = threading.Lock(), nn.Linear(2, 1)
    parts = {"build": lambda: net, "batch": lambda step, rank: torch.ones(1, 2) * rank,
             "loss": lambda model, batch: model(batch).mean()}

    def loss(model, batch):
        with lock:
            return model(batch).mean()

    def mine(module, stage):
        return lock

    with pytest.raises(ValueError, match=r"^'lock' in .*\.loss cannot travel to the ranks"):
        zero_ref.compare(**{**parts, "loss": loss}, world_size=2, steps=2)
    with pytest.raises(ValueError, match=r"^'lock' in .*\.mine cannot travel to the ranks"):
        zero_ref.compare(**parts, systems={"mine": mine}, world_size=2, steps=2)


def test_ranks_exchange_json():
    answers = zero_ref.launch(lambda: comm.all_gather_object(
        (dist.get_rank(), "é" * dist.get_rank(), None), dist.group.WORLD, phase=""), 3)
    assert answers == [[[0, "", None], [1, "é", None], [2, "éé", None]]] * 3


def test_nothing_is_unpickled_that_a_socket_has_brought():
    root = Path(zero_ref.__file__).parent
    sources = {file.relative_to(root).as_posix(): file.read_text() for file in root.rglob("*.py")}
    assert not [name for name, text in sources.items() if "dist.all_gather_object" in text
                or "dist.broadcast_object" in text or "dist.gather_object" in text]
    # These two read pipes between this user's own processes.
    assert sorted(name for name, text in sources.items()
                  if "pickle.loads(" in text or "= pickle.loads" in text) == [
        "ranks/pool.py", "ranks/rank.py"]


# ---- workers of a rank ---------------------------------------------------------------------------


def test_a_rank_may_have_workers():
    class Own(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index * factor

    def seen(worker):
        factors.append(worker)

    def load():
        plain = DataLoader(TensorDataset(torch.arange(4)), num_workers=1, batch_size=None)
        own = DataLoader(Own(), batch_size=2, num_workers=2, worker_init_fn=seen,
                         collate_fn=lambda items: sum(items), persistent_workers=True)
        return [x.item() for x, in plain], list(own), list(own)

    factor, factors = 10, []
    assert zero_ref.launch(load, 2) == [([0, 1, 2, 3], [10, 50], [10, 50])] * 2


class Fails(Dataset):
    """Whose worker raises, dies, or never answers."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if self.how == "raise":
            raise ArithmeticError("in the data")
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


@pytest.mark.parametrize("how, sentence", [
    ("raise", "Caught ArithmeticError in DataLoader worker process 0"),
    ("die", r"DataLoader worker \(pid.* is killed by signal: Killed")])
def test_what_fails_in_a_worker_is_reported(how, sentence):
    with pytest.raises(zero_ref.RankError, match=sentence):
        zero_ref.launch(lambda: list(DataLoader(Fails(how), num_workers=1)), 2)


def test_a_rank_that_waits_for_its_worker_says_where():
    def wait():
        loader = iter(DataLoader(Fails("pause"), num_workers=1))
        dist.barrier()
        if dist.get_rank() == 1:
            raise KeyError("the cause")
        return next(loader)

    with pytest.raises(zero_ref.RankError, match="rank 1 raised KeyError: 'the cause'") as caught:
        zero_ref.launch(wait, 2)
    assert str(caught.value).endswith(
        "in wait\n    return next(loader)\nAll ranks were ended; the next call starts new ones.")


@pytest.mark.parametrize("end", ["SIGKILL", "exception", "fork"])
def test_workers_do_not_outlive_a_rank_nor_answer_for_it(end, tmp_path):
    def run():
        worker = multiprocessing.Process(target=signal.pause)
        worker.start()
        (tmp_path / f"{dist.get_rank()}").write_text(str(worker.pid))
        if end == "fork" and (child := os.fork()):
            os.waitpid(child, 0)
        elif end == "fork":
            return "an answer of the child"
        dist.barrier()
        if end == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("the cause")

    began = time.monotonic()
    with pytest.raises(zero_ref.RankError, match="SIGKILL" if end == "SIGKILL" else "the cause"):
        zero_ref.launch(run, 2)
    assert gone([int((tmp_path / f"{rank}").read_text()) for rank in range(2)])
    assert time.monotonic() - began < 10


# ---- the process group ---------------------------------------------------------------------------


def test_a_function_may_destroy_the_process_group(tmp_path):
    def train(who):
        model = zero_ref.wrap(nn.Linear(2, 2), 3)
        model(torch.ones(1, 2)).sum().backward()
        dist.barrier()
        if dist.get_rank() in who:
            dist.destroy_process_group()
        return who

    for who in ([0, 1], [0], [1], []):
        assert zero_ref.launch(train, 2, who) == [who] * 2
        assert zero_ref.launch(dist.get_rank, 2) == [0, 1]
    before = zero_ref.launch(os.getpid, 2)
    assert zero_ref.launch(os.getpid, 2) == before

    def of_its_own():
        rank = dist.get_rank()
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "own"), 2),
                                rank=1 - rank, world_size=2)
        return dist.get_rank()

    assert zero_ref.launch(of_its_own, 2) == [1, 0]
    assert zero_ref.launch(dist.get_rank, 2) == [0, 1]


@pytest.mark.parametrize("join", [lambda: dist.init_process_group("gloo", rank=0, world_size=2),
                                  lambda: zero_ref.init()])
def test_a_function_that_joins_a_process_group_hears_that_it_is_there(join):
    with pytest.raises(zero_ref.RankError, match=r"^rank . raised .*: the process group is there "
                                                 r"already.*: leave out init_process_group"):
        zero_ref.launch(join, 2)


# ---- what listens --------------------------------------------------------------------------------


def listening(pid):
    """The addresses on which this process listens."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:  # closed meanwhile
            continue
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, = fields = line.split()
            # A socket that listens, or one for datagrams, which needs no listening.
            if fields[9] in inodes and (state == "0A" or table.startswith("udp")):
                number = bytes.fromhex(local.split(":")[0])
                words = [number[i : i + 4][::-1] for i in range(0, len(number), 4)]
                found.append(ipaddress.ip_address(b"".join(words)))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the kernel does not say")
def test_nothing_of_a_launch_listens_beyond_loopback():
    def train():
        group = dist.new_group([0, 1])
        model = zero_ref.wrap(nn.Linear(2, 2), 3, check=True, process_group=group)
        model(torch.ones(1, 2)).sum().backward()
        dist.barrier()
        found = [listening(os.getpid()), listening(os.getppid())]  # a rank, and the fork server
        dist.barrier()
        return found

    before = listening(os.getpid())
    for own, servers in zero_ref.launch(train, 2):
        assert own and all(address.is_loopback for address in own + servers)
    assert listening(os.getpid()) == before


def test_the_folder_where_ranks_meet_is_this_users_and_goes_with_them(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    zero_ref.launch(dist.destroy_process_group, 2)  # so that there are new ranks after this
    assert not list(tmp_path.iterdir())
    zero_ref.launch(dist.get_rank, 2)
    [folder] = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    zero_ref.launch(dist.destroy_process_group, 2)
    assert not list(tmp_path.iterdir())


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


def test_a_script_with_a_cache_and_with_workers_that_return_its_classes(tmp_path):
    process = start(tmp_path, """
import collections, functools, torch, zero_ref
from concurrent.futures import ProcessPoolExecutor
from torch.utils.data import DataLoader
Batch = collections.namedtuple("Batch", "x")
def collate(items):
    return Batch(torch.tensor(items))
@functools.lru_cache(maxsize=2)
def double(x):
    return 2 * x
def run():
    with ProcessPoolExecutor(1) as workers:
        doubled = [*workers.map(double, [1, 2])]
    return doubled, [b.x.tolist() for b in DataLoader([1, 2], 2, num_workers=1, collate_fn=collate)]
print(zero_ref.launch(run, 2)[1], zero_ref.launch(lambda: double.cache_parameters(), 1)[0])
""", ZERO_REF_TIMEOUT="5")
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == "([2, 4], [[1, 2]]) {'maxsize': 2, 'typed': False}\n", err


STUCK = """
import multiprocessing, os, signal, torch.distributed as dist, zero_ref
def stuck():
    worker = multiprocessing.Process(target=signal.pause)
    worker.start()
    print(os.getpid(), worker.pid)
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
    process = start(tmp_path, STUCK, TMPDIR=str(tmp_path))
    pids = [int(n) for _ in range(2) for n in process.stdout.readline().split()[-2:]]
    began = time.monotonic()
    if whom == "all":  # as a terminal does
        for pid in pids:
            os.kill(pid, getattr(signal, how))
    process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=20)
    assert gone(pids) and time.monotonic() - began < 6
    assert ("Interrupted. All ranks were ended" in err) == (how == "SIGINT")
    assert not list(tmp_path.glob("zero_ref-*"))


def test_what_workers_print_is_labelled(tmp_path):
    process = start(tmp_path, "import multiprocessing, zero_ref\n"
                              "def run():\n"
                              "    print('a rank')\n"
                              "    worker = multiprocessing.Process(target=print, args=('mine',))\n"
                              "    worker.start()\n    worker.join()\n"
                              "    return worker.exitcode\n"
                              "print(zero_ref.launch(run, 2))\n")
    out, err = process.communicate(timeout=60)
    assert sorted(out.splitlines()) == [
        "[0, 0]", "[rank 0] a rank", "[rank 0] mine", "[rank 1] a rank", "[rank 1] mine"], err


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
