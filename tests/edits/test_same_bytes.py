"""The same edit gives the same bytes on every CPU, with any number of cores, and with any BLAS."""

from __future__ import annotations

import importlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from abl_mlx.edits import projection
from convert.gguf.ggml_types import CODEBOOK_TYPES, GRID_TYPES
from tests.support.places import ROOT

# What is edited: every quantized type that the argument says, and floats; down columns and along
# rows; one direction and two; MLX's modes. Prints a hash for each.
PROGRAM = """
import hashlib, sys
import mlx.core as mx, mlx.nn as nn, numpy as np
from gguf import GGMLQuantizationType as Q
from abl_mlx.edits import edit as edits, rounding, slabs
from abl_mlx.outputs import gguf_plan as gguf_edit, folder_quantized as mlx_edit
from abl_mlx.edits.edit import Edit
from abl_mlx.models.writers import Writer
from convert.gguf import ggml_types
from convert.mlx.grids import MlxCodec, Quantization

rng = np.random.default_rng(0)
# Two seconds an edit of this size by codebooks, a twentieth of that by grids.
d, n = (64, 512) if sys.argv[1] == "codebooks" else (512, 768)
values = (0.02 * rng.standard_normal((d, n))).astype(np.float32)
values += 0.02 * np.outer(rng.standard_normal(d), rng.standard_normal(n)).astype(np.float32)

def show(name, raw):
    print(name, hashlib.sha256(np.ascontiguousarray(raw).tobytes()).hexdigest())

def writer(kind):
    return Writer("w", kind, 0, None, False, nn.Module(), False)

def direction(count, width):
    return mx.array(np.random.default_rng(count).standard_normal((count, width)).astype("f4"))

kinds = ggml_types.CODEBOOK_TYPES if sys.argv[1] == "codebooks" else ggml_types.GRID_TYPES
for kind in sorted(kinds) + [Q.F32, Q.F16, Q.BF16]:
    codec = ggml_types.codec(kind)
    own = codec.round(values) if kind in (Q.F32, Q.F16, Q.BF16) else ggml_types.fresh(values, kind)
    for what in ("linear", "embedding"):
        for count in (1, 2):
            width = d if what == "linear" else n
            edit = Edit(direction(count, width), norm="columns" if count == 2 else "none")
            plan = gguf_edit.TensorPlan("w", edit, writer(what), "weight", kind, kind)
            for source in ("own", "fresh"):
                show(f"{kind.name} {what} {count} {source}",
                     gguf_edit.edit_slab(plan, own, source))
for mode in (Quantization(4, 64), Quantization(2, 32), Quantization(4, 32, "mxfp4")):
    codec = MlxCodec(mode, "U8" if mode.mode == "mxfp4" else "BF16")
    own = codec.fresh(values)
    edit = Edit(direction(1, d))
    class One:
        name, parameter = "w", "weight"
    One.edit, One.writer = edit, writer("linear")
    edited = slabs.exact_edit(One, own.values())
    show(str(mode), codec.encode(rounding.round_onto(own, edited, mlx_edit.encoders(codec, None),
                                                     "own")).weight)
"""


def hashes(kinds: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kinds],
        cwd=ROOT, check=True, capture_output=True, text=True,
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        # Kernels are compiled twice: half a minute for grids, minutes for codebooks.
        pytest.param("grids", len(GRID_TYPES), marks=pytest.mark.slow),
        pytest.param("codebooks", len(CODEBOOK_TYPES), marks=pytest.mark.slow),
    ],
)
def test_other_cpus_give_the_same_bytes(kinds: str, count: int, tmp_path: Path) -> None:
    here = hashes(kinds)
    assert len(here) == 8 * (count + 3) + 3
    assert len({line.split()[-1] for line in here}) > len(here) // 2
    plain = hashes(
        kinds,
        NUMBA_CPU_NAME="generic", NUMBA_CACHE_DIR=str(tmp_path), OPENBLAS_CORETYPE="Prescott",
        OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="1", NPY_DISABLE_CPU_FEATURES=_features(),
    )  # fmt: skip
    assert plain == here


