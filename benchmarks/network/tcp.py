"""The capacity of a link between two ranks with plain sockets, without MPI: the reference of all other figures."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

PIECE_BYTES = 2**18
SETTLE_SECONDS = 0.1  # slow start, and the burst that a shaped link lets through


def connect(listener: socket.socket | None, address: tuple[str, int]) -> socket.socket:
    """Return one end of a connection; the end with a listener accepts."""
    connection = listener.accept()[0] if listener else socket.create_connection(address)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def send_for(connection: socket.socket, seconds: float) -> None:
    """Send as much as possible for a time, then close the sending side."""
    piece, end = bytes(PIECE_BYTES), time.perf_counter() + seconds
    while time.perf_counter() < end:
        connection.sendall(piece)
    connection.shutdown(socket.SHUT_WR)


def receive_all(connection: socket.socket) -> float:
    """Return the received bytes per second until the other end closes; 0 if it sent next to nothing."""
    buffer = bytearray(PIECE_BYTES)
    n_bytes, began, last = 0, 0.0, 0.0
    first = time.perf_counter()
    while n_now := connection.recv_into(buffer):
        last = time.perf_counter()
        if began:
            n_bytes += n_now
        elif last - first > SETTLE_SECONDS:
            began = last
    return n_bytes / (last - began) if n_bytes else 0.0


def bandwidth(connection: socket.socket, seconds: float, *, sends: bool) -> float:
    """Return the received bytes per second, while this end sends or not. The other end calls it as well."""
    if not sends:
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)
    sender = threading.Thread(target=send_for, args=(connection, seconds))
    sender.start()
    received = receive_all(connection)
    sender.join()
    return received


class Exchanges:
    """Background transfers of as many bytes out as in: an exchange without MPI and locks.

    Args:
        connection: The other end makes exchanges as well.
        n_bytes: Each way.
    """

    def __init__(self, connection: socket.socket, n_bytes: int) -> None:
        self._connection, self._bytes = connection, bytes(n_bytes)
        self._buffer = bytearray(PIECE_BYTES)
        self._pool = ThreadPoolExecutor(2)
        self._under_way: list[Future[None]] = []

    def _receive(self) -> None:
        missing = len(self._bytes)
        while missing:
            n_now = self._connection.recv_into(self._buffer, min(missing, PIECE_BYTES))
            if not n_now:
                raise ConnectionError("the peer closed the connection")
            missing -= n_now

    def start(self) -> None:
        """Start a transfer when the previous one is complete."""
        self.drain()
        self._under_way = [
            self._pool.submit(self._connection.sendall, self._bytes),
            self._pool.submit(self._receive),
        ]

    def drain(self) -> None:
        """Wait until the last transfer is complete."""
        for future in self._under_way:
            future.result()

    def stop(self) -> None:
        """Complete the last transfer and end the threads."""
        self.drain()
        self._pool.shutdown()


def round_trip(connection: socket.socket, n_times: int, *, first: bool) -> float:
    """Return the median seconds from sending one byte until its answer. The other end calls it as well."""
    seconds = np.empty(n_times)
    for k in range(n_times):
        began = time.perf_counter()
        if first:
            connection.sendall(b"!")
        connection.recv(1)
        if not first:
            connection.sendall(b"!")
        seconds[k] = time.perf_counter() - began
    return float(np.median(seconds))


def visit(connection: socket.socket, n_bytes: int, *, first: bool) -> float:
    """Return the seconds in which the first end asks for ``n_bytes``, sends them back as they come, and is answered.

    This is an exchange without MPI, locks and arithmetic. The other end calls it as well.
    """
    buffer, missing = bytearray(PIECE_BYTES), n_bytes
    began = time.perf_counter()
    if first:
        connection.sendall(b"?")
    else:
        connection.recv(1)
        sender = threading.Thread(target=connection.sendall, args=(bytes(n_bytes),))
        sender.start()
    while missing:
        n_now = connection.recv_into(buffer, min(missing, PIECE_BYTES))
        if not n_now:
            raise ConnectionError("the peer closed the connection")
        missing -= n_now
        if first:
            connection.sendall(memoryview(buffer)[:n_now])
    if first:
        connection.recv(1)
    else:
        sender.join()
        connection.sendall(b"!")
    return time.perf_counter() - began
