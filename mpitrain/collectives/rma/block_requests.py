"""The requests for blocks of other nodes: fetch a block under its lock, store it and unlock it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain.collectives.rma.block_memory import BlockMemory
from mpitrain.collectives.rma.blocks import Block
from mpitrain.collectives.rma.heirs import Place, Places
from mpitrain.collectives.rma.remote_locks import RemoteLocks
from mpitrain.collectives.rma.wire_buffers import WireBuffers
from mpitrain.collectives.world.service import Service
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.collectives.world.transfers import Arrays, ServerLost, Transfer
from mpitrain.errors import RankFailed
from mpitrain.kernels.native.wire import PLAIN, Encoded

NOTHING = np.zeros(0, np.uint8)


@dataclass(slots=True)
class RemoteBlock(Block):
    """A block in a staging buffer.

    Attributes:
        buffer: The number of the staging buffer.
        place: The place from which it was fetched.
        encoding: Buffers for the encoded block and for its encoded change; None without them.
        encoded: The encoded block as it was fetched, and the buffer for its change; None if it was not encoded.
        restarted: Whether this worker has set its first values at an heir, which counts as an update.
    """

    buffer: int
    place: Place
    encoding: tuple[np.ndarray, np.ndarray] | None
    encoded: tuple[np.ndarray, np.ndarray] | None = None
    restarted: bool = False


@dataclass(slots=True, eq=False)
class Store:
    """The request that stores and unlocks a block.

    Attributes:
        block: The block. It owns its staging buffer until the end of the request.
        transfer: The transfer that carries the request and its answer.
        updated: Whether the block was changed.
    """

    block: RemoteBlock
    transfer: Transfer
    updated: bool


@dataclass(slots=True, eq=False)
class Fetch:
    """The request that locks and fetches a block.

    Attributes:
        block: The block, in a staging buffer.
        transfer: The transfer that carries the request and its answer.
        n_bytes: The number of bytes to receive.
        began: The time of the request, in seconds.
        granted: Whether this rank has the lock.
    """

    block: RemoteBlock
    transfer: Transfer
    n_bytes: int
    began: float
    granted: bool = False


class BlockRequests:
    """The requests of this rank for blocks. Local to create.

    Args:
        memory: The memory of all blocks.
        locks: The locks of the blocks.
        progress: The requests of this rank to other progress threads.
        statistics: The counters of bytes.
        places: The places of the blocks.
        wire: The buffers of encoded blocks; None without encoding.

    Attributes:
        progress: See the argument.
    """

    def __init__(
        self,
        memory: BlockMemory,
        locks: RemoteLocks,
        progress: Service,
        statistics: Statistics,
        places: Places,
        wire: WireBuffers | None,
    ) -> None:
        self._memory, self._locks, self.progress, self._statistics = memory, locks, progress, statistics
        self._places, self._wire = places, wire

    def fetch(
        self,
        block: RemoteBlock,
        place: Place,
        encoded: bool,
        *,
        retakes: bool = False,
        sent: bool = True,
        also: Sequence[Transfer] = (),
    ) -> Transfer:
        """Start to lock and fetch a block from a place, which is its place from now on. Local.

        Only the home of a block encodes it, because the buffer for that is its own.

        Args:
            block, place: The block and its place.
            encoded: Whether the block may be encoded.
            retakes: Whether this rank may have the lock already, from a server that has died.
            sent, also: As in ``Service.fetch``.
        """
        block.place, block.encoded, data = place, None, block.data
        if encoded and self._wire is not None and place.server == self._memory.homes[block.index]:
            assert block.encoding is not None
            fetched, change = block.encoding
            data = self._wire.fetched(fetched, block.data.size)
            block.encoded = data, change
        addresses, description = self._addresses(place, block.index, encoded=block.encoded is not None)
        self._statistics.wire_bytes += data.nbytes
        arrays, owner = (data, block.tags), (place.word, self._locks.mine)
        options: Any = {"retakes": retakes, "sent": sent, "also": also}
        return self.progress.fetch(place.server, addresses, arrays, owner, description, **options)

    def store(self, block: RemoteBlock, *, updated: bool, also: Sequence[Transfer] = ()) -> Transfer:
        """Start to store an updated block at its place and to unlock it there. Local.

        Args:
            block: The block.
            updated: Whether it was changed.
            also: As in ``Service.store``.
        """
        arrays = NOTHING, NOTHING
        if updated and self._wire is not None and block.encoded is not None:
            arrays = self._wire.encode_change(block.index, block.data, *block.encoded), block.tags
        elif updated:
            arrays = block.data, block.tags
        self._statistics.wire_bytes += arrays[0].nbytes
        return self._store(block.place, block, arrays, updated=updated, also=also)

    def store_again(self, block: RemoteBlock, *, updated: bool) -> Transfer | None:
        """Repeat a store whose server has died; return None if there is nothing to repeat. Local.

        An encoded change is not repeated, because the dead rank may have added it already.
        """
        held, _ = self._locks.release_swap(block.version, updated=updated)
        while True:
            try:
                place = self._places.place(block.index)
                if place.is_heir or self.progress.swap(place.server, place.word, held, held) != held:
                    return None  # the heir has another block; or the dead rank has stored and unlocked this one
                break
            except ServerLost:
                continue
            except RankFailed:
                return None
        if not updated or block.encoded is not None:
            return self._store(place, block, (NOTHING, NOTHING), updated=False)
        return self._store(place, block, (block.data, block.tags), updated=True)

    def _store(
        self, place: Place, block: RemoteBlock, arrays: Arrays, *, updated: bool, also: Sequence[Transfer] = ()
    ) -> Transfer:
        """Start to store arrays at a place of a block, and to unlock it there."""
        held, released = self._locks.release_swap(block.version, updated=updated)
        addresses, description = self._addresses(place, block.index, encoded=updated and block.encoded is not None)
        swap = place.word, held, released
        return self.progress.store(place.server, addresses, arrays, swap, description, also=also)

    def _addresses(self, place: Place, index: int, *, encoded: bool) -> tuple[tuple[int, int], Encoded]:
        """Return the addresses of a block, or of its encoding, and of its tags at a place; and the encoding."""
        if not encoded or self._wire is None:
            return (place.data, place.tags), PLAIN
        return (self._wire.address(index), place.tags), self._wire.encoded(index, place.data)
