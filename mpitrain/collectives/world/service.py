"""Requests of this rank to the progress threads of other ranks (``world.progress``)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mpitrain.collectives.world.transfers import Arrays, NativeMPI, Transfer
from mpitrain.kernels.native import service
from mpitrain.kernels.native.wire import PLAIN, Encoded

TAGS = range(2, 4000)  # of requests and their data, in turn: only some are pending


class Service:
    """The requests of this rank to the progress threads of the ranks of a run, or of a part of them. Local to create.

    All parts use the same threads. The ranks in the arguments are those of the part.

    Args:
        mpi: MPI for compiled code, with the communicator of all ranks of the run.
        members: The rank in the run of each of the ranks.
        tags: The tags of this rank's requests, the same iterator for all parts.
    """

    def __init__(self, mpi: NativeMPI, members: Sequence[int], tags: itertools.cycle[int]) -> None:
        self._mpi, self._members, self._tags = mpi, members, tags
        self._rank = mpi.rank

    def of_part(self, members: Sequence[int]) -> Service:
        """Return the requests to a part of the ranks. Local.

        Args:
            members: The rank in the run of each rank of the part.
        """
        return Service(self._mpi, members, self._tags)

    def swap(self, rank: int, word: int, before: int, after: int) -> int:
        """Compare and swap a lock word of another rank. Local.

        Args:
            rank: The other rank.
            word: The address of the word at that rank.
            before: The expected value.
            after: The new value, which is stored if the word has the expected value.

        Returns:
            The former value.

        Raises:
            ServerLost: The other rank has died.
        """
        return self._request(service.SWAP, rank, (0, 0), (), (word, before, after)).wait()

    def fetch(
        self,
        rank: int,
        addresses: tuple[int, int],
        arrays: Arrays,
        acquire: tuple[int, int] = (0, 0),
        encoded: Encoded = PLAIN,
        *,
        retakes: bool = False,
        sent: bool = True,
        also: Sequence[Transfer] = (),
    ) -> Transfer:
        """Start to copy memory of another rank to arrays. Local.

        Args:
            rank: The other rank.
            addresses: The addresses of that memory at the other rank, one for each array.
            arrays: The destination.
            acquire: The address of a lock word, and the owner bits with which the lock is acquired first.
            encoded: A block of the other rank, to be encoded to the first address when the lock has been acquired.
            retakes: Whether this rank may have the lock already, from a request whose answer is lost.
            sent: Whether to send the request now. Otherwise another one sends it, or it is sent when it is awaited.
            also: Fetches from the same rank that are not sent yet, and that the message of this one contains.
        """
        kind = service.ACQUIRE if acquire[0] else service.FETCH
        word = acquire[0], int(retakes), acquire[1]
        return self._request(kind, rank, addresses, arrays, word, encoded, sent=sent, also=also)

    def store(
        self,
        rank: int,
        addresses: tuple[int, int],
        arrays: Arrays,
        swap: tuple[int, int, int],
        encoded: Encoded = PLAIN,
        *,
        also: Sequence[Transfer] = (),
    ) -> Transfer:
        """Start to copy arrays to memory of another rank, and to swap a lock word afterwards. Local.

        Args:
            rank: The other rank.
            addresses: The addresses of that memory at the other rank, one for each array.
            arrays: The source.
            swap: The address of a lock word, its expected value and its new value; zeros to swap none.
            encoded: A block of the other rank, to which the encoded change at the first address is added before the
                swap.
            also: Fetches from the same rank that are not sent yet, and that the message of the store contains.
        """
        return self._request(service.STORE, rank, addresses, arrays, swap, encoded, also=also)

    def _request(
        self,
        kind: int,
        rank: int,
        addresses: tuple[int, int],
        arrays: Sequence[np.ndarray],
        word: tuple[int, int, int],
        encoded: Encoded = PLAIN,
        *,
        sent: bool = True,
        also: Sequence[Transfer] = (),
    ) -> Transfer:
        here, there = np.zeros(4, np.int64), [0, 0, 0, 0]
        for k, (address, array) in enumerate(zip(addresses, arrays, strict=False)):
            here[2 * k : 2 * k + 2] = array.ctypes.data, array.nbytes
            there[2 * k : 2 * k + 2] = address, array.nbytes
        words = np.array([kind, self._rank, *there, *word, next(self._tags), *encoded], np.int64)
        return Transfer(self._mpi, self._members[rank], words, here, arrays, sent=sent, also=also)
