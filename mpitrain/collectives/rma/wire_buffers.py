"""Encoded blocks (``native.wire``) at their homes, and the residuals of encoded changes.

The home encodes a block into a buffer beside it; the buffer belongs to the owner of the lock. The visitor sends back
the encoded change of the block, and the home adds it. The block therefore moves by exactly what was sent. The visitor
keeps the rounding error of the change, the residual, and adds it to its next change: blocks and residuals together
conserve the sum, to the rounding of float32.

This is right for blocks that are changed, and wrong for blocks that are replaced, such as mailboxes: the residual of
one message does not belong in the next.
"""

from __future__ import annotations

import numpy as np

from mpitrain.collectives.rma.block_memory import BlockMemory, pack
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.native import wire

ALIGNMENT = 64
"""Bytes; each encoded block begins at a multiple."""


class WireBuffers:
    """A buffer for each block at its home, and a residual for each remote block. Collective to create.

    The buffers need 2 bytes per element. The residuals need 4 bytes per element of the blocks that this worker changes.

    Args:
        memory: The blocks, with float32 elements.
        encoding: The wire format.
        statistics: The counters of non-finite elements.

    Attributes:
        residuals: The rounding error of each block's last encoded change, (length,), which the next change includes.
    """

    def __init__(self, memory: BlockMemory, encoding: wire.Format, statistics: Statistics) -> None:
        self._memory, self._encoding, self._statistics = memory, encoding, statistics
        world = memory.world
        self._starts, totals = pack(memory.homes, [self._n_bytes(n) for n in memory.lengths], world.size)
        self._buffers = np.zeros(totals[world.rank], np.uint8)
        self._bases: list[int] = world.allgather(self._buffers.ctypes.data)
        self.residuals: dict[int, np.ndarray] = {}
        wire.prepare(encoding)

    def _n_bytes(self, n: int) -> int:
        """Return the size of the buffer of a block of ``n`` elements, in either direction."""
        return -(-max(self._encoding.fetched_bytes(n), self._encoding.sent_bytes(n)) // ALIGNMENT) * ALIGNMENT

    def staging(self) -> tuple[np.ndarray, np.ndarray]:
        """Return two buffers, large enough for any remote block: for the fetched block and for its change. Local."""
        n_bytes = self._n_bytes(self._memory.longest_remote)
        return np.zeros(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)

    def fetched(self, buffer: np.ndarray, n: int) -> np.ndarray:
        """Return the part of a buffer that a fetched block of ``n`` elements fills. Local."""
        return buffer[: self._encoding.fetched_bytes(n)]

    def address(self, index: int) -> int:
        """Return the address of a block's buffer in the process of its home. Local."""
        return self._bases[self._memory.homes[index]] + self._starts[index]

    def encoded(self, index: int, address: int) -> wire.Encoded:
        """Return the description of an encoded block for a request, given the address of the block. Local."""
        return self._encoding.code, address, self._memory.lengths[index]

    def decode(self, fetched: np.ndarray, out: np.ndarray) -> None:
        """Decode a fetched block to ``out`` (length,). Local."""
        self._encoding.decode(fetched, out)

    def encode_change(self, index: int, data: np.ndarray, fetched: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        """Encode the change of a block since it was fetched, and store the residual. Local.

        Args:
            index: The number of the block.
            data: (length,) the present block.
            fetched: The encoded block as it was fetched.
            buffer: The buffer for the change, from ``staging``.

        Returns:
            The encoded change, a part of ``buffer``.
        """
        sent = buffer[: self._encoding.sent_bytes(data.size)]
        if index not in self.residuals:
            self.residuals[index] = np.zeros_like(data)
        self._statistics.n_nonfinite += self._encoding.push(data, fetched, self.residuals[index], sent)
        return sent
