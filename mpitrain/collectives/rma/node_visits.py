"""Visits to blocks if all ranks share one node: a block is memory of this process, and its lock is a word.

They do what ``Blocks`` promises, in few calls: a visit to a small block takes some microseconds.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from mpitrain.collectives.rma.blocks import WEIGHT_TAG, Block, Blocks
from mpitrain.collectives.rma.locks import LockWord
from mpitrain.kernels import weighted_average
from mpitrain.kernels.compile.declare import as_bits
from mpitrain.kernels.native import lock_words, locked
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK

WRITTEN_BYTES = 1 << 16
"""Size of a block that is written by compiled code, at most. NumPy copies large vectors past the caches."""


class NodeVisit(AbstractContextManager[Block]):
    """A context manager that holds the lock of a block.

    Args:
        blocks: All blocks.
        block: The block.
        word: The word of its lock.
        updated: Whether the body changes the block.
    """

    __slots__ = ("_acquire", "_block", "_blocks", "_mine", "_place", "_release", "_updated", "_words")

    def __init__(self, blocks: Blocks, block: Block, word: LockWord, *, updated: bool) -> None:
        self._blocks, self._block, self._updated = blocks, block, updated
        self._words, self._place, self._mine = word.words, word.place, word.mine
        self._acquire, self._release = lock_words.acquire(), lock_words.release()

    def __enter__(self) -> Block:
        block = self._block
        found = self._acquire(self._words, self._place, self._mine, 0)
        if found & OWNER_MASK:
            return self._blocks.acquire(block.index)  # waits for the owner
        block.version = found >> OWNER_BITS
        return block

    def __exit__(self, *_: object) -> None:
        if self._release(self._words, self._place, self._mine, self._updated) & OWNER_MASK != self._mine:
            self._blocks.release(self._block, updated=self._updated)  # raises


class NodeBlock:
    """Whole visits to a block, each in one compiled call. A call that finds the lock taken has no effect.

    Args:
        block: The block.
        word: The word of its lock.
    """

    def __init__(self, block: Block, word: LockWord) -> None:
        self._lock = word.words, word.place, word.mine
        self._data, self._tags, (self._bits,) = block.data, block.tags, as_bits([block.data])
        dtype = block.data.dtype
        self._write, self._average = locked.write(dtype), locked.average(weighted_average, dtype, WEIGHT_TAG)
        self._weights = np.zeros(2)
        self._checked: Any = None  # the vector of the last call, which most callers pass again
        self._checked_bits = self._bits

    def write(self, values: Any, tags: np.ndarray) -> bool:
        """Replace the elements (length,) and the tags, as an update; return whether this was done. Local."""
        if not (values is self._checked or self._check(values)) or self._data.nbytes > WRITTEN_BYTES:
            return False
        return self._write(*self._lock, self._bits, self._tags, self._checked_bits, tags) != locked.TAKEN

    def average(self, x: Any, own: float, weight: float | None) -> tuple[float, int] | None:
        """Replace x by its weighted average with the block; see ``Blocks``. Local; None if this was not done."""
        if not (x is self._checked or self._check(x)):
            return None
        weights = self._weights
        weights[0], weights[1] = own, math.nan if weight is None else weight
        n_nonfinite = self._average(*self._lock, self._checked_bits, self._bits, self._tags, weights)
        return None if n_nonfinite == locked.TAKEN else (float(weights[1]), n_nonfinite)

    def _check(self, vector: Any) -> bool:
        """Return whether compiled code can take a vector together with the elements, and if so, remember it."""
        data = self._data
        if type(vector) is not np.ndarray or vector.dtype != data.dtype or vector.shape != data.shape:
            return False
        if not vector.flags.carray:
            return False
        self._checked, (self._checked_bits,) = vector, as_bits([vector])
        return True
