"""What serves other nodes and what asks them (``collectives.world.progress``), compiled: it runs without Python's lock.

What serves also looks, for a thread of this rank that has asked for something in the background, whether that is there.

Both call MPI by the addresses of its functions. Handles, pointers and ints are all passed as 64-bit integers, which the
calling conventions of x86-64 and ARM put where shorter ones are looked for.

A request is (kind, rank, address, n_bytes, address of tags, n_bytes of tags, address of a lock word, before, after,
tag of its messages, wire format, address of a block, n of its elements):

    SWAP    make the word ``after`` if it is ``before``, and answer what it was
    FETCH   send the two stretches of memory
    TAKE    the same, when the owner bits of the word are free and have been set to ``after``
    STORE   receive the two stretches, then the same as SWAP

Every one is answered by a header (the word as it was, how often it was found taken), FETCH and TAKE by data after it.
Data travel in pieces that MPIs send at once: larger messages are negotiated, and over TCP they then use only one
direction of the link at a time.

With a wire format (``native.wire``; 0: none) the first stretch is not the block but a buffer that belongs to it: TAKE
encodes the block into it before it sends, STORE decodes what it has received there and adds it to the block before it
swaps. Whoever has the lock has the buffer. What comes from a rank that has lost its lock meanwhile is not added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mpitrain.kernels.compile import cache
from mpitrain.kernels.native import wire
from mpitrain.kernels.native.lock_words import OWNER_MASK

SWAP, FETCH, ACQUIRE, STORE = 1, 2, 3, 4
KIND, RANK, DATA, DATA_BYTES, TAGS, TAGS_BYTES, WORD, BEFORE, AFTER, TAG, FORMAT, BLOCK, N_ELEMENTS = range(13)
REQUEST_WORDS: Final = 13
# Of a request under way: the request, how many pieces, how often the word was found taken, a header, where data begin.
STARTED, ACQUIRED, HEADER, BUFFER, STATE_WORDS = 13, 14, 15, 17, 18
HEADER_WORDS: Final = 2
PIECE_BYTES: Final = 60_000  # with a header below the 64 KiB at which both Open MPI and MPICH begin to negotiate
N_PIECES: Final = 128  # of a request under way at a time
N_SENT: Final = 8  # of those that are sent: what this rank itself asks for waits behind them
TAG_REQUEST: Final = 1
STORED: Final = 1 << 12  # added to the tag of what comes to be stored: both ends count their own requests
FUNCTIONS: Final = (
    "MPI_Testany",
    "MPI_Wait",
    "MPI_Send",
    "MPI_Isend",
    "MPI_Irecv",
    "MPI_Testall",
    "usleep",
    "MPI_Cancel",
    "poll",
    "read",
    "write",
)

# Words that the serving thread shares with the others of its rank.
STOP, ASLEEP, POLLING, TRUSTED = 0, 1, 2, 3  # POLLING: how many others look at what arrives for MPI
# Requests that another thread lets the serving one look at: what has become of them, how many, where they and their
# statuses are, and the file that is written to when it is over.
OUTCOME, N_WATCHED, WATCHED, WATCHED_STATUSES, WAKEUP_OF_WATCHED = 4, 5, 6, 7, 8
SHARED_WORDS: Final = 9
NONE, WATCHING, COMPLETE, CLOSED = 0, 1, 2, 3  # OUTCOME; an error code of MPI is negative

# Every look takes the core from whoever computes, and some of its caches. A nap is as long as nothing has happened: a
# wait takes twice as long as it must at the most, half as long again on average, and its looks are few.
SHORTEST_MICROSECONDS: Final = 20
LONGEST_MICROSECONDS: Final = 1000

# When nothing has happened for a while, it sleeps until the network has something for MPI, if that shows in the files
# that MPI itself waits for. Where it has shown before, they are trusted: it sleeps at once, and longer. It does not if
# another thread says that it looks, or if it waits for a lock, which no file announces; and never for ever: what
# another thread has read from the network, or MPI with the call before, is not announced either.
QUIET_MICROSECONDS: Final = 1000
SLEEP_MILLISECONDS, LONGEST_SLEEP_MILLISECONDS = 1, 5  # the longer one when it has slept that long in vain
MOST_IN_VAIN: Final = 64  # announcements of which nothing came: a file that is always readable would make it spin
# A message that comes between two sleeps is not announced either: it counts for half of one that is. Once there is
# enough trust, they are trusted until there is none left.
CREDIT, ENOUGH_TRUST, MOST_TRUST = 2, 4, 8

POLLS_PER_CALL: Final = 100  # of wait_for_requests
DRAIN_BYTES: Final = 64

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the C function there with a tuple of int64; what it returns is an int."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(_I32, [_I64] * len(values))
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), values), _I64)

    return types.int64(types.int64, arguments), generate


@intrinsic
def swap_at(typingctx: Any, address: Any, expected: Any, new: Any) -> Any:
    """The int64 at an address, which becomes new if it was expected: acquire and release."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire"), 0)

    return types.int64(types.int64, types.int64, types.int64), generate


