"""Kernels that a second process compiles while a command begins."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numba
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from abl_mlx.edits import early, projection, projection_kernels, rounding_kernels, turning_kernels
from abl_mlx.edits.edit import Edit, leak_read
from abl_mlx.edits.slabs import Slab
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import gguf_plan
from convert.base import compiled, scale_kernels
from convert.base.locks import Busy, hold
from convert.gguf import ggml_types
from tests.support.places import ROOT

KERNELS = {
    "grids": [
        (rounding_kernels, "lines"), (turning_kernels, "turn_codes"),
        (turning_kernels, "turn_back"), (projection_kernels, "grid_down"),
        (projection_kernels, "grid_across"), (projection_kernels, "both_down"),
        (projection_kernels, "both_across"), (scale_kernels, "near"),
    ],
    "floats": [
        (rounding_kernels, "lines"), (turning_kernels, "turn"), (turning_kernels, "turn_back"),
        (projection_kernels, "down"), (projection_kernels, "across"),
        (projection_kernels, "squares_across"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", KERNELS)
def test_what_is_compiled_early_is_what_an_edit_needs(form, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["early", form])
    monkeypatch.setattr(early, "_end_with_parent", lambda: None)
    needed, compiled_early = signatures(form, lambda: edit(form)), signatures(form, early.main)
    assert all(needed.values())
    assert compiled_early == needed


def signatures(form, work):
    """The types with which work calls each kernel."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in KERNELS[form]:
            kernel, seen = getattr(module, name), found.setdefault(name, set())

            def called(*args, kernel=kernel, seen=seen):
                seen.add(tuple(map(numba.typeof, args)))
                return kernel(*args)

            patch.setattr(module, name, called)
        work()
    return found


def edit(form):
    """Edit a matrix along both axes, as a command does, and read its leak."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((256, 256)).astype(np.float32)
    along = Edit(mx.array(rng.standard_normal((1, 256)).astype(np.float32)))
    raw = ggml_types.quantized_codec(Q.Q4_K).encode(ggml_types.fresh(values, Q.Q4_K))
    source = values
    if form == "grids":
        source = gguf_plan.read(raw, Q.Q4_K, Slab(slice(0, 256), slice(0, 256)))
    for kind in ("linear", "embedding"):
        writer = Writer("w", kind, 0, None, False, nn.Module(), False)
        old = Q.F32 if form == "floats" else Q.Q4_K
        one = gguf_plan.TensorPlan("w", along, writer, "weight", old, Q.Q4_K)
        gguf_plan.edit_slab(one, source, "own" if form == "grids" else "fresh")
        leak_read(along, writer, "weight", lambda *_: (source, source), (256, 256))


def test_the_process_ends_when_the_one_ends_that_began_it(tmp_path):
    """With nothing in the cache it would compile for seconds, and then end with 0."""
    helper = subprocess.Popen(
        [sys.executable, "-m", "abl_mlx.edits.early", "grids"], cwd=ROOT, stdin=subprocess.PIPE,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    helper.communicate(timeout=100)
    assert helper.returncode == early.ENDED


def test_a_function_is_compiled_by_one_process_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "a_kernel.py").write_text(
        "from convert.base.compiled import compiled\n@compiled()\ndef twice(x):\n    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from a_kernel import twice  # type: ignore[import-not-found]

    path = Path(twice._cache._cache_file._index_path).with_suffix(".lock")
    other = compiled._Lock(path)
    other.take()
    found = []
    waiting = threading.Thread(target=lambda: found.append(twice(21)))
    waiting.start()
    waiting.join(0.3)
    assert not found
    assert not compiled.first_arguments(twice)
    other.give()
    waiting.join(100)
    assert found == [42]
    assert compiled.first_arguments(twice) == {"int64"}
    other.take()  # it is free again
    with open(path, "r+b") as third, pytest.raises(Busy):
        hold(third.fileno())
    path.unlink()


def test_garbage_is_collected_again_after_compiling(tmp_path, monkeypatch):
    (tmp_path / "bad_kernel.py").write_text(
        "import gc\nfrom convert.base.compiled import compiled\n"
        "@compiled()\ndef bad(x):\n    return x.nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from bad_kernel import bad  # type: ignore[import-not-found]

    with pytest.raises(numba.TypingError):
        bad(1)
    assert gc.isenabled()
    with compiled._pauses:
        with compiled._pauses:
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("width", [1, 3, 32])
def test_squares_of_short_rows_are_those_of_the_kernel(width):
    rows = np.random.default_rng(width).standard_normal((50, width)).astype(np.float32)
    found = np.empty(50, np.float64)
    projection_kernels.squares_across(rows, found, 0, 50)
    np.testing.assert_array_equal(projection.squares(rows, -1), found)
