"""Whether weights are numbers."""

import mlx.core as mx
import pytest

from convert.mlx.finite import all_finite


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("odd", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_found_at_both_ends(dtype: mx.Dtype, odd: str) -> None:
    largest = float(mx.finfo(dtype).max)
    for place in (0, -1):
        values = mx.full((3, 5), largest, dtype)
        assert all_finite(values)
        values[place, place] = float(odd)
        assert not all_finite(values)
        assert not all_finite(values.T)
