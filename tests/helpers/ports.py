"""Ports for servers that a test starts."""

import random
import socket


def free_port() -> int:
    """Below those that the kernel gives to outgoing connections, which could take it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
