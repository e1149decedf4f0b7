"""The protocol between the client and the server: request layout, message sizes, and the words that threads share.

A message to the server contains up to MOST_REQUESTS requests, the first of which says in its kind how many follow. A
request is an array of int64 words::

    kind, rank, address of the data, bytes, address of the tags, bytes, address of a lock word, before, after,
    message tag, wire format, address of the block, elements of the block

with one of four kinds:

    SWAP     set the word to ``after`` if it is ``before``, and answer with its former value
    FETCH    send both stretches of memory (data and tags)
    ACQUIRE  wait until the word's owner bits are free, set them to ``after``, then FETCH
    STORE    receive both stretches of memory, then SWAP

The server answers each request with a header: the former value of the word and how many polls found it taken. FETCH
and ACQUIRE send the data after the header. Data travel in pieces that fit MPI's eager limit: MPI negotiates larger
messages, and over TCP it then uses one direction of the link at a time.

With a wire format (``native.wire``; 0 means none), the first stretch is not the block but a buffer beside it. ACQUIRE
encodes the block into the buffer before sending. STORE receives an encoded change in the buffer, decodes it and adds
it to the block before the swap. The owner of the lock also owns the buffer. A change from a rank that has meanwhile
lost its lock is not added.

Where ranks survive the death of others, a request of a dead rank is dropped, and the lock of a dead rank counts as
free. With ``before`` = 1, ACQUIRE also takes a lock that the requester has already: a former server of the same memory
has granted it, and died before its answer arrived. STORE swaps no word at address 0.
"""

from __future__ import annotations

from typing import Final

# Kinds of requests, and the words of a request.
SWAP, FETCH, ACQUIRE, STORE = 1, 2, 3, 4
KIND, RANK, DATA, DATA_BYTES, TAGS, TAGS_BYTES, WORD, BEFORE, AFTER, TAG, FORMAT, BLOCK, N_ELEMENTS = range(13)
REQUEST_WORDS: Final = 13
# State of a request in progress: the request, pieces under way, polls that found the word taken, a header (2 words),
# and the address where the data begin.
STARTED, ACQUIRED, HEADER, BUFFER, STATE_WORDS = 13, 14, 15, 17, 18
HEADER_WORDS: Final = 2

FOLLOWING: Final = 1 << 8  # added to the kind of the first request of a message for each request that follows it
MOST_REQUESTS: Final = 17  # of a message: a block that returns, and requests for 16 others

PIECE_BYTES: Final = 60_000  # with a header, below the eager limit of 64 KiB of both Open MPI and MPICH
N_PIECES: Final = 128  # pieces of one request under way at a time
N_SENT: Final = 8  # the same when sending: this rank's own requests queue behind these pieces
TAG_REQUEST: Final = 1
STORED: Final = 1 << 12  # added to the tag of stored data, because both ends number their own requests

# C functions that the compiled code calls; it refers to them by their index.
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
TESTANY, WAIT, SEND, ISEND, IRECV, TESTALL, USLEEP, CANCEL, POLL, READ, WRITE = range(11)

# Words that the serving thread shares with the other threads of its rank. POLLING counts the threads that poll MPI.
STOP, ASLEEP, POLLING, TRUSTED = 0, 1, 2, 3
# Requests that another thread hands to the serving thread to watch: their outcome, number, address, the address of
# their statuses, and the file to write to at the end.
OUTCOME, N_WATCHED, WATCHED, WATCHED_STATUSES, WAKEUP_OF_WATCHED = 4, 5, 6, 7, 8
# Whether an MPI error ends only the requests of the rank that it concerns, because ranks survive deaths.
SURVIVES: Final = 9
SHARED_WORDS: Final = 10
NONE, WATCHING, COMPLETE, CLOSED = 0, 1, 2, 3  # values of OUTCOME; a negative value is an MPI error code

DRAIN_BYTES: Final = 64


def n_messages(n_bytes: int, n_bytes_of_tags: int) -> int:
    """Return the number of MPI requests that ``ask`` needs for data and tags of these sizes."""
    return 2 + sum(-(-n // PIECE_BYTES) for n in (n_bytes, n_bytes_of_tags))
