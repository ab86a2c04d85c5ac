"""Kernels that are forked from the server that forks ranks, which has imported torch already.

A kernel that starts as a program of its own imports torch, and the fork server of the ranks that it
launches does so again, which takes longer than what most notebooks do. Grading uses it, and tests:

    JUPYTER_DEFAULT_PROVISIONER_NAME=forked-with-torch pytest --nbval notebooks/
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, parent_process
from multiprocessing.connection import wait
from typing import Any

from jupyter_client.provisioning import LocalProvisioner

from ..ranks import pool


class ForkedKernel(LocalProvisioner):
    """Starts kernels for a jupyter_client.KernelManager."""

    process: Any

    async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
        self.process = _Process(cmd, options.get("cwd"), options["env"])
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class _Process:
    """A process of multiprocessing, as the subprocess.Popen that a LocalProvisioner asks."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], folder: str | None, environment: dict[str, str]):
        arguments = command[command.index("ipykernel_launcher") + 1 :]
        self.process = pool.start(_run, (arguments, folder, environment), "kernel")
        self.pid: Any = self.process.pid
        self.kill, self.terminate = self.process.kill, self.process.terminate

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _run(arguments: Sequence[str], folder: str | None, environment: dict[str, str]) -> None:
    """Called in the new process: be a kernel."""
    _use_the_same_server()
    os.setpgid(0, 0)  # a signal reaches what a cell has started, too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the fork server does not want it
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.environ["JPY_PARENT_PID"] = str(os.getppid())
    if "" not in sys.path:  # if the caller was started with -P, as grading is
        sys.path.append("")
    if folder:
        os.chdir(folder)
    from ipykernel.kernelapp import launch_new_instance  # it looks at the environment

    launch_new_instance(list(arguments))


def _use_the_same_server():
    """The kernel's ranks are forked from it, too. (So says the documentation of ensure_running, but
    a process that the server has forked starts another one.)"""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if sys.version_info < (3, 14) and server._forkserver_address:  # later it wants to know a key
        forkserver.ensure_running = server.ensure_running = lambda: None


def _end_with_the_caller():
    wait([parent_process().sentinel])  # type: ignore[union-attr]
    os._exit(1)
