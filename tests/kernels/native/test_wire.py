"""Wire formats of float32 vectors, against the definitions of the formats."""

import ml_dtypes
import numpy as np
import pytest

from mpitrain import kernels
from mpitrain.errors import UsageError
from mpitrain.kernels.native import wire

SHORT = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
N = [0, 1, 255, 256, 257, 1000]


def bits(values):
    return np.asarray(values).view(f"u{np.asarray(values).itemsize}")


def encoded(form, values):
    out = np.zeros(form.fetched_bytes(values.size), np.uint8)
    form.encode(values, out)
    return out


def decoded(form, raw, n):
    out = np.full(n, np.nan, np.float32)
    form.decode(raw, out)
    return out


def pushed(form, changed, fetched=None, residual=None):
    """Return the decoded change, the residual, and the number of non-finite elements."""
    n = changed.size
    raw = encoded(form, np.zeros(n, np.float32) if fetched is None else fetched)
    left = np.zeros(n, np.float32) if residual is None else residual.copy()
    sent, arrived = np.zeros(form.sent_bytes(n), np.uint8), np.zeros(n, np.float32)
    n_nonfinite = form.push(changed, raw, left, sent)
    form.add(sent, arrived)
    return arrived, left, n_nonfinite


def rounded(name, values):
    """Return float32 values rounded to 16 bits by NumPy and ml_dtypes, with finite numbers kept finite."""
    with np.errstate(over="ignore"):
        short = values.astype(SHORT[name]).astype(np.float32)
    largest = float(ml_dtypes.finfo(SHORT[name]).max)
    return np.where(np.isinf(short) & np.isfinite(values), np.copysign(np.float32(largest), values), short)


@pytest.mark.parametrize("name", SHORT)
def test_every_16_bit_pattern_decodes_to_its_number(name):
    form, patterns = wire.FORMATS[name], np.arange(2**16).astype(np.uint16)
    numbers = decoded(form, patterns.view(np.uint8), patterns.size)
    np.testing.assert_array_equal(numbers, patterns.view(SHORT[name]).astype(np.float32))
    again = encoded(form, numbers).view(np.uint16)
    is_number = ~np.isnan(numbers)
    np.testing.assert_array_equal(again[is_number], patterns[is_number])
    assert np.isnan(again[~is_number].view(SHORT[name])).all()


@pytest.mark.parametrize("name", SHORT)
def test_numbers_between_two_patterns_round_to_nearest_ties_to_even(name):
    """Midpoints of all neighbours, the float32 numbers beside them, and random bits, the largest numbers among them."""
    finite = np.arange(2**15).astype(np.uint16).view(SHORT[name])
    finite = finite[np.isfinite(finite.astype(np.float32))].astype(np.float64)
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(to)) for to in (np.inf, -np.inf)]
    anything = np.random.default_rng(0).integers(0, 2**32, 2**18, np.uint32).view(np.float32)
    values = np.concatenate([middles, *beside, anything])
    values = np.concatenate([values, -values])
    found = decoded(wire.FORMATS[name], encoded(wire.FORMATS[name], values), values.size)
    is_number = ~np.isnan(values)
    np.testing.assert_array_equal(bits(found[is_number]), bits(rounded(name, values[is_number])))
    assert np.isnan(found[~is_number]).all()


@pytest.mark.parametrize("name", SHORT)
def test_infinities_stay_and_large_numbers_stay_finite(name):
    largest = float(ml_dtypes.finfo(SHORT[name]).max)
    huge = float(np.finfo(np.float32).max)
    values = np.array([np.inf, -np.inf, huge, -huge, largest, np.nextafter(np.float32(largest), np.float32(huge))])
    found = decoded(wire.FORMATS[name], encoded(wire.FORMATS[name], values.astype(np.float32)), values.size)
    np.testing.assert_array_equal(found, [np.inf, -np.inf, largest, -largest, largest, largest])


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e30])
def test_the_error_of_int8_is_at_most_half_a_step(n, magnitude):
    values = (np.random.default_rng(n).normal(size=n) * magnitude).astype(np.float32)
    values[n // 3 : n // 2] *= 1e-3  # in the middle of a group or across several
    arrived, left, n_nonfinite = pushed(wire.FORMATS["int8"], values)
    assert n_nonfinite == 0
    for start in range(0, n, 256):
        of_group = slice(start, start + 256)
        step = np.abs(values[of_group]).max().astype(np.float64) / 127
        error = np.abs(values[of_group].astype(np.float64) - arrived[of_group])
        assert error.max() <= step / 2 * (1 + 1e-5)
    np.testing.assert_allclose(arrived + left.astype(np.float64), values, rtol=1e-6, atol=0)


def test_int8_rounds_to_even_levels():
    """The scale of a group whose largest number is 127 is 1."""
    values = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, 3.49, -126.5], np.float32)
    arrived, left, _ = pushed(wire.FORMATS["int8"], values)
    np.testing.assert_array_equal(arrived, [127, 0, 2, 2, 0, -2, 3, -126])
    np.testing.assert_array_equal(left, values - arrived)


