"""The sockets that HTTP processes accept connections from, all on one port."""

import socket
import sys

from jaxdet.processors import usable_cpus


def default_processes() -> int:
    """One HTTP process for every four CPU cores that this process may use, at least 1 and at most 4."""
    return max(1, min(4, usable_cpus() // 4))


def bind(host: str, port: int, count: int) -> list[socket.socket]:
    """One socket for each process; port 0 takes a free one.

    The first one listens already, without which another server could still take the port while a model is loaded; who
    connects before processes accept waits.

    Linux spreads connections evenly over sockets that share a port (SO_REUSEPORT). Of one socket for all, whoever wakes
    first takes most of what comes at once; that was tried. Elsewhere they have one for all.

    Raises:
        OSError: the address is taken, or isn't this machine's.
        ValueError: there is no such port.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} must be in [0, {2**16 - 1}]; choose another")
    try:
        found = [_bind(host, port, share=False)]
        found[0].listen()
    except OSError as error:
        raise OSError(
            f"host {host!r} and port {port} can't be listened on ({error.strerror}); choose others"
        ) from None
    if sys.platform != "linux":
        return found * count
    # Set before it listens, it would let the first one join another server's port, or another one join.
    found[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return found + [_bind(host, found[0].getsockname()[1], share=True) for _ in range(count - 1)]


def _bind(host: str, port: int, *, share: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Where it listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def lose_patience(listener: socket.socket, seconds: float) -> None:
    """Lets the kernel end connections whose other side doesn't answer, or has no room for data, for so long.

    Connections get these options from the socket that listens. Without TCP_USER_TIMEOUT, which is Linux', only
    EventStream notices who takes no data, once the kernel's buffers are full.
    """
    whole = max(1, round(seconds / 4))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", whole),
        ("TCP_KEEPINTVL", whole),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", round(seconds * 1000)),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
