"""The static files that are checked in are those that the sources of the pages give."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES, STATIC = ROOT / "studio", ROOT / "abl_mlx" / "studio" / "static"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npx") is None, reason="needs Node")
def test_the_build_gives_the_static_files(tmp_path):
    if not (SOURCES / "node_modules").is_dir():
        pytest.skip("needs `npm ci` in studio/")
    for command in (["tsc", "--noEmit"], ["vite", "build", "--outDir", str(tmp_path)]):
        subprocess.run(["npx", "--no-install", *command], cwd=SOURCES, check=True, timeout=300)
    built = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    assert built == {one.name: one.read_bytes() for one in STATIC.iterdir()}
