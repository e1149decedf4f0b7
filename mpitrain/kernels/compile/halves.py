"""float16, bfloat16 and int8 on the host: conversions in LLVM IR, so that loops over them vectorise.

The formats are IEEE 754-2008 binary16 (1 sign, 5 exponent, 10 fraction bits) and bfloat16 (1, 8, 7). Rounding is to
nearest, ties to even; subnormals and infinities are converted as by NumPy's and ml_dtypes' own casts. The conversions
are written in IR because Numba has no 16-bit float on the host and computes all integers in 64 bits, which would halve
the number of elements per vector register. A process that flushes float32 subnormals to zero
(torch.set_flush_denormal) keeps the subnormals of float16, in the CPU's conversions as in the arithmetic here.

bfloat16 is always converted by bit operations: x86's instruction for it (AVX512_BF16) drops float32 subnormals.

Importing this module imports Numba; only generated code imports it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_F16, _F32 = ir.HalfType(), ir.FloatType()


def _has_float16_conversions(context: Any) -> bool:
    """Return whether the CPU converts float16: x86 with F16C (since 2012) and 64-bit ARM do, three times as fast."""
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features or triple.startswith("aarch64")


def _u32(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


@intrinsic
def half_to_float(typingctx: Any, half: Any) -> Any:
    """Convert float16 bits to float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if _has_float16_conversions(context):
            return b.fpext(b.bitcast(args[0], _F16), _F32)
        bits = b.zext(args[0], _I32)
        sign = b.shl(b.and_(bits, _u32(0x8000)), _u32(16))
        magnitude = b.and_(bits, _u32(0x7FFF))
        shifted = b.shl(magnitude, _u32(13))
        normal = b.add(shifted, _u32((127 - 15) << 23))
        special = b.add(shifted, _u32((255 - 31) << 23))  # infinity, NaN: the largest exponent maps to the largest
        # A subnormal is m * 2**-24; (2**-14 + m * 2**-24) - 2**-14 is exact, and the FPU normalises it.
        smallest = b.bitcast(_u32((127 - 14) << 23), _F32)
        lifted = b.bitcast(b.add(shifted, _u32((127 - 14) << 23)), _F32)
        subnormal = b.bitcast(b.fsub(lifted, smallest), _I32)
        out = b.select(b.icmp_unsigned("<", magnitude, _u32(0x0400)), subnormal, normal)
        out = b.select(b.icmp_unsigned(">=", magnitude, _u32(0x7C00)), special, out)
        return b.bitcast(b.or_(out, sign), _F32)

    return types.float32(types.uint16), generate


@intrinsic
def float_to_half(typingctx: Any, value: Any) -> Any:
    """Convert float32 to float16 bits, rounding to nearest, ties to even."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if _has_float16_conversions(context):
            return b.bitcast(b.fptrunc(args[0], _F16), _I16)
        bits = b.bitcast(args[0], _I32)
        sign = b.and_(b.lshr(bits, _u32(16)), _u32(0x8000))
        magnitude = b.and_(bits, _u32(0x7FFFFFFF))
        # Normal: rebias, add half a unit (minus one where the last kept bit is even), drop 13 bits. A carry is correct.
        odd = b.and_(b.lshr(magnitude, _u32(13)), _u32(1))
        rounded = b.add(b.sub(magnitude, _u32((127 - 15) << 23)), b.add(odd, _u32(0x0FFF)))
        normal = b.lshr(rounded, _u32(13))
        # Below 2**-14: the float32 spacing at 0.5 is 2**-24, like that of subnormal halves, so one addition rounds.
        half = b.bitcast(_u32(126 << 23), _F32)
        lifted = b.bitcast(b.fadd(b.bitcast(magnitude, _F32), half), _I32)
        subnormal = b.sub(lifted, _u32(126 << 23))
        # NaN: keep the upper payload bits and at least one bit, or it would become an infinity.
        payload = b.and_(b.lshr(magnitude, _u32(13)), _u32(0x03FF))
        payload = b.select(b.icmp_unsigned("==", payload, _u32(0)), _u32(1), payload)
        nan = b.or_(payload, _u32(0x7C00))
        out = b.select(b.icmp_unsigned("<", magnitude, _u32((127 - 14) << 23)), subnormal, normal)
        out = b.select(b.icmp_unsigned(">=", magnitude, _u32((127 + 16) << 23)), _u32(0x7C00), out)
        out = b.select(b.icmp_unsigned(">", magnitude, _u32(255 << 23)), nan, out)
        return b.trunc(b.or_(out, sign), _I16)

    return types.uint16(types.float32), generate


@intrinsic
def bfloat_to_float(typingctx: Any, bfloat: Any) -> Any:
    """Convert bfloat16 bits to float32, of which they are the upper half."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(b.shl(b.zext(args[0], _I32), _u32(16)), _F32)

    return types.float32(types.uint16), generate


@intrinsic
def float_to_bfloat(typingctx: Any, value: Any) -> Any:
    """Convert float32 to bfloat16 bits, rounding to nearest, ties to even."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        bits = b.bitcast(args[0], _I32)
        odd = b.and_(b.lshr(bits, _u32(16)), _u32(1))
        rounded = b.lshr(b.add(bits, b.add(odd, _u32(0x7FFF))), _u32(16))
        nan = b.or_(b.and_(b.lshr(bits, _u32(16)), _u32(0x8000)), _u32(0x7FC0))
        is_nan = b.icmp_unsigned(">", b.and_(bits, _u32(0x7FFFFFFF)), _u32(255 << 23))
        return b.trunc(b.select(is_nan, nan, rounded), _I16)

    return types.uint16(types.float32), generate


@intrinsic
def float_to_int8(typingctx: Any, value: Any) -> Any:
    """Convert float32 to int8; the value must be a whole number from -128 to 127."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.fptosi(args[0], _I8)

    return types.int8(types.float32), generate


@intrinsic
def int8_to_float(typingctx: Any, level: Any) -> Any:
    """Convert int8 to float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.sitofp(args[0], _F32)

    return types.float32(types.int8), generate


@intrinsic
def magnitude_bits(typingctx: Any, value: Any) -> Any:
    """Return the bits of the absolute value of a float32 as int32.

    The bits have the same order as the absolute values, and LLVM vectorises their maximum.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.and_(b.bitcast(args[0], _I32), _u32(0x7FFFFFFF))

    return types.int32(types.float32), generate


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """Reinterpret the bits of an int32 as float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], _F32)

    return types.float32(types.int32), generate