def test_int8_of_subnormal_numbers_loses_nothing():
    """The scale itself is rounded to a multiple of the smallest subnormal."""
    smallest = np.float32(2.0**-149)
    values = smallest * np.arange(-1000, 1000, dtype=np.float32)
    arrived, left, _ = pushed(wire.FORMATS["int8"], values)
    np.testing.assert_array_equal(arrived + left, values)
    assert np.abs(arrived).max() > 0
    assert not pushed(wire.FORMATS["int8"], np.zeros(300, np.float32))[0].any()


@pytest.mark.parametrize("name", wire.FORMATS)
@pytest.mark.parametrize("n", N)
def test_the_residual_is_the_rounding_error_of_a_change(name, n):
    """sent + residual = changed - fetched + previous residual, to the rounding of one float32 subtraction."""
    form, rng = wire.FORMATS[name], np.random.default_rng(n)
    start = rng.normal(size=n).astype(np.float32)
    fetched = decoded(form, encoded(form, start), n)
    changed = fetched + (rng.normal(size=n) * 0.01).astype(np.float32)
    before = (rng.normal(size=n) * 1e-4).astype(np.float32)
    arrived, left, n_nonfinite = pushed(form, changed, fetched, before)
    wanted = (changed - fetched) + before
    np.testing.assert_allclose(arrived.astype(np.float64) + left, wanted, rtol=2e-7, atol=1e-9)
    assert n_nonfinite == 0
    assert n < 2 or not np.array_equal(arrived, wanted)  # the encoding does round


@pytest.mark.parametrize("name", wire.FORMATS)
def test_nonfinite_elements_are_not_sent_and_leave_no_residual(name):
    changed = np.linspace(-1, 1, 600, dtype=np.float32)
    changed[[5, 300, 599]] = np.nan, np.inf, -np.inf
    arrived, left, n_nonfinite = pushed(wire.FORMATS[name], changed, residual=np.full(600, 0.25, np.float32))
    assert n_nonfinite == 3
    assert not arrived[[5, 300, 599]].any()
    assert not left[[5, 300, 599]].any()
    sound = np.isfinite(changed)
    np.testing.assert_allclose((arrived + left)[sound], (changed + np.float32(0.25))[sound], rtol=1e-6)


def test_a_change_beyond_the_range_of_float16_arrives_in_several_visits():
    arrived, left, _ = pushed(wire.FORMATS["float16"], np.array([1e5, -2e5], np.float32))
    np.testing.assert_array_equal(arrived, [65504, -65504])
    second, left, _ = pushed(wire.FORMATS["float16"], np.zeros(2, np.float32), residual=left)
    assert (arrived + second + left).tolist() == [1e5, -2e5]
    assert left[0] == 0


def test_encoded_sizes():
    sizes = {name: (form.fetched_bytes(1000), form.sent_bytes(1000)) for name, form in wire.FORMATS.items()}
    assert sizes == {"bfloat16": (2000, 2000), "float16": (2000, 2000), "int8": (2000, 1016)}


@pytest.mark.parametrize("name", SHORT)
def test_encoding_agrees_with_the_kernels(name):
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    short = np.zeros(1000, SHORT[name])
    kernels.copy(short, values)
    np.testing.assert_array_equal(encoded(wire.FORMATS[name], values).view(np.uint16), short.view(np.uint16))


def test_an_unknown_format_is_an_error():
    assert wire.format_of("float32") is None
    with pytest.raises(UsageError, match="float32, bfloat16, float16, int8"):
        wire.format_of("fp8")
