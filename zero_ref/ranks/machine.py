"""A rank that torchrun has started, on one of several machines: whom it ends with, and over which
network interface it talks."""

import ctypes
import os
import signal
import socket
import struct
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_SIOCGIFADDR = 0x8915


def end_with_parent() -> None:
    """If torchrun is killed, this process is, too. By itself it would train on, unseen. (On Linux:
    prctl(2).)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def talk_towards(address: str) -> None:
    """Let gloo use the interface that leads to the machine of rank 0. By itself it takes the one
    that has this machine's name, which may be the loopback. An interface that is named in the
    environment stays."""
    if sys.platform != "linux":
        return
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # of UDP: nothing is sent
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _address_of(name, probe) == own:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _address_of(interface, probe):
    import fcntl  # where it exists

    with suppress(OSError):  # it has none
        found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(found[20:24])
