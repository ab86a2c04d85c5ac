"""Run a function on several ranks of this machine: `launch(fn, world_size, *args)`.

The rank processes start once and stay for the next call, so that only the first call pays for
importing torch. A fork server starts them: it has a single thread and no CUDA, so forking it is
safe even from a notebook.
"""

import atexit
import io
import math
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import types
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import cloudpickle
import torch
import torch.distributed as dist

from ..engine import failure
from .output import name_of_cell, output

_RUNNERS = (__file__, str(Path(__file__).with_name("notebook.py")))  # of what is launched
_GRACE = 0.5  # seconds that the other ranks get to finish once one has failed
_pools: dict[tuple[int, str], "_Pool"] = {}
_one_at_a_time = threading.Lock()


class RankError(RuntimeError):
    """A rank failed. The text has that rank's traceback and says where the others were.

    rank: the first to fail. kind: the name of its exception's type. reason: its message.
    """

    def __init__(self, text, rank, kind, reason):
        super().__init__(text)
        self.rank, self.kind, self.reason = rank, kind, reason

    def _render_traceback_(self):  # in a notebook: the learner's frames, and none of ours
        return str(self).splitlines()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or Kernel → Interrupt, while ranks were running. The text says where each was."""

    def _render_traceback_(self):
        return str(self).splitlines()


def launch(fn, world_size, *args, backend=None):
    """Run `fn(*args)` on `world_size` ranks, joined in one process group. Returns the list of their
    results in rank order. The processes stay for the next call, with the modules they imported.

    `fn` may be defined in a script or a notebook cell. What the ranks print appears here while they
    run, each line labelled with its rank; in a notebook it ends up in rank order. backend: by
    default gloo, and nccl for CUDA tensors too if every rank can have a GPU of its own. Collectives
    give up after $ZERO_REF_TIMEOUT seconds (default 600). Ctrl-C ends the ranks and says where they
    were.

    Ranks follow this process's environment variables and folder at each call.

    Raises RankError within seconds if a rank fails (all ranks are ended then, and the next call
    starts new ones), KeyboardInterrupt, ValueError if world_size is below 1, and RuntimeError in a
    process that is a rank itself.
    """
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"world_size={world_size!r}: must be a whole number, 1 or more")
    if dist.is_available() and dist.is_initialized():
        raise RuntimeError("launch was called in a process that is a rank already; under torchrun "
                           "call zero_ref.init() and run the function itself")
    backend = backend or _default_backend(world_size)
    job = cloudpickle.dumps((fn, args))
    with _one_at_a_time:
        pool = _pools.get((world_size, backend))
        if pool is None or not pool.alive():
            pool = _pools[world_size, backend] = _Pool(world_size, backend)
        try:
            return pool.run(job)
        except KeyboardInterrupt:
            text = ["Interrupted. All ranks were ended; the next call starts new ones."]
            text += [f"rank {rank} had finished" for rank in range(world_size)
                     if rank not in pool.unfinished]
            try:
                text += pool.where(sorted(pool.unfinished), patience=0.3)
            finally:  # also if it is pressed once more
                pool.close()
            raise Interrupted("\n".join(text)) from None
        except BaseException:  # the ranks' state is unknown now
            pool.close()
            raise


def init(backend=None):
    """Join the ranks that torchrun started. Returns this rank's torch.device.

    backend: by default gloo, and nccl for CUDA tensors too if this machine has a GPU for each of
    its ranks. With nccl, LOCAL_RANK decides which GPU is this rank's. Raises RuntimeError outside
    torchrun.
    """
    missing = [v for v in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if v not in os.environ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not set: zero_ref.init() joins ranks that "
                           "torchrun started; without torchrun use zero_ref.launch(fn, world_size)")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    backend = backend or _default_backend(local_ranks)
    return _join(backend, int(os.environ["LOCAL_RANK"]))


def _default_backend(ranks_here):
    return "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= ranks_here else "gloo"


def _join(backend, local_rank, **rendezvous):
    device = torch.device("cpu")
    if "nccl" in backend:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=float(os.environ.get("ZERO_REF_TIMEOUT", 600)))
    dist.init_process_group(backend, timeout=timeout, **rendezvous)
    return device


# ---- the caller's side ---------------------------------------------------------------------------


class _Pool:
    """Rank processes that wait for work."""

    def __init__(self, world_size, backend):
        self.backend = backend
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            # The first optimizer of a process imports torch._dynamo, in more than a second: once
            # here, instead of in every rank.
            context.set_forkserver_preload(["zero_ref", "torch._dynamo"])
        self.ranks, self.jobs, self.controls = [], [], []
        self.unfinished = set(range(world_size))
        try:
            self._start(context, world_size)
        except BaseException:
            self.close()
            raise

    def _start(self, context, world_size):
        if os.name == "posix":
            multiprocessing.resource_tracker.ensure_running()  # it would unblock the signal
            with _no_interrupt():
                multiprocessing.forkserver.ensure_running()
        for rank in range(world_size):
            (job, job_there), (control, control_there) = context.Pipe(), context.Pipe()
            place = (rank, world_size, self.backend, self.store.port)
            process = context.Process(target=_rank_main, args=(*place, job_there, control_there),
                                      name=f"rank {rank}")
            self.ranks.append(process)
            with _nameless_main():
                process.start()
            job_there.close()
            control_there.close()
            self.jobs.append(job)
            self.controls.append(control)

    def alive(self):
        return bool(self.ranks) and all(process.is_alive() for process in self.ranks)

    def close(self):
        started = [process for process in self.ranks if process.pid]
        for process in started:
            process.kill()
        for process in started:
            process.join()
        self.ranks = []

    def run(self, job):
        message = pickle.dumps((dict(os.environ), os.getcwd(), job))
        for connection in self.jobs:
            connection.send_bytes(message)
        results, failures = {}, {}
        self.unfinished = set(range(len(self.ranks)))
        waiting, deadline = dict(zip(self.jobs, range(len(self.jobs)))), math.inf
        with output(len(self.ranks)) as shown:
            while waiting and time.monotonic() < deadline:
                wake = min(deadline, shown.due())
                patience = None if wake == math.inf else max(0, wake - time.monotonic())
                for connection in wait(list(waiting), patience):
                    rank = waiting[connection]
                    kind, value = self._receive(connection, rank)
                    if kind == "line":
                        shown.line(rank, value)
                        continue
                    shown.done(rank)
                    self.unfinished.discard(rank)
                    (results if kind == "done" else failures)[rank] = value
                    del waiting[connection]
                    if kind == "failed":
                        deadline = min(deadline, time.monotonic() + _GRACE)
        if failures:
            raise self._error(failures, sorted(waiting.values()))
        return [results[rank] for rank in range(len(self.ranks))]

    def _receive(self, connection, rank):
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return "failed", self._obituary(rank)
        try:
            return pickle.loads(message)
        except Exception as error:
            reason = f"its answer cannot be read here: {error}"
            return "failed", _Failure(time.monotonic(), type(error).__name__, reason)

    def _obituary(self, rank):
        self.ranks[rank].join(1)
        code = self.ranks[rank].exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return _Failure(time.monotonic(), "ProcessDied", f"its process ended with {how}")

    def _error(self, failures, still_waiting):
        """A rank that died is the cause, or else the earliest failure; the others' are usually its
        consequences."""
        first, *others = sorted(failures, key=lambda rank: (failures[rank].kind != "ProcessDied",
                                                            failures[rank].when))
        cause = failures[first]
        text = [f"rank {first} raised {cause.kind}: {cause.reason}"]
        text += map(_formatted, cause.traceback)
        for rank in others:
            f = failures[rank]
            same = (f.kind, f.reason) == (cause.kind, cause.reason)
            text.append(f"rank {rank} raised " + ("the same" if same else f"{f.kind}: {f.reason}"))
        text += self.where(still_waiting, patience=2)
        text.append("All ranks were ended; the next call starts new ones.")
        return RankError("\n".join(text), first, cause.kind, cause.reason)

    def where(self, ranks, patience):
        """Where each of these ranks is, as text. patience: seconds, for all of them together."""
        deadline, text = time.monotonic() + patience, []
        for rank in ranks:
            with suppress(OSError):
                self.controls[rank].send("where are you?")
        for rank in ranks:
            frames = None
            with suppress(EOFError, OSError):
                if self.controls[rank].poll(max(0, deadline - time.monotonic())):
                    frames = self.controls[rank].recv()
            place = "  (no answer)" if frames is None else "  (between two calls)"
            text.append(f"rank {rank} was still at\n{_formatted(frames) if frames else place}")
        return text


def _formatted(part):
    """Text as it is, frames with their source lines: these are looked up here, because only the
    notebook knows what is in its cells."""
    if isinstance(part, str):
        return part
    for frame in part:
        _ = frame.line
        frame.filename = name_of_cell(frame.filename)
    return "".join(traceback.format_list(part)).rstrip()


@contextmanager
def _no_interrupt():
    """The fork server inherits this: Ctrl-C while it imports torch would end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _nameless_main():
    """Keep multiprocessing from running the caller's script again in every rank: whatever a rank
    needs of it travels by value."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@atexit.register
def _close_all():
    for pool in _pools.values():
        pool.close()


# ---- the rank's side -----------------------------------------------------------------------------


class _Failure:
    def __init__(self, when, kind, reason, traceback=()):
        self.when, self.kind, self.reason, self.traceback = when, kind, reason, traceback


class _Lines(io.TextIOBase):
    """A stdout that sends each finished line to the caller."""

    def __init__(self, send):
        self.send, self.rest = send, ""

    def write(self, text):
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.send("line", line)
        return len(text)

    def close_line(self):
        if self.rest:
            self.write("\n")


def _rank_main(rank, world_size, backend, port, jobs, control):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everyone; the caller decides
    threading.Thread(target=_answer_or_end, args=(control,), daemon=True).start()
    if os.path.exists("/sys/class/net/lo"):  # all ranks are here: do not depend on the host's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, cores // world_size))

    one_at_a_time = threading.Lock()  # a rank's threads may print, too

    def send(kind, value):
        message = cloudpickle.dumps((kind, value))
        with one_at_a_time:
            jobs.send_bytes(message)

    joined = False
    own_names = {"GLOO_SOCKET_IFNAME"}
    while True:
        try:
            environment, folder, job = pickle.loads(jobs.recv_bytes())
        except EOFError:
            return
        lines = _Lines(send)
        try:
            for name in os.environ.keys() - environment.keys() - own_names:
                del os.environ[name]
            os.environ.update(environment)
            os.chdir(folder)
            if not joined:
                store = dist.TCPStore("127.0.0.1", port, is_master=False)
                _join(backend, rank, store=store, rank=rank, world_size=world_size)
                joined = True
            fn, args = pickle.loads(job)
            with redirect_stdout(lines):
                result = fn(*args)
            lines.close_line()
            send("done", result)
        except BaseException as error:
            lines.close_line()
            failure.annotate(error)
            when, kind = time.monotonic(), type(error).__name__
            try:
                failed = _Failure(when, kind, str(error), _traceback(error))
            except Exception as another:  # an exception that cannot be shown
                failed = _Failure(when, kind, f"(its message raised {type(another).__name__})")
            send("failed", failed)


def _answer_or_end(control):
    """In a thread of its own: tell where the main thread is, and end with the caller."""
    caller = multiprocessing.parent_process().sentinel
    main = threading.main_thread().ident
    while control in wait([caller, control]):
        try:
            control.recv()
        except EOFError:
            break
        stack = traceback.walk_stack(sys._current_frames()[main])
        stack = traceback.StackSummary.extract(stack, lookup_lines=False)
        stack.reverse()
        own = _own(stack)
        here = str(Path(__file__).parent.parent)
        theirs = [frame for frame in own if not frame.filename.startswith(here)]
        # The caller's lines, and what they have come to.
        inside = [frame for frame in own[-1:] if frame not in theirs]
        control.send(traceback.StackSummary([*theirs[-2:], *inside]))
    os._exit(1)


def _traceback(error, seen=()):
    """A list of text and of frames: plain data, that any process can read."""
    parts, seen = [], (*seen, error)
    cause, context = error.__cause__, error.__context__
    if cause is not None and cause not in seen:
        parts += [*_traceback(cause, seen), "The above was the direct cause of this:"]
    elif context is not None and not error.__suppress_context__ and context not in seen:
        parts += [*_traceback(context, seen), "While that was handled, this came up:"]
    frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__),
                                            lookup_lines=False)
    what = "".join(traceback.format_exception_only(error)).rstrip()
    return [*parts, "Traceback (most recent call last):", _own(frames), what]


def _own(stack):
    """What lies between the launcher and torch: the frames of the function that was launched."""
    ours = [frame.filename in _RUNNERS for frame in stack]
    begin = ours.index(True) if True in ours else 0
    begin = ours.index(False, begin) if False in ours[begin:] else len(stack)
    end = ours.index(True, begin) if True in ours[begin:] else len(stack)  # it is printing
    library = os.path.dirname(torch.__file__)
    return traceback.StackSummary(frame for frame in stack[begin:end]
                                  if not frame.filename.startswith((library, "<frozen")))
