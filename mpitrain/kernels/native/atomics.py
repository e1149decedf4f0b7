"""Atomic operations on words that the ranks of a node share, which Numba does not provide.

A compiler may hoist a plain load out of a loop, and plain stores may become visible in any order. Words that one rank
writes and another waits for are therefore loaded with acquire and stored with release semantics (C11, section
7.17.3): a rank that has loaded the stored value sees all earlier writes of the rank that stored it. A compare-and-swap
has both semantics.

Importing this module imports numba; only generated code does.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORD_BYTES = 8


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Return the address of element ``index`` of an int64 array."""
    struct = context.make_array(array_type)(context, builder, array)
    return builder.gep(struct.data, [index])


@intrinsic
def load_acquire(typingctx: Any, words: Any, index: Any) -> Any:
    """Return words[index] with acquire semantics: all earlier writes of the thread that stored it are visible then."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args)
        return builder.load_atomic(address, "acquire", _WORD_BYTES)

    return types.int64(words, types.int64), generate


@intrinsic
def store_release(typingctx: Any, words: Any, index: Any, value: Any) -> Any:
    """Set words[index] to value with release semantics: a thread that loads it sees all earlier writes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args[:2])
        builder.store_atomic(args[2], address, "release", _WORD_BYTES)
        return context.get_constant(types.int64, 0)

    return types.int64(words, types.int64, types.int64), generate


@intrinsic
def compare_and_swap(typingctx: Any, words: Any, index: Any, expected: Any, new: Any) -> Any:
    """Set words[index] to new if it equals expected; return the former value (acquire and release semantics)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args[:2])
        found_and_done = builder.cmpxchg(address, *args[2:], "acq_rel", "acquire")
        return builder.extract_value(found_and_done, 0)

    return types.int64(words, types.int64, types.int64, types.int64), generate


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Yield the core to other processes (sched_yield)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), "sched_yield")
        return builder.sext(builder.call(function, []), _I64)

    return types.int64(), generate
