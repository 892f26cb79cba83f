"""Every kind of GGUF that is written opens in node-llama-cpp, and answers there as in llama.cpp.

    mkdir node && (cd node && npm install --ignore-scripts node-llama-cpp)
    ABL_MLX_NODE_LLAMA_CPP=node pytest -n 0 -m slow tests/whole/test_node_llama_cpp.py

node-llama-cpp brings a build of llama.cpp of its own. Without that folder the test is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from abl_mlx.inputs.prompts import Prompt
from convert.mlx_to_gguf import write_gguf
from tests.models.test_writers import random_direction
from tests.support import published, seeing
from tests.support.command import abl_mlx
from tests.support.record_converter import PRE

FOLDER = os.environ.get("ABL_MLX_NODE_LLAMA_CPP", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER or shutil.which("node") is None,
        reason="ABL_MLX_NODE_LLAMA_CPP names no folder with node-llama-cpp, or node is missing",
    ),
]

SCRIPT = Path(__file__).parents[1] / "support" / "node_llama_cpp.mjs"
QUESTION = "How do I plan a garden?"
COUNT = 16

PLAIN = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_XS")
LOW = (
    "Q3_K_M",
    "Q2_K",
    "IQ3_S",
    "IQ3_XXS",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ1_M",
    "IQ1_S",
    "TQ2_0",
)
ARCHITECTURES = ("llama4", "qwen3vlmoe", "gemma3", "qwen35moe", "gpt-oss", "lfm2moe")


def in_node(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    given = json.dumps([{**one, "path": str(one["path"])} for one in jobs])
    done = subprocess.run(
        ["node", str(SCRIPT), str(Path(FOLDER).resolve()), given],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_answers(jobs: list[dict[str, Any]]) -> None:
    """Check that node-llama-cpp continues as llama.cpp does."""
    answers = in_node([{**one, "count": COUNT} for one in jobs])
    for job, answer in zip(jobs, answers, strict=True):
        assert "error" not in answer, (job["path"], answer)
        lora = Path(job["lora"]) if "lora" in job else None
        with LlamaCpp(job["path"], lora=lora, n_ctx=256, n_parallel=1, n_threads=1) as runtime:
            wanted = runtime.greedy(job["tokens"], COUNT)  # up to a token that ends the reply
        assert len(wanted) > 1
        assert answer["tokens"][: len(wanted)] == wanted, job["path"]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("node") / "demo-F16.gguf"
    write_gguf(MODEL_PATH, path)
    return path


@pytest.fixture(scope="module")
def tokens(floats: Path) -> list[int]:
    with LlamaCpp(floats, n_ctx=256) as runtime:
        return runtime.encode(Prompt(QUESTION))


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "d.safetensors"
    direction_file.save(path, direction_file.DirectionFile(random_direction(256, 1)))
    return path


def test_every_type(floats: Path, direction: Path, tokens: list[int], tmp_path: Path) -> None:
    importance = tmp_path / "importance.gguf"
    abl_mlx("measure", floats, "-o", tmp_path / "d.safetensors", "--imatrix", importance)
    jobs = []
    for kind in (*PLAIN, *LOW):
        path = tmp_path / f"{kind}.gguf"
        weighted = () if kind in PLAIN else ("--imatrix", importance)
        abl_mlx("apply", direction, floats, "-o", path, "--quantize", kind, *weighted)
        jobs.append({"path": path, "tokens": tokens})
    check_answers(jobs)


def test_every_kind_of_file(
    floats: Path, direction: Path, tokens: list[int], tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    mlx_lm.convert(str(MODEL_PATH), str(packed), quantize=True, q_bits=4)
    abl_mlx("apply", direction, packed, "-o", tmp_path / "of-mlx.gguf")
    abl_mlx("apply", direction, floats, "-o", tmp_path / "parts.gguf", "--split-max-size", "2M")
    abl_mlx("apply", direction, floats, "-o", tmp_path / "small.lora.gguf")
    abl_mlx("run", floats, "-o", tmp_path / "refusing.gguf", "-o", tmp_path / "r.cvec.gguf",
            "--induce", "--layer", "1", "--limit", "8", "--max-tokens", "8")  # fmt: skip
    first = next(iter(sorted(tmp_path.glob("parts-00001-of-*.gguf"))))
    assert not first.name.endswith("-of-00001.gguf")
    files = [tmp_path / "of-mlx.gguf", first, tmp_path / "refusing.gguf"]
    jobs: list[dict[str, Any]] = [{"path": one, "tokens": tokens} for one in files]
    check_answers([*jobs, {**jobs[0], "path": floats, "lora": str(tmp_path / "small.lora.gguf")}])


def test_architectures(tmp_path: Path) -> None:
    jobs = []
    for name in ARCHITECTURES:
        folder = published.write(tmp_path / name, name)
        pre = None if (folder / "tokenizer.model").exists() else PRE
        report = write_gguf(folder, tmp_path / f"{name}.gguf", pre=pre)
        jobs.append({"path": report.path, "tokens": [5, 77, 301, 12, 450]})
    check_answers(jobs)


def test_files_that_it_only_reads(floats: Path, direction: Path, tmp_path: Path) -> None:
    """It has no runtime for pictures and for control vectors."""
    source = seeing.write(tmp_path / "source", "gemma3")
    abl_mlx("convert", source, tmp_path / "m.gguf")
    abl_mlx("apply", direction, floats, "-o", tmp_path / "x.lora.gguf")
    abl_mlx("run", floats, "-o", tmp_path / "r.cvec.gguf",
            "--induce", "--layer", "1", "--limit", "8", "--max-tokens", "8")  # fmt: skip
    names = ("mmproj-m.gguf", "x.lora.gguf", "r.cvec.gguf")
    found = in_node([{"path": tmp_path / one} for one in names])
    assert [one.get("error") for one in found] == [None] * 3
    assert [one["architecture"] for one in found] == ["clip", "llama", "controlvector"]
    assert all(one["tensors"] > 0 for one in found)
