"""UDP sockets of peers inside a fixed range of ports, which a firewall or a container can let through.

Why by hand: aioice binds to port 0. A socket is one address and one port, so each peer takes a port on each address
of the machine.
"""

from __future__ import annotations

import errno
import random
import socket

from server.errors import ServerError

RETRY_AFTER_S = 5.0
ANY_PORT = (0, 0)


class PortsExhausted(ServerError):
    """Every UDP port of the range is in use."""

    status, code, retryable = 503, "udp_ports_exhausted", True


def bind_udp(address: str, ports: tuple[int, int] = ANY_PORT) -> socket.socket:
    """A bound, non-blocking UDP socket; (0, 0) leaves the port to the system.

    The range is walked from a random port on, so that a port just given up rests: its old peer may still send to it.

    Raises: PortsExhausted, if every port is in use; OSError, for an address that cannot be bound to.
    """
    low, high = ports
    size = high - low + 1
    start = random.randrange(size)
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    bound.setblocking(False)
    for step in range(size):
        try:
            bound.bind((address, low + (start + step) % size))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            bound.close()
            raise
        return bound
    bound.close()
    raise PortsExhausted(
        f"all {size} UDP ports {low}-{high} of {address} are in use; widen media.udp_ports (--udp-ports) or come back"
        " when a session has ended",
        retry_after_s=RETRY_AFTER_S,
    )
