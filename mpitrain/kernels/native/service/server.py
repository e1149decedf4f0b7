"""The server: serves the requests of other ranks and watches MPI requests for its own rank, in compiled code.

The loop polls MPI, the lock words that requests wait for, and the watched requests. Every poll takes the core, and
part of its caches, from the thread that computes. After each event the loop therefore backs off: a sleep is as long as
the time since the last event. A message that arrives a time t after the last event therefore waits for at most t, and
on average for half a sleep.

When nothing has happened for QUIET_MICROSECONDS, the loop sleeps in ``poll`` on the files that MPI itself waits for,
if messages show in these files. Once they have announced enough messages, they are *trusted*: the loop then sleeps at
once, and longer. It does not sleep there while another thread polls MPI or while a request waits for a lock, which no
file announces. It never sleeps for ever: data that another thread has read from the network, or that the previous call
into MPI has read, are not announced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from mpitrain.kernels.compile import cache
from mpitrain.kernels.native import wire
from mpitrain.kernels.native.lock_words import OWNER_MASK
from mpitrain.kernels.native.service.protocol import (
    ACQUIRE,
    ACQUIRED,
    AFTER,
    ASLEEP,
    BEFORE,
    BLOCK,
    BUFFER,
    CANCEL,
    CLOSED,
    COMPLETE,
    DATA,
    DATA_BYTES,
    DRAIN_BYTES,
    FETCH,
    FOLLOWING,
    FORMAT,
    HEADER,
    HEADER_WORDS,
    IRECV,
    ISEND,
    KIND,
    N_ELEMENTS,
    N_PIECES,
    N_SENT,
    N_WATCHED,
    NONE,
    OUTCOME,
    PIECE_BYTES,
    POLL,
    POLLING,
    RANK,
    READ,
    REQUEST_WORDS,
    SEND,
    STARTED,
    STATE_WORDS,
    STOP,
    STORE,
    STORED,
    SURVIVES,
    SWAP,
    TAG,
    TAG_REQUEST,
    TAGS,
    TAGS_BYTES,
    TESTALL,
    TESTANY,
    TRUSTED,
    USLEEP,
    WAIT,
    WAKEUP_OF_WATCHED,
    WATCHED,
    WATCHED_STATUSES,
    WATCHING,
    WORD,
    WRITE,
)

SHORTEST_MICROSECONDS: Final = 20
LONGEST_MICROSECONDS: Final = 1000

QUIET_MICROSECONDS: Final = 1000
SLEEP_MILLISECONDS, LONGEST_SLEEP_MILLISECONDS = 1, 5  # the longer one after sleeping for the shorter one in vain
MOST_IN_VAIN: Final = 64  # announcements without a message: a file that is always readable must not make the loop spin
# Trust counts the announced messages. A message between two sleeps is not announced; it costs half the credit of one
# that is. Files are trusted from ENOUGH_TRUST on, until no trust is left.
CREDIT, ENOUGH_TRUST, MOST_TRUST = 2, 4, 8

ERRORS_OF_A_DEATH: Final = 8  # of receives, at most; more of them have another cause

_SERVE: Final = f"""\
from numba import carray, njit
from mpitrain.kernels.native.atomics import compare_and_swap, load_acquire, store_release
from mpitrain.kernels.native.service.foreign import call, floats_at, levels_at, shorts_at, swap_at
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
            code = call(functions[{IRECV}], (state[k], size, byte, state[{RANK}], {STORED} + state[{TAG}], comm, at))
        else:
            code = call(functions[{ISEND}], (state[k], size, byte, state[{RANK}], state[{TAG}], comm, at))
        state[k] += size
        state[k + 1] -= size
        n += 1
    state[{STARTED}] = n
    return code

@njit(nogil=True)
def answer(functions, comm, byte, state, header, found):
    state[{HEADER}] = found
    state[{HEADER} + 1] = state[{ACQUIRED}]
    return call(functions[{SEND}], (header, 8 * {HEADER_WORDS}, byte, state[{RANK}], state[{TAG}], comm))

