"""ggml's own quantizer through ctypes, against gguf-py where both can."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from convert.base.errors import UserError
from convert.gguf import ggml


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 5, 512)).astype(np.float32)


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.MXFP4])
def test_both_encoders_write_the_same_bytes(values: np.ndarray, kind: Q) -> None:
    np.testing.assert_array_equal(ggml.quantize(values, kind), gguf.quants.quantize(values, kind))


@pytest.mark.parametrize(
    ("kind", "error"),
    [(Q.Q2_K, 0.32), (Q.Q3_K, 0.17), (Q.Q4_K, 0.08), (Q.Q5_K, 0.04), (Q.Q6_K, 0.02)],
)
def test_k_quants_come_back_near_and_alike_from_both_decoders(
    values: np.ndarray, kind: Q, error: float
) -> None:
    encoded = ggml.quantize(values, kind)
    decoded = ggml.dequantize(encoded, kind)
    assert decoded.shape == values.shape
    np.testing.assert_array_equal(decoded, gguf.quants.dequantize(encoded, kind))
    assert np.linalg.norm(decoded - values) < error * np.linalg.norm(values)


def test_many_rows_over_threads_equal_the_rows_one_by_one() -> None:
    rows = np.random.default_rng(1).standard_normal((9000, 256)).astype(np.float32)
    encoded = ggml.quantize(rows, Q.Q4_K)
    for row in (0, 4095, 4096, 8999):
        np.testing.assert_array_equal(encoded[row], ggml.quantize(rows[row], Q.Q4_K))


def test_rows_that_do_not_fit_the_blocks_are_refused(values: np.ndarray) -> None:
    with pytest.raises(UserError, match="blocks hold 256"):
        ggml.quantize(values[..., :128], Q.Q6_K)


def test_without_a_ggml_the_message_says_what_to_install(
    values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    ggml._find.cache_clear()
    monkeypatch.setattr(ggml, "_candidates", lambda: iter(()))
    try:
        assert not ggml.available()
        with pytest.raises(UserError, match=r"Q4_K needs ggml.*pip install libggml-python"):
            ggml.quantize(values, Q.Q4_K)
    finally:
        monkeypatch.undo()
        ggml._find.cache_clear()


def test_a_named_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml._find.cache_clear()
    monkeypatch.setenv(ggml.ENVIRONMENT, "/nowhere/libggml-base.so")
    try:
        with pytest.raises(UserError, match=r"/nowhere/libggml-base\.so, which is no file"):
            ggml.available()
    finally:
        monkeypatch.undo()
        ggml._find.cache_clear()