def _array(element: Any) -> Any:
    """An intrinsic: the address of elements of this type as a pointer to them."""

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


floats_at, shorts_at, levels_at = (_array(element) for element in (types.float32, types.uint16, types.int8))

_SERVE: Final = f"""\
from numba import carray, njit
from mpitrain.kernels.native.atomics import compare_and_swap, load_acquire, store_release
from mpitrain.kernels.native.service import call, floats_at, levels_at, shorts_at, swap_at
{wire.conversions(*wire.FORMATS)}
@njit(nogil=True)
def encode(state):
    n = state[{N_ELEMENTS}]
    block, buffer = carray(floats_at(state[{BLOCK}]), n), carray(shorts_at(state[{BUFFER}]), n)
    if state[{FORMAT}] == {wire.FORMATS["float16"].code}:
        encode_float16(block, buffer)
    else:
        encode_bfloat16(block, buffer)

@njit(nogil=True)
def add(state):
    n, buffer = state[{N_ELEMENTS}], state[{BUFFER}]
    block = carray(floats_at(state[{BLOCK}]), n)
    if state[{FORMAT}] == {wire.FORMATS["int8"].code}:
        n_scales = (n + {wire.GROUP - 1}) // {wire.GROUP}
        add_int8(carray(floats_at(buffer), n_scales), carray(levels_at(buffer + 4 * n_scales), n), block)
    elif state[{FORMAT}] == {wire.FORMATS["float16"].code}:
        add_float16(carray(shorts_at(buffer), n), block)
    else:
        add_bfloat16(carray(shorts_at(buffer), n), block)

@njit(nogil=True)
def post(functions, comm, byte, state, pieces, request_bytes):
    n, code = 0, 0
    most = {N_PIECES} if state[{KIND}] == {STORE} else {N_SENT}
    while code == 0 and n < most and state[{DATA_BYTES}] + state[{TAGS_BYTES}] > 0:
        k = {DATA} if state[{DATA_BYTES}] > 0 else {TAGS}
        size = min(state[k + 1], {PIECE_BYTES})
        at = pieces + n * request_bytes
        if state[{KIND}] == {STORE}:
            code = call(functions[4], (state[k], size, byte, state[{RANK}], {STORED} + state[{TAG}], comm, at))
        else:
            code = call(functions[3], (state[k], size, byte, state[{RANK}], state[{TAG}], comm, at))
        state[k] += size
        state[k + 1] -= size
        n += 1
    state[{STARTED}] = n
    return code

@njit(nogil=True)
def answer(functions, comm, byte, state, header, found):
    state[{HEADER}] = found
    state[{HEADER} + 1] = state[{ACQUIRED}]
    return call(functions[2], (header, 8 * {HEADER_WORDS}, byte, state[{RANK}], state[{TAG}], comm))

SIGNATURE = (
    "int64(int64[::1], int64, int64, int64, int64, "
    "int64[::1], int32[::1], int64[:, ::1], int64[:, ::1], int64[::1])"
)
def serve(functions, comm, byte, request_bytes, n_polls, shared, flag, requests, states, memory):
    at_flag, at_requests, at_statuses, at_pieces, at_states = memory[0], memory[1], memory[2], memory[3], memory[4]
    at_files, n_files, wakeup, at_drain = memory[5], memory[6], memory[7], memory[8]
    n_ranks = requests.shape[0]
    waited = {QUIET_MICROSECONDS}
    slept, announced, woken, trust = 0, 0, 0, 0
    polls, in_vain, trusted = 0, 0, 0
    n_served, code = 0, 0
    at_next = at_pieces + states.shape[0] * {N_PIECES} * request_bytes
    for rank in range(n_ranks):
        here, at = at_requests + 8 * {REQUEST_WORDS} * rank, at_next + rank * request_bytes
        code = code or call(functions[4], (here, 8 * {REQUEST_WORDS}, byte, rank, {TAG_REQUEST}, comm, at))
    asks = -1
    # To stop is to refuse what is handed over from now on: whatever is being watched is watched to its end.
    while code == 0 and (
        load_acquire(shared, {STOP}) == 0 or compare_and_swap(shared, {OUTCOME}, {NONE}, {CLOSED}) != {NONE}
    ):
        free, n_busy, n_locks, happened, came = -1, 0, 0, 0, 0
        for slot in range(states.shape[0]):
            state = states[slot]
            if state[{KIND}] == 0:
                free = slot
                continue
            n_busy += 1
            header = at_states + 8 * ({STATE_WORDS} * slot + {HEADER})
            pieces = at_pieces + slot * {N_PIECES} * request_bytes
            if state[{KIND}] == {ACQUIRE}:
                word = swap_at(state[{WORD}], 0, 0)
                if word & {OWNER_MASK} != 0 or swap_at(state[{WORD}], word, word | state[{AFTER}]) != word:
                    state[{ACQUIRED}] += 1
                    n_locks += 1
                    continue
                if state[{FORMAT}] != 0:
                    encode(state)
                happened = 1
                code = code or answer(functions, comm, byte, state, header, word)
                state[{KIND}] = {FETCH}
                code = code or post(functions, comm, byte, state, pieces, request_bytes)
            code = code or call(functions[5], (state[{STARTED}], pieces, at_flag, at_statuses))
            if code != 0:
                break
            if flag[0] != 0:
                happened = 1
                if state[{DATA_BYTES}] + state[{TAGS_BYTES}] > 0:
                    code = post(functions, comm, byte, state, pieces, request_bytes)
                else:
                    if state[{KIND}] == {STORE}:
                        came = 1
                        if state[{FORMAT}] != 0 and swap_at(state[{WORD}], 0, 0) == state[{BEFORE}]:
                            add(state)
                        found = swap_at(state[{WORD}], state[{BEFORE}], state[{AFTER}])
                        code = answer(functions, comm, byte, state, header, found)
                    state[{KIND}] = 0
                    free = slot
                    n_served += 1
        if asks < 0:
            flag[0] = 0
            code = code or call(functions[0], (n_ranks, at_next, at_flag + 4, at_flag, at_statuses))
            if flag[0] != 0:
                asks = flag[1]
                happened, came = 1, 1
        if code != 0:
            break
        if load_acquire(shared, {OUTCOME}) == {WATCHING}:
            flag[0] = 0
            theirs = call(functions[5], (shared[{N_WATCHED}], shared[{WATCHED}], at_flag, shared[{WATCHED_STATUSES}]))
            if theirs != 0 or flag[0] != 0:
                happened, came = 1, 1
                store_release(shared, {OUTCOME}, -theirs if theirs != 0 else {COMPLETE})
                call(functions[10], (shared[{WAKEUP_OF_WATCHED}], at_drain, 1))
            else:
                n_busy += 1
        polls += 1
        if happened != 0:
            if slept != 0 and came != 0:
                trust = min(trust + {CREDIT}, {MOST_TRUST}) if woken != 0 else max(trust - 1, 0)
                trusted = 1 if trust >= {ENOUGH_TRUST} or (trusted != 0 and trust > 0) else 0
                store_release(shared, {TRUSTED}, trusted)
            # Look again before it rests: the call that brought this may have brought more.
            waited, slept, woken, polls, in_vain = 0, 0, 0, 0, in_vain // 2
        if asks >= 0 and free >= 0:
            state = states[free]
            state[{ACQUIRED}] = 0
            for k in range({REQUEST_WORDS}):
                state[k] = requests[asks, k]
            state[{BUFFER}] = state[{DATA}]
            here, at = at_requests + 8 * {REQUEST_WORDS} * asks, at_next + asks * request_bytes
            code = call(functions[4], (here, 8 * {REQUEST_WORDS}, byte, asks, {TAG_REQUEST}, comm, at))
            asks = -1
            header = at_states + 8 * ({STATE_WORDS} * free + {HEADER})
            if state[{KIND}] == {SWAP}:
                found = swap_at(state[{WORD}], state[{BEFORE}], state[{AFTER}])
                code = code or answer(functions, comm, byte, state, header, found)
                state[{KIND}] = 0
            elif state[{KIND}] != {ACQUIRE}:
                if state[{KIND}] == {FETCH}:
                    code = code or answer(functions, comm, byte, state, header, 0)
                pieces = at_pieces + free * {N_PIECES} * request_bytes
                code = code or post(functions, comm, byte, state, pieces, request_bytes)
            polls = 0
        elif polls < n_polls:
            continue
        elif (
            n_locks != 0
            or load_acquire(shared, {POLLING}) != 0
            or (
                (trusted == 0 or in_vain > {MOST_IN_VAIN})
                and (waited < {QUIET_MICROSECONDS} or announced != 0 or n_busy != 0)
            )
        ):
            nap = min(max(waited, {SHORTEST_MICROSECONDS}), {LONGEST_MICROSECONDS})
            call(functions[6], (nap,))
            # What was announced may take MPI more than one wake to make a message of.
            waited, announced, slept, polls = waited + nap, 0, woken, 0
        else:
            timeout = {SLEEP_MILLISECONDS}
            if trusted != 0 and n_busy == 0 and waited >= 1000 * {SLEEP_MILLISECONDS}:
                compare_and_swap(shared, {ASLEEP}, 0, 1)  # before the check of who polls: who comes later rings
                if load_acquire(shared, {POLLING}) == 0:
                    timeout = {LONGEST_SLEEP_MILLISECONDS}
            announced = call(functions[8], (at_files, n_files, timeout))
            store_release(shared, {ASLEEP}, 0)
            slept, woken, polls = 1, 0, 0
            if announced == 0:
                waited, in_vain = waited + 1000 * timeout, 0
            elif call(functions[9], (wakeup, at_drain, {DRAIN_BYTES})) > 0:
                waited, announced, slept = 0, 0, 0
            else:
                woken = 1 if announced > 0 and in_vain <= {MOST_IN_VAIN} else 0
                in_vain += 1
    if code != 0:
        return -code
    for rank in range(n_ranks):
        if rank != asks:
            call(functions[7], (at_next + rank * request_bytes,))
            call(functions[1], (at_next + rank * request_bytes, at_statuses))
    return n_served
"""