SIGNATURE = (
    "int64(int64[::1], int64, int64, int64, int64, "
    "int64[::1], int32[::1], int64[:, ::1], int64[:, ::1], int64[::1], int64[::1], int64[::1])"
)
def serve(functions, comm, byte, request_bytes, n_polls, shared, flag, requests, states, slots, dead, memory):
    at_flag, at_requests, at_statuses, at_pieces, at_states = memory[0], memory[1], memory[2], memory[3], memory[4]
    at_files, n_files, wakeup, at_drain = memory[5], memory[6], memory[7], memory[8]
    n_ranks, survives = requests.shape[0], shared[{SURVIVES}]
    waited = {QUIET_MICROSECONDS}
    slept, announced, woken, trust = 0, 0, 0, 0
    polls, in_vain, trusted = 0, 0, 0
    n_served, n_used, n_failed, code = 0, 0, 0, 0
    at_next = at_pieces + states.shape[0] * {N_PIECES} * request_bytes
    longest = 8 * requests.shape[1]  # bytes of a message of requests
    for rank in range(n_ranks):
        here, at = at_requests + longest * rank, at_next + rank * request_bytes
        code = code or call(functions[{IRECV}], (here, longest, byte, rank, {TAG_REQUEST}, comm, at))
    asks, first, n_left = -1, 0, 0  # the sender of a message, its next request, and how many follow that
    # Stopping refuses new requests to watch; those already watched are watched to their end.
    while code == 0 and (
        load_acquire(shared, {STOP}) == 0 or compare_and_swap(shared, {OUTCOME}, {NONE}, {CLOSED}) != {NONE}
    ):
        n_busy, n_locks, happened, came = n_used, 0, 0, 0
        turn = 0
        while turn < n_used:  # slots[:n_used] are in use
            slot = slots[turn]
            state = states[slot]
            turn += 1
            header = at_states + 8 * ({STATE_WORDS} * slot + {HEADER})
            pieces = at_pieces + slot * {N_PIECES} * request_bytes
            if state[{KIND}] == {ACQUIRE} and dead[state[{RANK}]] == 0:
                word = swap_at(state[{WORD}], 0, 0)
                owner, free = word & {OWNER_MASK}, word & ~{OWNER_MASK}
                keeps = owner != 0 and dead[owner - 1] == 0 and (owner != state[{AFTER}] or state[{BEFORE}] == 0)
                if keeps or swap_at(state[{WORD}], word, free | state[{AFTER}]) != word:
                    state[{ACQUIRED}] += 1
                    n_locks += 1
                    continue
                if state[{FORMAT}] != 0:
                    encode(state)
                happened = 1
                code = code or answer(functions, comm, byte, state, header, free)
                state[{KIND}] = {FETCH}
                code = code or post(functions, comm, byte, state, pieces, request_bytes)
            if state[{KIND}] != {ACQUIRE}:
                code = code or call(functions[{TESTALL}], (state[{STARTED}], pieces, at_flag, at_statuses))
            if survives != 0 and (code != 0 or state[{KIND}] == {ACQUIRE}):  # the rank is dead, and so is its request
                code, happened = 0, 1
                n_used -= 1
                turn -= 1
                slots[turn], slots[n_used] = slots[n_used], slot
                continue
            if code != 0:
                break
            if flag[0] != 0:
                happened = 1
                if state[{DATA_BYTES}] + state[{TAGS_BYTES}] > 0:
                    code = post(functions, comm, byte, state, pieces, request_bytes)
                else:
                    if state[{KIND}] == {STORE}:
                        came = 1
                        found = state[{BEFORE}]
                        if state[{WORD}] != 0:
                            if state[{FORMAT}] != 0 and swap_at(state[{WORD}], 0, 0) == state[{BEFORE}]:
                                add(state)
                            found = swap_at(state[{WORD}], state[{BEFORE}], state[{AFTER}])
                        code = answer(functions, comm, byte, state, header, found)
                        if survives != 0:
                            code = 0
                    n_served += 1
                    n_used -= 1
                    turn -= 1
                    slots[turn], slots[n_used] = slots[n_used], slot
        if asks < 0:
            flag[0] = 0
            code = code or call(functions[{TESTANY}], (n_ranks, at_next, at_flag + 4, at_flag, at_statuses))
            if code != 0 and survives != 0 and n_failed < {ERRORS_OF_A_DEATH} * n_ranks:
                code, flag[0], n_failed = 0, 0, n_failed + 1  # a rank is dead; MPI has freed its receive
            if flag[0] != 0:
                asks, first = flag[1], 0
                n_left = requests[asks, {KIND}] // {FOLLOWING}
                happened, came = 1, 1
        if code != 0:
            break
        if load_acquire(shared, {OUTCOME}) == {WATCHING}:
            flag[0] = 0
            watched, statuses = shared[{WATCHED}], shared[{WATCHED_STATUSES}]
            theirs = call(functions[{TESTALL}], (shared[{N_WATCHED}], watched, at_flag, statuses))
            if theirs != 0 or flag[0] != 0:
                happened, came = 1, 1
                store_release(shared, {OUTCOME}, -theirs if theirs != 0 else {COMPLETE})
                call(functions[{WRITE}], (shared[{WAKEUP_OF_WATCHED}], at_drain, 1))
            else:
                n_busy += 1
        polls += 1
        if happened != 0:
            if slept != 0 and came != 0:
                trust = min(trust + {CREDIT}, {MOST_TRUST}) if woken != 0 else max(trust - 1, 0)
                trusted = 1 if trust >= {ENOUGH_TRUST} or (trusted != 0 and trust > 0) else 0
                store_release(shared, {TRUSTED}, trusted)
            # Poll again before sleeping: the call that brought this may have brought more.
            waited, slept, woken, polls, in_vain = 0, 0, 0, 0, in_vain // 2
        if asks >= 0 and n_used < slots.shape[0]:
            free = slots[n_used]
            n_used += 1
            state = states[free]
            state[{ACQUIRED}] = 0
            for k in range({REQUEST_WORDS}):
                state[k] = requests[asks, first + k]
            state[{KIND}] %= {FOLLOWING}
            state[{BUFFER}] = state[{DATA}]
            first, n_left = first + {REQUEST_WORDS}, n_left - 1
            if n_left < 0:
                here, at = at_requests + longest * asks, at_next + asks * request_bytes
                code = call(functions[{IRECV}], (here, longest, byte, asks, {TAG_REQUEST}, comm, at))
                if survives != 0:
                    code = 0
                asks = -1
            header = at_states + 8 * ({STATE_WORDS} * free + {HEADER})
            if state[{KIND}] == {SWAP}:
                found = swap_at(state[{WORD}], state[{BEFORE}], state[{AFTER}])
                code = code or answer(functions, comm, byte, state, header, found)
                n_used -= 1
            elif state[{KIND}] != {ACQUIRE}:
                if state[{KIND}] == {FETCH}:
                    code = code or answer(functions, comm, byte, state, header, 0)
                pieces = at_pieces + free * {N_PIECES} * request_bytes
                code = code or post(functions, comm, byte, state, pieces, request_bytes)
            if code != 0 and survives != 0:
                code = 0
                n_used -= state[{KIND}] != {SWAP}
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
            call(functions[{USLEEP}], (nap,))
            # MPI may need more than one wake-up to complete the announced message.
            waited, announced, slept, polls = waited + nap, 0, woken, 0
        else:
            timeout = {SLEEP_MILLISECONDS}
            if trusted != 0 and n_busy == 0 and waited >= 1000 * {SLEEP_MILLISECONDS}:
                compare_and_swap(shared, {ASLEEP}, 0, 1)  # before POLLING is checked: a later poller wakes this thread
                if load_acquire(shared, {POLLING}) == 0:
                    timeout = {LONGEST_SLEEP_MILLISECONDS}
            announced = call(functions[{POLL}], (at_files, n_files, timeout))
            store_release(shared, {ASLEEP}, 0)
            slept, woken, polls = 1, 0, 0
            if announced == 0:
                waited, in_vain = waited + 1000 * timeout, 0
            elif call(functions[{READ}], (wakeup, at_drain, {DRAIN_BYTES})) > 0:
                waited, announced, slept = 0, 0, 0
            else:
                woken = 1 if announced > 0 and in_vain <= {MOST_IN_VAIN} else 0
                in_vain += 1
    if code != 0:
        return -code
    for rank in range(n_ranks):
        if rank != asks and dead[rank] == 0:
            call(functions[{CANCEL}], (at_next + rank * request_bytes,))
            call(functions[{WAIT}], (at_next + rank * request_bytes, at_statuses))
    return n_served
