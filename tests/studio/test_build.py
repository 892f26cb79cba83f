"""The static files that are checked in are those that the sources of the pages give."""

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from abl_mlx.reports import site_page
from tools import wllama

ROOT = Path(__file__).parents[2]
SOURCES, STATIC = ROOT / "studio", ROOT / "abl_mlx" / "studio" / "static"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npx") is None, reason="needs Node")
def test_the_build_gives_the_static_files(tmp_path):
    if not (SOURCES / "node_modules").is_dir():
        pytest.skip("needs `npm ci` in studio/")
    run(["tsc", "--noEmit"])
    for config, static in (("vite.config.js", STATIC), ("vite.site.config.js", site_page.STATIC)):
        out = tmp_path / config
        run(["vite", "build", "-c", config, "--outDir", str(out)])
        built = {one.name: one.read_bytes() for one in out.iterdir()}
        assert built == {
            one.name: one.read_bytes() for one in static.iterdir() if one.suffix != ".xz"
        }
    packed = {one.stem: lzma.decompress(one.read_bytes()) for one in site_page.STATIC.glob("*.xz")}
    assert packed == {
        name: (wllama.PACKAGES / place).read_bytes() for name, place in wllama.BUILDS.items()
    }


def run(command):
    subprocess.run(["npx", "--no-install", *command], cwd=SOURCES, check=True, timeout=300)