def _features() -> str:
    """What this CPU has beyond the least that NumPy needs."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("shape", [(70, 50), (3, 70, 50), (2, 1, 33), (1, 2100)])
def test_components_and_what_is_left_without_them(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape).astype(np.float32)
    d = shape[axis]
    k = min(2, d)
    basis = projection.orthonormal(rng.standard_normal((k, d)).astype(np.float32))
    assert np.abs(basis.astype(np.float64) @ basis.T - np.eye(k)).max() < 1e-6
    wide, u = values.astype(np.float64), basis.astype(np.float64)
    along = wide @ u.T if axis == -1 else u @ wide
    found = projection.along(basis, values, axis)
    assert found.shape == along.shape
    assert np.abs(found - along).max() < 2e-6
    left = wide - (along @ u if axis == -1 else u.T @ along)
    assert np.abs(projection.without(basis, found, values, axis) - left).max() < 3e-6
    squares = (wide**2).sum(axis=axis)
    assert np.allclose(projection.squares(values, axis), squares, rtol=1e-12)
    assert projection.square(values) == pytest.approx((wide**2).sum(), rel=1e-12)


def test_a_basis_keeps_signs_and_refuses_what_spans_nothing() -> None:
    found = projection.orthonormal(np.array([[0, -2.0, 0], [1, 1, 0]], np.float32))
    assert np.array_equal(found, np.array([[0, -1, 0], [1, 0, 0]], np.float32))
    for wrong in ([[0.0, 0]], [[np.nan, 1]], [[1, 2], [2, 4.0]]):
        with pytest.raises(ValueError, match=r"zero|dependent"):
            projection.orthonormal(np.array(wrong, np.float32))


# --- where machine code is kept ------------------------------------------------------------------

READ_ONLY = """
import sys, tempfile
sys.path.insert(0, sys.argv[1])
import numpy as np
from numba.core import caching
# As root every folder is writable, so that the places are taken away by name.
class Nowhere:
    @classmethod
    def from_function(cls, function, file):
        return None
caching.CacheImpl._locator_classes = [
    found if found.__name__.endswith("UserProvidedCacheLocator") else Nowhere
    for found in caching.CacheImpl._locator_classes
]
from abl_mlx.edits import projection
found = projection.along(np.eye(2, dtype=np.float32), np.ones((2, 3), np.float32), -2)
print(found.tolist())
"""


def read_only(temporary: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(ROOT)], capture_output=True, text=True,
        env=environment | {"TMPDIR": str(temporary)},
    )  # fmt: skip


def test_without_a_place_for_machine_code_a_private_temporary_one_is_used(tmp_path: Path) -> None:
    done = read_only(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]\n"
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.rglob("*.nbc"))


CALLEE = """
from convert.base.compiled import compiled
@compiled()
def one():
    return {}
"""
CALLER = """
from callee import one
from convert.base.compiled import compiled
@compiled()
def two():
    return 2 * one()
"""


def test_machine_code_is_old_when_a_function_that_it_calls_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a `git pull`, say, that changes one file of several."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "caller.py").write_text(CALLER)
    found = []
    for number, hits in (1, 0), (1, 1), (30, 0):
        if hits == 0:
            (tmp_path / "callee.py").write_text(CALLEE.format(number))
        importlib.invalidate_caches()
        two = importlib.import_module("caller").two
        found.append(two())
        for name in ("caller", "callee"):
            del sys.modules[name]
        assert sum(two.stats.cache_hits.values()) == hits
    assert found == [2, 2, 60]


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / f"abl-mlx-numba-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    done = read_only(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(folder.rglob("*"))


def test_no_kernel_is_compiled_with_fastmath() -> None:
    from abl_mlx.edits import level_kernels, projection_kernels, rounding_kernels
    from convert.mlx import packed_kernels

    kernels = [
        value
        for module in (level_kernels, projection_kernels, rounding_kernels, packed_kernels)
        for value in [*vars(module).values(), *packed_kernels.EVEN.values()]
        if hasattr(value, "targetoptions")
    ]
    assert len(kernels) > 10
    assert not any(kernel.targetoptions.get("fastmath") for kernel in kernels)
