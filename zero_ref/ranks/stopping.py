"""SIGTERM, which schedulers and torchrun send before they end a process: the ranks stop together.

A rank that computes hears of it at its next step. One that is stuck says where.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from .. import comm
from . import errors

STUCK = 5  # seconds after the signal


class Stop:
    def __init__(self) -> None:
        self.asked = False  # whether this rank has got the signal

    def agreed(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether some rank has: the same answer on all of them, so that they stop at one step.
        group: who is asked, by default all ranks."""
        return any(comm.all_gather_object(self.asked, group or dist.group.WORLD, phase="stop"))


inside: list[Stop] = []  # one for each on_sigterm() that this process is in


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Inside, SIGTERM does not end this process: `agreed()` of what it yields says, on every rank,
    whether the signal has come to one. Processes that are forked inside, such as a DataLoader's
    workers, get it too, and obey this process alone: they are needed until the ranks stop.

    Raises ValueError in another thread than the main one.
    """
    stop, over, main = Stop(), threading.Event(), threading.get_ident()
    wake, written = os.pipe()
    os.set_blocking(written, False)

    def asked(*_):
        for each in (stop, *inside):  # it may come before this one is in the list
            each.asked = True

    def watch():
        """The handler waits for the main thread, and this thread does not."""
        while os.read(wake, 1)[0] not in (signal.SIGTERM, 0):  # other signals come by here, too
            pass
        if not over.wait(STUCK):
            frames = traceback.walk_stack(sys._current_frames()[main])
            stack = traceback.StackSummary.extract(frames)
            stack.reverse()
            theirs = errors.outside_libraries(stack)[-4:]
            print(f"rank {dist.get_rank()} was asked to stop {STUCK} s ago and is still at\n" +
                  errors.formatted(traceback.StackSummary(theirs)), file=sys.stderr, flush=True)

    handler = signal.signal(signal.SIGTERM, asked)  # refused in other threads than the main one
    inside.append(stop)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    descriptor = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        over.set()
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        inside.remove(stop)
        os.write(written, b"\0")
        watching.join()
        os.close(written)
        os.close(wake)


def _obey_the_parent_alone() -> None:
    if not inside:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()


with suppress(AttributeError):  # where there is no fork
    os.register_at_fork(after_in_child=_obey_the_parent_alone)
