"""Declarations and calls of kernels: what is accepted, and the messages about what is not."""

import numpy as np
import pytest

from mpitrain.kernels import Kernel, elastic_exchange, library, scale


def declare(equations, arrays="x c", scalars="a", guard=None):
    return Kernel("k", equations, arrays=arrays, scalars=scalars, guard=guard, source="test")


@pytest.mark.parametrize(
    ("equations", "problem"),
    [
        ("x = a * c ** 2", r"only \+ - \* / are known.*c \*\* 2"),
        ("x = a * c // x", "only"),
        ("x = +a * c", "only - is known as a sign"),
        ("x = max(a, c)", r"'max\(a, c\)' is neither"),
        ("x = a * c[0]", "neither"),
        ("x = a if c else 1", "neither"),
        ("x = a * 'c'", "not a finite number"),
        ("x = a * c * True", "not a finite number"),
        ("x = a * c + 1e999", "not a finite number"),
        ("x = a * q - c", "'q' in .* is not an array, a scalar or a name assigned above"),
        ("x = d * a - c\nd = x", "'d' in .* is not"),
        ("a = x - c", "assigns to the scalar 'a'"),
        ("x += a * c", "not of the form"),
        ("x = y = a * c", "not of the form"),
        ("x, c = a, a", "not of the form"),
        ("d = a * x - c", "no array is assigned"),
        ("x = a * x", "not used in the equations: c"),
        ("x = c", "not used in the equations: a"),
        ("x = a * * c", "line 1 is not an assignment"),
        ("_d = a * c\nx = _d", "'_d' is reserved"),
        ("float = a * c\nx = float", "'float' is reserved"),
        ("x_at = a * c\nx = x_at", "'x_at' is reserved"),
    ],
)
def test_a_declaration_outside_the_language_names_the_problem(equations, problem):
    with pytest.raises(ValueError, match=f"kernel k: .*{problem}"):
        declare(equations)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"guard": "d"}, "guard 'd' must be assigned exactly once, it is assigned 0 times"),
        ({"guard": "x", "equations": "x = a * c\nx = x + a"}, "assigned 2 times"),
        ({"arrays": "x c a"}, "declared twice"),
        ({"arrays": "x 1c"}, "'1c' is not a name"),
        ({"arrays": "x i"}, "'i' is reserved"),
    ],
)
def test_declared_names_are_checked(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        declare(**{"equations": "x = a * c"} | arguments)


def test_reads_and_writes_are_counted_once_each():
    assert declare("x = a * c").bytes_per_element("float32") == 8  # c read, x written
    assert elastic_exchange.bytes_per_element("float32") == 16
    assert elastic_exchange.bytes_per_element(np.float64) == 32
    assert elastic_exchange.bytes_per_element(("bfloat16", "float32")) == 12
    assert declare("d = x\nx = a * c\nc = x + x - d").bytes_per_element("float16") == 8
    assert declare("x = a\nc = x + 1").bytes_per_element("float32") == 8  # x is used after it is assigned: not read


def test_every_kernel_documents_equations_arrays_guard_source_and_bytes():
    names = [kernel.name for kernel in library()]
    assert len(set(names)) == len(names)
    for kernel in library():
        for target, _ in kernel.equations.statements:
            assert f"{target} = " in kernel.__doc__
        assert kernel.source in kernel.__doc__
        assert f"Arrays: {', '.join(kernel.equations.arrays)}; each (n,)" in kernel.__doc__
        assert (f"Guard: {kernel.equations.guard} is replaced by 0" in kernel.__doc__) == bool(kernel.equations.guard)
        assert f"{kernel.bytes_per_element('float32')} bytes per float32 element" in kernel.__doc__
        assert kernel.doc


def test_scalars_may_be_given_by_position_or_by_name():
    results = []
    for args, kwargs in [((0.25, 0.5), {}), ((0.25,), {"a_c": 0.5}), ((), {"a_c": 0.5, "a_w": 0.25})]:
        x, c = np.arange(5.0), np.ones(5)
        elastic_exchange(x, c, *args, **kwargs)
        results.append((x.tolist(), c.tolist()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((0.1,), {}),
        ((0.1, 0.1, 0.1), {}),
        ((0.1,), {"a_w": 0.1}),
        ((0.1, 0.1), {"a_w": 1.0}),
        ((0.1,), {"b": 1}),
    ],
)
def test_a_wrong_number_of_operands_is_refused(args, kwargs):
    with pytest.raises(ValueError, match=r"elastic_exchange\(x, c; a_w, a_c\) takes 2 arrays"):
        elastic_exchange(np.ones(3), np.ones(3), *args, **kwargs)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("x", "c", "problem"),
    [
        (np.ones(3), np.ones(4), "lengths must agree"),
        (np.ones((3, 1)), np.ones((3, 1)), r"shape \(3, 1\)"),
        (np.ones(()), np.ones(()), "pass a vector"),
        (np.ones(6)[::2], np.ones(3), "strided"),
        (np.ones(3), np.ones(6)[::2], "strided"),
        (
            np.frombuffer(bytes(13), np.float32, 3, 1).copy(),
            np.frombuffer(bytearray(13), np.float32, 3, 1),
            "unaligned",
        ),
        (read_only(np.ones(3)), np.ones(3), "x is read-only"),
        (np.ones(3), read_only(np.ones(3)), "c is read-only"),
        (np.ones(3, np.int16), np.ones(3, np.int16), "int16"),
        (np.ones(3, ">f4"), np.ones(3, ">f4"), "native byte order"),
        (np.ones(3, complex), np.ones(3), "complex128"),
        ([1.0, 2.0], np.ones(2), "x is a list"),
        (np.ones(2), [1.0, 2.0], "c is a list"),
        (None, None, "NoneType"),
    ],
)
def test_unsuitable_arrays_are_refused(x, c, problem):
    with pytest.raises(ValueError, match=problem):
        elastic_exchange(x, c, 0.5, 0.5)


def test_inputs_may_be_read_only_and_subclasses_are_changed_in_place(tmp_path):
    from mpitrain.kernels import elastic_pull

    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=4)
    elastic_pull(x, read_only(np.ones(4, np.float32)), 0.5)
    assert x.tolist() == [0.5] * 4
    x.flush()
    assert np.fromfile(tmp_path / "x", np.float32).tolist() == [0.5] * 4


def test_empty_vectors_are_accepted():
    x = np.ones(0, np.float32)
    assert elastic_exchange(x, x.copy(), 0.5, 0.5) == 0
    assert scale(x, 2.0) == 0
