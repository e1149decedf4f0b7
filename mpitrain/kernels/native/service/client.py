"""The client: sends a request to the server of another rank and waits for MPI requests, in compiled code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from mpitrain.kernels.compile import cache
from mpitrain.kernels.native.service.protocol import (
    HEADER_WORDS,
    IRECV,
    ISEND,
    KIND,
    PIECE_BYTES,
    STORE,
    STORED,
    TAG,
    TAG_REQUEST,
    TESTALL,
    USLEEP,
)

POLLS_PER_CALL: Final = 100  # of wait_for_requests

_ASK: Final = f"""\
from mpitrain.kernels.native.service.foreign import call

SIGNATURE = "int64(int64[::1], int64, int64, int64, int64, int64[::1], int64[::1], int64[::1], int64[::1], uint8[::1])"
def ask(functions, comm, byte, request_bytes, rank, words, message, stretches, header, requests):
    at, tag = requests.ctypes.data, words[{TAG}]
    stores = words[{KIND}] == {STORE}
    code = call(functions[{IRECV}], (header.ctypes.data, 8 * {HEADER_WORDS}, byte, rank, tag, comm, at))
    n = 1
    for turn in range(2):
        if (turn == 0) == stores:  # receives are posted before the request, sends follow it
            if message.size > 0:
                code = code or call(
                    functions[{ISEND}],
                    (message.ctypes.data, 8 * message.size, byte, rank, {TAG_REQUEST}, comm, at + n * request_bytes),
                )
                n += 1
            continue
        for k in (0, 2):
            here, left = stretches[k], stretches[k + 1]
            while left > 0:
                size = min(left, {PIECE_BYTES})
                if stores:
                    code = code or call(
                        functions[{ISEND}], (here, size, byte, rank, {STORED} + tag, comm, at + n * request_bytes)
                    )
                else:
                    code = code or call(functions[{IRECV}], (here, size, byte, rank, tag, comm, at + n * request_bytes))
                n += 1
                here += size
                left -= size
    return n if code == 0 else -code
"""

_WAIT_FOR_REQUESTS: Final = f"""\
from mpitrain.kernels.native.service.foreign import call

SIGNATURE = "int64(int64[::1], int64, uint8[::1], uint8[::1], int32[::1], int64, int64[::1], int64, int64, int64)"
def wait_for_requests(functions, n, requests, statuses, flag, n_polls, waited, n_spins, shortest, longest):
    for _ in range({POLLS_PER_CALL}):
        code = call(functions[{TESTALL}], (n, requests.ctypes.data, flag.ctypes.data, statuses.ctypes.data))
        if code != 0:
            return -code
        if flag[0] != 0:
            return 1
        waited[0] += 1
        if waited[0] < n_spins or waited[0] % n_polls != 0:
            continue
        nap = min(max(waited[1], shortest), longest)
        call(functions[{USLEEP}], (nap,))
        waited[1] += nap
    return 0
"""

_SEND: Final = f"""\
from mpitrain.kernels.native.service.foreign import call

SIGNATURE = "int64(int64[::1], int64, int64, int64, int64[::1], uint8[::1])"
def send(functions, comm, byte, rank, message, request):
    at = request.ctypes.data
    return -call(
        functions[{ISEND}], (message.ctypes.data, 8 * message.size, byte, rank, {TAG_REQUEST}, comm, at)
    )
"""

_TEST_REQUESTS: Final = f"""\
from mpitrain.kernels.native.service.foreign import call

SIGNATURE = "int64(int64[::1], int64, uint8[::1], uint8[::1], int32[::1], int64)"
def test_requests(functions, n, requests, statuses, flag, n_polls):
    for _ in range(n_polls):
        code = call(functions[{TESTALL}], (n, requests.ctypes.data, flag.ctypes.data, statuses.ctypes.data))
        if code != 0:
            return -code
        if flag[0] != 0:
            return 1
    return 0
"""


@functools.cache
def ask() -> Callable[..., int]:
    """Return the compiled function that sends a request to the server of a rank.

    ``ask(functions, comm, byte, request_bytes, rank, words, message, stretches, header, requests)``

    The first four arguments are as in ``server.serve``, and ``rank`` is that of the server. ``words`` is the request.
    ``message`` contains this request and maybe others. If it is empty, another message will contain the request, and
    the function only posts the receives of the answer. ``stretches`` (4,) are the addresses and sizes of the local
    memory to send or to receive. ``header`` receives the answer. ``requests`` has room for ``n_messages`` MPI_Requests,
    the first of which is that of the header. MPI uses all this memory until the requests complete. The result is the
    number of requests, or a negative MPI error code.
    """
    return cache.compiled("ask", "words", _ASK)


@functools.cache
def send() -> Callable[..., int]:
    """Return the compiled function that sends a message to the server of a rank.

    ``send(functions, comm, byte, rank, message, request)``

    ``message`` contains requests whose receives ``ask`` has posted. ``request`` has room for an MPI_Request. The result
    is 0 or a negative MPI error code.
    """
    return cache.compiled("send", "words", _SEND)


@functools.cache
def wait_for_requests() -> Callable[..., int]:
    """Return the compiled function that waits for n MPI requests.

    ``wait_for_requests(functions, n, requests, statuses, flag, n_polls, waited, n_spins, shortest, longest)``

    It first polls ``n_spins`` times without sleeping. Then it sleeps for ``shortest`` to ``longest`` microseconds after
    every ``n_polls`` polls. The result is 1 if all requests are complete, or a negative MPI error code. It is 0
    after some time, so that Python can handle signals; call again then. ``waited`` (2,), initially zeros, keeps the
    state between calls.
    """
    return cache.compiled("wait_for_requests", "words", _WAIT_FOR_REQUESTS)


@functools.cache
def test_requests() -> Callable[..., int]:
    """Return the compiled function that polls MPI ``n_polls`` times for n requests.

    ``test_requests(functions, n, requests, statuses, flag, n_polls)``

    The result is 1 if all requests are complete, 0 if they are not, or a negative MPI error code.
    """
    return cache.compiled("test_requests", "words", _TEST_REQUESTS)
