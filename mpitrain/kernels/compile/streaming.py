"""Non-temporal stores, which bypass the caches, for long write-only vectors.

A CPU fetches a cache line before an ordinary store changes it, which is wasted for an array that is only written.
Non-temporal stores of whole lines avoid the fetch (as memcpy does for long copies), but leave the data in no cache.
They are also not ordered with other stores: ``streams_end`` must be called after them, before another rank is notified
or a lock is released.

Importing this module imports Numba; only generated code imports it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_LINE_BYTES = 64
_LINE = ir.VectorType(ir.IntType(32), _LINE_BYTES // 4)  # LLVM splits it where registers are narrower


@intrinsic
def stream(typingctx: Any, target: Any, source: Any) -> Any:
    """Assign target[:] = source with non-temporal stores of cache lines.

    Both arrays must be contiguous, and have the same dtype and length.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        to, of = (context.make_array(t)(context, b, array) for t, array in zip(signature.args, args, strict=True))
        size = to.nitems.type
        byte = cgutils.voidptr_t
        start, found = b.bitcast(to.data, byte), b.bitcast(of.data, byte)
        n_bytes = b.mul(to.nitems, to.itemsize)
        # The bytes before the first whole line of target, the whole lines, and the rest.
        before = b.and_(b.neg(b.ptrtoint(start, size)), size(_LINE_BYTES - 1))
        head = b.select(b.icmp_unsigned("<", before, n_bytes), before, n_bytes)
        n_lines = b.udiv(b.sub(n_bytes, head), size(_LINE_BYTES))
        tail_at = b.add(head, b.mul(n_lines, size(_LINE_BYTES)))
        cgutils.raw_memcpy(b, start, found, head, 1)
        lines, found_lines = (b.bitcast(b.gep(p, [head]), _LINE.as_pointer()) for p in (start, found))
        nontemporal = b.module.add_metadata([ir.IntType(32)(1)])
        with cgutils.for_range(b, n_lines) as loop:
            line = b.load(b.gep(found_lines, [loop.index]), align=1)
            store = b.store(line, b.gep(lines, [loop.index]), align=_LINE_BYTES)
            store.set_metadata("nontemporal", nontemporal)
        cgutils.raw_memcpy(b, b.gep(start, [tail_at]), b.gep(found, [tail_at]), b.sub(n_bytes, tail_at), 1)
        return context.get_dummy_value()

    return types.void(target, source), generate


@intrinsic
def streams_end(typingctx: Any) -> Any:
    """Order all streamed stores before all later stores."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
