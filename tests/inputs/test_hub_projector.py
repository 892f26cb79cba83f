"""The projector of a GGUF on Hugging Face comes along, and only where it is wanted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from abl_mlx.directions import direction_file
from tests.models.test_writers import random_direction
from tests.outputs.test_further_files import WIDTH, model, projector
from tests.support import hub_server
from tests.support.hub_environment import hub_environment

CHOSEN = """
import json, sys
from abl_mlx.inputs import hub
print(json.dumps([hub.projector_of(hub.parse(text)) for text in sys.argv[1:]]))
"""

LAID_OUT = {
    "some/one": ["X-Q4_K_M.gguf", "mmproj-F32.gguf", "mmproj-F16.gguf", "mmproj-BF16.gguf"],
    "some/below": ["UD/X-UD-Q5_K_XL.gguf", "MXFP4/mmproj-F16.gguf", "mmproj-x-bf16.gguf"],
    "some/two": [
        *("A-4b-Q8_0.gguf", "A-12b-Q8_0.gguf", "mmproj-A-12b-f16.gguf", "A-4b-mmproj-Q8_0.gguf"),
        *("mmproj-A-4b-bf16.gguf", "mmproj.json"),
    ],
    "some/blind": ["X-Q4_K_M.gguf", "X.imatrix.gguf"],
}


def run(*words: Any, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


def test_which_projector_is_taken(tmp_path: Path) -> None:
    with hub_server.serve(hub_server.Hub(LAID_OUT)) as hub:
        asked = ["some/one:Q4_K_M", "some/below:Q5_K_XL", "hf:some/two/A-4b-Q8_0.gguf"]
        asked += ["hf:some/two/A-12b-Q8_0.gguf", "some/blind:Q4_K_M"]
        found = run("-c", CHOSEN, *asked, environment=hub_environment(hub.url, tmp_path))
        assert json.loads(found.stdout) == [
            *("mmproj-F16.gguf", "mmproj-x-bf16.gguf", "mmproj-A-4b-bf16.gguf"),
            *("mmproj-A-12b-f16.gguf", None),
        ]
        assert hub.fetched == []


def test_a_projector_on_the_hub_comes_beside_the_edited_gguf(tmp_path: Path) -> None:
    seeing = projector(tmp_path / "p.gguf").read_bytes()
    files = {"X-F16.gguf": model(tmp_path / "m.gguf").read_bytes(), "mmproj-F16.gguf": seeing}
    held = {f"some/one {name}": data for name, data in files.items()}
    direction = tmp_path / "d.safetensors"
    direction_file.save(direction, direction_file.DirectionFile(random_direction(WIDTH, 1)))
    with hub_server.serve(hub_server.Hub({"some/one": list(files)}, held)) as hub:
        environment = hub_environment(hub.url, tmp_path)

        def abl_mlx(*words: Any) -> str:
            return run("-m", "abl_mlx", *words, environment=environment).stdout

        out = tmp_path / "out" / "edited.gguf"
        said = abl_mlx("convert", "some/one:F16", tmp_path / "folder")
        assert hub.fetched == ["some/one/X-F16.gguf"]
        assert "an MLX folder has no place for mmproj-F16.gguf" in said
        abl_mlx("apply", direction, "some/one:F16", "-o", out)
        assert hub.fetched == ["some/one/X-F16.gguf", "some/one/mmproj-F16.gguf"]
        assert out.with_name("mmproj-edited.gguf").read_bytes() == seeing
        again = tmp_path / "again.gguf"
        environment["HF_HUB_OFFLINE"] = "1"
        abl_mlx("convert", "hf:some/one/X-F16.gguf", again, "--quantize", "Q8_0")
        assert again.with_name("mmproj-again.gguf").read_bytes() == seeing
        assert len(hub.fetched) == 2
