"""The rank's side: what runs in the processes that pool.py starts."""

import gc
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist

from . import errors, travel

_INTERFACE = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}  # where backends connect the ranks
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def join(backend: str, local_rank: int, **rendezvous: Any) -> torch.device:
    """Join the process group. Returns this rank's device: with NCCL the GPU `local_rank`.

    rendezvous: where the ranks meet, as `init_process_group` takes it; torchrun's by default.
    """
    device = torch.device("cpu")
    if "nccl" in backend:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timeout(), **rendezvous)
    return device


def timeout() -> timedelta:
    """After how long a collective gives up."""
    return timedelta(seconds=float(os.environ.get("ZERO_REF_TIMEOUT", 600)))


def main(rank: int, world_size: int, backend: str, meeting: str, jobs: Connection,
         control: Connection) -> None:
    """Run what comes through `jobs`, one after another, until the caller is gone.

    Answers ("line", text) for each printed line, then ("done", result) or ("failed", Failure), or
    ("left", result) if the process group is another one now, or none. meeting: the folder where
    the ranks find each other. control: where `where` asks.
    """
    gc.freeze()  # what torch has brought stays anyway: the collector need not walk through it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everyone; the caller decides
    _prepare_for_workers(jobs, control)
    threading.Thread(target=_answer_or_end, args=(control, meeting), daemon=True).start()
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    for variable in _INTERFACE if loopback else ():  # all ranks are here: nobody else may connect
        os.environ.setdefault(variable, *loopback)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, (cores or 1) // world_size))

    one_at_a_time = threading.Lock()  # a rank's threads may print, too
    this_process = os.getpid()

    def send(kind: str, value: Any) -> None:
        if os.getpid() != this_process:  # a worker, which cannot answer for the rank
            if kind == "line":
                # In one piece, for workers of other ranks write there, too.
                print(f"[rank {rank}] {value}\n", end="", file=sys.__stdout__, flush=True)
                return
            os._exit(kind == "failed")
        try:
            message = travel.dumps((kind, value))
        except Exception as error:
            raise ValueError("what the function returned cannot travel to the caller "
                             f"({travel.said(error)}): return numbers, tensors or other plain data"
                             ) from None
        with one_at_a_time:
            jobs.send_bytes(message)

    group = None
    while True:
        try:
            environment, folder, job = pickle.loads(jobs.recv_bytes())
        except EOFError:
            return
        lines = _Lines(send)
        try:
            for name in os.environ.keys() - environment.keys() - _INTERFACE:
                del os.environ[name]
            os.environ.update(environment)
            os.chdir(folder)
            if group is None:
                store = dist.FileStore(os.path.join(meeting, "store"), world_size)
                join(backend, rank, store=store, rank=rank, world_size=world_size)
                group = dist.group.WORLD
                _let_others_run()
            fn, args = pickle.loads(job)
            with redirect_stdout(lines):
                result = fn(*args)
            lines.close_line()
            send("done" if dist.group.WORLD is group else "left", result)
        except BaseException as error:
            lines.close_line()
            send("failed", errors.failure_of(error))


def _let_others_run():
    """Give gloo's thread what the others leave: it tries a lock again and again while the thread
    that holds it waits for a core. Four ranks on two cores spent a third of their time on that."""
    with suppress(OSError):  # where there is no /proc
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/comm") as name:
                if name.read().startswith("gloo_tcp_loop"):
                    os.setpriority(os.PRIO_PROCESS, int(thread), 19)


class _Lines(io.TextIOBase):
    """A stdout that sends each finished line to the caller."""

    def __init__(self, send: Callable[[str, Any], None]):
        self.send, self.rest = send, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.send("line", line)
        return len(text)

    def close_line(self) -> None:
        if self.rest:
            self.write("\n")


def _prepare_for_workers(jobs, control):
    """Processes that a launched function starts, such as a DataLoader's workers."""
    # Classes and functions of the script came here by value, so that workers can have them only if
    # they are forked. In ranks, multiprocessing would otherwise go on to use a fork server.
    multiprocessing.set_start_method("fork" if sys.platform == "linux" else None, force=True)
    ForkingPickler.reducer_override = travel.by_value  # type: ignore
    if os.name == "posix":
        os.setpgid(0, 0)  # workers are in the rank's process group, and end together with it
        # The caller hears that a rank has died from its connections, once nobody has them open.
        os.register_at_fork(after_in_child=jobs.close)
        os.register_at_fork(after_in_child=control.close)


def _answer_or_end(control, meeting):
    """In a thread of its own: tell where the main thread is, and end with the caller."""
    parent = multiprocessing.parent_process()
    main_thread = threading.main_thread().ident
    assert parent is not None and main_thread is not None
    while control in wait([parent.sentinel, control]):
        try:
            control.recv()
        except EOFError:
            break
        frames = traceback.walk_stack(sys._current_frames()[main_thread])
        stack = traceback.StackSummary.extract(frames, lookup_lines=False)
        stack.reverse()
        launched = errors.launched_frames(stack)
        theirs = [frame for frame in launched if not frame.filename.startswith(_PACKAGE)]
        # The caller's lines, and what they have come to.
        inside = [frame for frame in launched[-1:] if frame not in theirs]
        control.send(traceback.StackSummary([*theirs[-2:], *inside]))
    shutil.rmtree(meeting, ignore_errors=True)  # the caller could not
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
