"""What a process has sent, as the kernel counts it: nothing that runs there can say otherwise."""

import ctypes
import os
import socket
import struct
from contextlib import suppress

_PIDFD_GETFD = 438  # a system call of Linux 5.6, which Python has no name for
_BYTES_SENT = 200  # where struct tcp_info has tcpi_bytes_sent


def tcp_bytes_sent(pid: int) -> int | None:
    """Bytes that a process which this one has started has sent over the TCP connections that it has
    now. None where the kernel does not say, or not to us (pidfd_getfd(2), tcp(7): Linux 5.6)."""
    if not hasattr(os, "pidfd_open"):
        return None
    total, pidfd = 0, None
    try:
        pidfd = os.pidfd_open(pid)
        for name in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{name}"
            with suppress(FileNotFoundError):  # it was closed meanwhile
                if os.readlink(link).startswith("socket:"):
                    total += _sent_over(pidfd, int(name))
    except (OSError, struct.error):
        return None
    finally:
        if pidfd is not None:
            os.close(pidfd)
    return total


def _sent_over(pidfd, number):
    copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, number, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(fileno=copy) as connection:
        if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
            return 0
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT + 8)
        return struct.unpack_from("Q", info, _BYTES_SENT)[0]