_ASK: Final = f"""\
from mpitrain.kernels.native.service import call

SIGNATURE = "int64(int64[::1], int64, int64, int64, int64, int64[::1], int64[::1], int64[::1], uint8[::1])"
def ask(functions, comm, byte, request_bytes, rank, words, stretches, header, requests):
    at, tag = requests.ctypes.data, words[{TAG}]
    stores = words[{KIND}] == {STORE}
    code = call(functions[4], (header.ctypes.data, 8 * {HEADER_WORDS}, byte, rank, tag, comm, at))
    n = 1
    for turn in range(2):
        if (turn == 0) == stores:  # what comes is expected before it is asked for, what goes follows the request
            code = code or call(
                functions[3],
                (words.ctypes.data, 8 * {REQUEST_WORDS}, byte, rank, {TAG_REQUEST}, comm, at + n * request_bytes),
            )
            n += 1
            continue
        for k in (0, 2):
            here, left = stretches[k], stretches[k + 1]
            while left > 0:
                size = min(left, {PIECE_BYTES})
                if stores:
                    code = code or call(
                        functions[3], (here, size, byte, rank, {STORED} + tag, comm, at + n * request_bytes)
                    )
                else:
                    code = code or call(functions[4], (here, size, byte, rank, tag, comm, at + n * request_bytes))
                n += 1
                here += size
                left -= size
    return n if code == 0 else -code
"""