"""


@functools.cache
def serve() -> Callable[..., int]:
    """Return the compiled serving loop, which runs until STOP is set and nothing is watched.

    ``serve(functions, comm, byte, request_bytes, n_polls, shared, flag, requests, states, slots, dead, memory)``

    - ``functions``: the addresses of FUNCTIONS
    - ``comm``, ``byte``: MPI handles
    - ``request_bytes``: the size of an MPI_Request
    - ``n_polls``: polls between two sleeps
    - ``shared``: (SHARED_WORDS,) zeros, shared with the other threads of the rank
    - ``flag`` (2,), ``requests`` (ranks, MOST_REQUESTS * REQUEST_WORDS): buffers
    - ``states``: (slots, STATE_WORDS) zeros. A request that waits for a lock occupies a slot until the lock is free, so
      there must be more slots than requests of that kind. A poll looks only at the slots in use.
    - ``slots``: (slots,) the numbers 0, 1, ...
    - ``dead``: (ranks,) not 0 for each rank that is known to be dead; another thread of the rank sets it
    - ``memory``: the addresses of ``flag``, ``requests``, N_PIECES statuses, slots * N_PIECES + ranks MPI_Requests,
      ``states`` and structs pollfd; the number of these structs; the file to which other threads write to wake the
      loop; and the address of DRAIN_BYTES bytes

    There is a receive for each rank, because under MPICH a receive from any source may never complete when two threads
    call MPI. The result is the number of requests served. After an MPI error, the loop returns the negative error code
    at once. MPI may still write to the memory then, so it must stay allocated.
    """
    return cache.compiled("serve", "words", _SERVE)
