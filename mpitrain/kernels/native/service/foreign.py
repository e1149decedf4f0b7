"""Calls of C functions and access to raw addresses from compiled code.

MPI handles, pointers and ints are all passed as 64-bit integers: the calling conventions of x86-64 and ARM place them
where the callee expects shorter arguments.

Importing this module imports numba; only generated code does.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at ``address`` with a tuple of int64 and return its int result."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(_I32, [_I64] * len(values))
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), values), _I64)

    return types.int64(types.int64, arguments), generate


@intrinsic
def swap_at(typingctx: Any, address: Any, expected: Any, new: Any) -> Any:
    """Compare and swap the int64 at ``address``, with acquire and release semantics, and return the former value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire"), 0)

    return types.int64(types.int64, types.int64, types.int64), generate


def _pointer_to(element: Any) -> Any:
    """Return an intrinsic that casts an address to a pointer to elements of this type."""

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


floats_at, shorts_at, levels_at = (_pointer_to(element) for element in (types.float32, types.uint16, types.int8))