_WAIT_FOR_REQUESTS: Final = f"""\
from mpitrain.kernels.native.service import call

SIGNATURE = "int64(int64[::1], int64, uint8[::1], uint8[::1], int32[::1], int64, int64[::1], int64, int64, int64)"
def wait_for_requests(functions, n, requests, statuses, flag, n_polls, waited, n_spins, shortest, longest):
    for _ in range({POLLS_PER_CALL}):
        code = call(functions[5], (n, requests.ctypes.data, flag.ctypes.data, statuses.ctypes.data))
        if code != 0:
            return -code
        if flag[0] != 0:
            return 1
        waited[0] += 1
        if waited[0] < n_spins or waited[0] % n_polls != 0:
            continue
        nap = min(max(waited[1], shortest), longest)
        call(functions[6], (nap,))
        waited[1] += nap
    return 0
"""


def n_messages(n_bytes: int, n_bytes_of_tags: int) -> int:
    """How many requests of MPI ``ask`` needs room for."""
    return 2 + sum(-(-n // PIECE_BYTES) for n in (n_bytes, n_bytes_of_tags))


@functools.cache
def ask() -> Callable[..., int]:
    """``ask(functions, comm, byte, request_bytes, rank, words, stretches, header, requests)``: ask ``serve`` of a rank.

    ``words`` are the request, ``stretches`` (4,) the addresses and bytes of the memory here that is sent or received,
    ``header`` where the answer goes, ``requests`` room for ``n_messages`` MPI_Requests: the first is the header's. All
    of it belongs to MPI until they are complete. Returns how many there are, or an error code of MPI, negative.
    """
    return cache.compiled("ask", "words", _ASK)


@functools.cache
def wait_for_requests() -> Callable[..., int]:
    """Wait for n requests of MPI; 1 when they are complete.

    ``wait_for_requests(functions, n, requests, statuses, flag, n_polls, waited, n_spins, shortest, longest)``

    It looks ``n_spins`` times, then ``n_polls`` times between two naps of microseconds, and returns 0 after some time,
    so that Python can handle its signals: ``waited`` (2,), zeros at first, says how to go on. An error code of MPI is
    returned negative.
    """
    return cache.compiled("wait_for_requests", "words", _WAIT_FOR_REQUESTS)


@functools.cache
def serve() -> Callable[..., int]:
    """``serve(functions, comm, byte, request_bytes, n_polls, shared, flag, requests, states, memory)``: until told.

    ``functions`` are the addresses of FUNCTIONS, ``comm`` and ``byte`` MPI's handles, ``request_bytes`` the size of an
    MPI_Request, ``n_polls`` how often it looks between two naps, ``shared`` (SHARED_WORDS,) zeros (it ends when STOP is
    not and nothing is watched), ``flag`` (2,) and ``requests`` (ranks, REQUEST_WORDS) room, ``states`` (slots,
    STATE_WORDS) zeros, ``memory`` the addresses of ``flag``, ``requests``, N_PIECES statuses, slots * N_PIECES + ranks
    MPI_Requests, ``states`` and structs pollfd, how many these are, one of their files that is written to when there is
    something to do, and the address of ROOM_BYTES. A request that waits for a lock has a slot until the lock is free:
    there must be more slots than requests of that kind. Every rank has a receive of its own: MPICH's from any source
    can stay incomplete for ever when two threads are in MPI. Returns how many requests were served. After an error of
    MPI nothing can be relied on: its code is returned at once, negative, and the memory must stay.
    """
    return cache.compiled("serve", "words", _SERVE)
