"""The rank's side: what runs in the processes that pool.py starts."""

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from . import errors

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def join(backend: str, local_rank: int, **rendezvous: Any) -> torch.device:
    """Join the process group. Returns this rank's device: with NCCL the GPU `local_rank`.

    rendezvous: where the ranks meet, as `init_process_group` takes it; torchrun's by default.
    """
    device = torch.device("cpu")
    if "nccl" in backend:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=float(os.environ.get("ZERO_REF_TIMEOUT", 600)))
    dist.init_process_group(backend, timeout=timeout, **rendezvous)
    return device


def main(rank: int, world_size: int, backend: str, port: int, jobs: Connection,
         control: Connection) -> None:
    """Run what comes through `jobs`, one after another, until the caller is gone.

    Answers ("line", text) for each printed line, then ("done", result) or ("failed", Failure).
    port: of the store through which the ranks find each other. control: where `where` asks.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everyone; the caller decides
    threading.Thread(target=_answer_or_end, args=(control,), daemon=True).start()
    if os.path.exists("/sys/class/net/lo"):  # all ranks are here: do not depend on the host's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, (cores or 1) // world_size))

    one_at_a_time = threading.Lock()  # a rank's threads may print, too

    def send(kind: str, value: Any) -> None:
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
                join(backend, rank, store=store, rank=rank, world_size=world_size)
                joined = True
            fn, args = pickle.loads(job)
            with redirect_stdout(lines):
                result = fn(*args)
            lines.close_line()
            send("done", result)
        except BaseException as error:
            lines.close_line()
            send("failed", errors.failure_of(error))


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


def _answer_or_end(control):
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
    os._exit(1)
