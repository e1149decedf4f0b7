"""Wire formats of float32 vectors between nodes: bfloat16, float16, and int8 with one scale per 256 elements.

    format      fetched as              sent back as
    bfloat16    bfloat16, 2 bytes       bfloat16, 2 bytes an element
    float16     float16, 2 bytes        float16, 2 bytes
    int8        bfloat16, 2 bytes       int8, 1 + 4/256 bytes

A visitor sends back the change e of a block, not the block. The rounding error of a change stays with the sender as a
residual and is added to its next change (error feedback):

    e = changed - fetched + residual        sent = encode(e)        residual = e - decode(sent)

The whole change therefore arrives in the end. Fetched values have no error feedback, and 8 bits are too few for a
parameter: int8 is for changes only.

float16 is IEEE 754 binary16 and bfloat16 the upper half of a float32. Both round to nearest, ties to even. Finite
numbers stay finite: a number beyond the range of the format becomes its largest number. int8 has levels from -127 to
127, rounded to nearest even, in units of scale = max |e| / 127 over 256 elements; the error is at most scale/2.

Sources: Seide, Fu, Droppo, Li, Yu, 1-bit stochastic gradient descent and its application to data-parallel distributed
training of speech DNNs, Interspeech 2014 (error feedback); Karimireddy, Rebjock, Stich, Jaggi, Error feedback fixes
SignSGD and other gradient compression schemes, 2019, https://arxiv.org/abs/1901.09847 (why it converges); Kalamkar et
al., A study of BFLOAT16 for deep learning training, 2019, https://arxiv.org/abs/1905.12322.

Encoded vectors are bytes (uint8). Bytes moved per element: ``encode`` 4 read, 2 written; ``decode`` 2 read, 4 written;
``add`` 5 or 6 read, 4 written; ``push`` 10 read, 5 or 6 written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from mpitrain.errors import UsageError, unknown
from mpitrain.kernels.compile import cache
from mpitrain.kernels.compile.storage import STORAGES

FLOAT32: Final = "float32"
"""The wire format of vectors that travel unencoded."""

Encoded = tuple[int, int, int]
"""The code of a format, and the address and number of elements of the block to encode."""

PLAIN: Final = (0, 0, 0)
"""No encoding: the block itself travels."""

GROUP: Final = 256  # elements that share a scale
LARGEST_LEVEL: Final = 127
LARGEST: Final = {"bfloat16": float.fromhex("0x1.fep127"), "float16": 65504.0}
TO_WHOLE: Final = 12582912.0  # 1.5 * 2**23: adding and subtracting it rounds a small float32 to the nearest even


@dataclass(frozen=True)
class Format:
    """A wire format.

    Attributes:
        name: ``bfloat16``, ``float16`` or ``int8``.
        code: The number of the format in a request (``native.service``).
        fetched: The 16-bit format of fetched blocks and of sums.
    """

    name: str
    code: int
    fetched: str

    def fetched_bytes(self, n: int) -> int:
        """Return the number of bytes of ``n`` elements in the format of fetched blocks."""
        return 2 * n

    def sent_bytes(self, n: int) -> int:
        """Return the number of bytes of the encoded change of ``n`` elements."""
        return n + 4 * -(-n // GROUP) if self.name == "int8" else 2 * n

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Encode ``values`` (n,) float32 to ``out`` (fetched_bytes(n),); infinities and NaNs are preserved."""
        _compiled("encode", self.fetched)(values, out.view(np.uint16))

    def decode(self, encoded: np.ndarray, out: np.ndarray) -> None:
        """Decode ``encoded`` (fetched_bytes(n),) to ``out`` (n,) float32."""
        _compiled("decode", self.fetched)(encoded.view(np.uint16), out)

    def add_fetched(self, encoded: np.ndarray, to: np.ndarray) -> None:
        """Decode ``encoded`` (fetched_bytes(n),) and add it to ``to`` (n,) float32."""
        _compiled("add", self.fetched)(encoded.view(np.uint16), to)

    def push(self, changed: np.ndarray, fetched: np.ndarray, residual: np.ndarray, out: np.ndarray) -> int:
        """Encode the change of a block plus the block's residual.

        Args:
            changed: (n,) float32, the present block.
            fetched: (fetched_bytes(n),) the encoded block as it was fetched.
            residual: (n,) float32, the residual of the previous change. The residual of this change replaces it.
            out: (sent_bytes(n),) the encoded change, as a result.

        Returns:
            The number of infinite or NaN elements. They are sent as 0, and their residual is 0.
        """
        return _compiled("push", self.name, self.fetched)(changed, fetched.view(np.uint16), residual, *self._parts(out))

    def add(self, encoded: np.ndarray, to: np.ndarray) -> None:
        """Decode the change ``encoded`` (sent_bytes(n),) and add it to ``to`` (n,) float32."""
        _compiled("add", self.name)(*self._parts(encoded), to)

    def _parts(self, encoded: np.ndarray) -> list[np.ndarray]:
        """Return the parts of an encoded change: its elements, or for int8 its scales and its levels."""
        if self.name != "int8":
            return [encoded.view(np.uint16)]
        n_scales = -(-encoded.size // (GROUP + 4))
        return [encoded[: 4 * n_scales].view(np.float32), encoded[4 * n_scales :].view(np.int8)]


FORMATS: Final = {
    f.name: f
    for f in (Format("bfloat16", 1, "bfloat16"), Format("float16", 2, "float16"), Format("int8", 3, "bfloat16"))
}
NAMES: Final = (FLOAT32, *FORMATS)


def format_of(name: str) -> Format | None:
    """Return the wire format with this name; None for ``float32``.

    Raises:
        UsageError: The format does not exist.
    """
    if name not in NAMES:
        raise UsageError(unknown("wire format", name, NAMES))
    return FORMATS.get(name)


def conversions(*names: str) -> str:
    """Return the source of ``encode_NAME(values, out)`` and ``add_NAME(encoded, to)``, for use in generated code."""
    functions = [_encode(f"encode_{name}", name) for name in names if name != "int8"]
    functions += [_add(f"add_{name}", name) for name in names]
    return _IMPORTS + "\n".join(f"@njit(nogil=True)\n{function}" for function in functions)


_IMPORTS: Final = """\
from numba import float32, int32, njit
from mpitrain.kernels.compile.halves import bfloat_to_float, float_of_bits, float_to_bfloat, float_to_half
from mpitrain.kernels.compile.halves import float_to_int8, half_to_float, int8_to_float, magnitude_bits
"""


def _encode(function: str, name: str) -> str:
    # Clamp finite numbers to the largest one. v - v is 0 for a finite v, else NaN.
    return f"""\
def {function}(values, out):
    largest = float32({LARGEST[name]!r})
    for i in range(len(values)):
        v = values[i]
        w = largest if v > largest else v
        w = -largest if w < -largest else w
        out[i] = {STORAGES[name].narrow}(v if v - v != float32(0) else w)
    return 0
"""


def _decode(function: str, name: str) -> str:
    return f"""\
def {function}(encoded, out):
    for i in range(len(out)):
        out[i] = {STORAGES[name].widen}(encoded[i])
    return 0
"""


def _add(function: str, name: str) -> str:
    if name != "int8":
        return f"""\
def {function}(encoded, to):
    for i in range(len(to)):
        to[i] += {STORAGES[name].widen}(encoded[i])
    return 0
"""
    return f"""\
def {function}(scales, levels, to):
    for start in range(0, len(to), {GROUP}):
        stop = min(start + {GROUP}, len(to))
        scale, part, of = scales[start // {GROUP}], levels[start:stop], to[start:stop]
        for i in range(stop - start):
            of[i] += scale * int8_to_float(part[i])
    return 0
"""


def _push(function: str, name: str, fetched: str) -> str:
    widen = STORAGES[fetched].widen
    if name != "int8":
        return f"""\
def {function}(changed, fetched, residual, out):
    n_nonfinite = 0
    largest = float32({LARGEST[name]!r})
    for i in range(len(changed)):
        e = changed[i] - {widen}(fetched[i]) + residual[i]
        bad = e - e != float32(0)
        n_nonfinite += bad
        e = float32(0) if bad else e
        w = largest if e > largest else e
        w = -largest if w < -largest else w
        sent = {STORAGES[name].narrow}(w)
        out[i] = sent
        residual[i] = e - {STORAGES[name].widen}(sent)
    return n_nonfinite
"""
    # A subnormal scale has a large rounding error, so quotients can exceed the largest level.
    return f"""\
def {function}(changed, fetched, residual, scales, levels):
    n_nonfinite = 0
    for start in range(0, len(changed), {GROUP}):
        stop = min(start + {GROUP}, len(changed))
        x, c, r, q = changed[start:stop], fetched[start:stop], residual[start:stop], levels[start:stop]
        most = int32(0)
        for i in range(stop - start):
            e = x[i] - {widen}(c[i]) + r[i]
            bad = e - e != float32(0)
            n_nonfinite += bad
            e = float32(0) if bad else e
            r[i] = e
            m = magnitude_bits(e)
            most = m if m > most else most
        scale = float_of_bits(most) / float32({LARGEST_LEVEL})
        scales[start // {GROUP}] = scale
        divisor = scale if scale > float32(0) else float32(1)
        for i in range(stop - start):
            level = r[i] / divisor + float32({TO_WHOLE}) - float32({TO_WHOLE})
            level = float32({LARGEST_LEVEL}) if level > float32({LARGEST_LEVEL}) else level
            level = float32(-{LARGEST_LEVEL}) if level < float32(-{LARGEST_LEVEL}) else level
            q[i] = float_to_int8(level)
            r[i] -= scale * level
    return n_nonfinite
"""


_SOURCES: Final[dict[str, Callable[..., str]]] = {"encode": _encode, "decode": _decode, "add": _add, "push": _push}
_SHORT: Final = "uint16[::1]"
_LEVELS: Final = "float32[::1], int8[::1]"


@functools.cache
def _compiled(what: str, *names: str) -> Callable[..., int]:
    """Return the compiled function ``what`` for these formats: that of changes, then that of fetched blocks."""
    encoded = _LEVELS if names[0] == "int8" else _SHORT
    types: dict[str, str] = {
        "encode": f"float32[::1], {encoded}",
        "decode": f"{encoded}, float32[::1]",
        "add": f"{encoded}, float32[::1]",
        "push": f"float32[::1], {_SHORT}, float32[::1], {encoded}",
    }
    source = f'{_IMPORTS}SIGNATURE = "int64({types[what]})"\n{_SOURCES[what](what, *names)}'
    return cache.compiled(what, "_".join(names), source)


def prepare(wire: Format) -> None:
    """Compile the functions of a format before its first use. Local."""
    empty, encoded = np.zeros(0, np.float32), np.zeros(0, np.uint8)
    wire.encode(empty, encoded)
    wire.decode(encoded, empty)
    wire.add_fetched(encoded, empty)
    wire.push(empty, encoded, empty, encoded)
