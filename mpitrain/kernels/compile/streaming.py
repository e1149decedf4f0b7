"""Stores past the caches, for long vectors that are written without having been read.

A processor fetches the line that a store touches before it changes it, and an array that is only written is fetched for
nothing. Non-temporal stores of whole lines leave that out (memcpy does so too, for long copies), but what they write is
in no cache afterwards. They are also ordered with nothing: whoever has made some calls ``streams_end`` before he tells
another rank, or gives a lock back.

Importing this module imports numba; only generated code does.
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
    """target[:] = source, whole lines of target past the caches; both C contiguous, of one dtype and length."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        to, of = (context.make_array(t)(context, b, array) for t, array in zip(signature.args, args, strict=True))
        size = to.nitems.type
        byte = cgutils.voidptr_t
        start, found = b.bitcast(to.data, byte), b.bitcast(of.data, byte)
        n_bytes = b.mul(to.nitems, to.itemsize)
        # Up to the first line that begins in target, whole lines, and what is left.
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
    """Everything streamed so far comes before what is stored from now on."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
