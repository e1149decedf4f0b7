"""Storage types: which dtypes the kernels support, what they compute in, and where small changes are accumulated."""

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels import accumulator
from mpitrain.kernels.compile.storage import compute_type, dtypes_label, storage_of, storages_of


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(np.float16, "float32"), (ml_dtypes.bfloat16, "float32"), (np.float32, "float32"), (np.float64, "float64")],
)
def test_small_changes_are_accumulated_in_at_least_float32(dtype, wide):
    assert accumulator(dtype) == np.dtype(wide)
    total, small = np.ones(1, accumulator(dtype)), np.array([1e-4], dtype)
    for _ in range(1000):
        total += small.astype(total.dtype)
    assert total[0] == pytest.approx(1.1, rel=1e-2)  # in 16 bits it would stay 1


@pytest.mark.parametrize(
    ("dtypes", "compute", "label"),
    [
        (("float16", "bfloat16"), "float32", "f16_bf16"),
        (("float16", "float32"), "float32", "f16_f32"),
        (("float64", "float16"), "float64", "f64_f16"),
        ("bfloat16", "float32", "bf16"),
    ],
)
def test_arithmetic_is_in_the_widest_type_and_at_least_float32(dtypes, compute, label):
    storages = storages_of(dtypes, 2)
    assert compute_type(storages) == compute
    assert dtypes_label(storages) == label


def test_a_dtype_is_found_by_name_type_and_object_and_others_are_refused():
    assert storage_of("bfloat16") is storage_of(ml_dtypes.bfloat16) is storage_of(np.dtype(ml_dtypes.bfloat16))
    for wrong in ("int32", np.dtype(">f4"), complex):
        with pytest.raises(ValueError, match="kernels take float16, bfloat16, float32, float64"):
            storage_of(wrong)
    with pytest.raises(ValueError, match="3 arrays need one dtype or 3, not 2"):
        storages_of(("float32", "float32"), 3)
