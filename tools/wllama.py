"""Pack llama.cpp in WebAssembly, for the pages of `abl-mlx publish`, from studio/node_modules.

python -m tools.wllama

The two builds come from the packages @wllama/wllama and @wllama/wllama-compat, whose versions and
hashes are in studio/package-lock.json. They are packed as .xz, a fifth of their size.
"""

from __future__ import annotations

import lzma
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "abl_mlx" / "reports" / "site"
PACKAGES = ROOT / "studio" / "node_modules" / "@wllama"

#: File of the page -> where it lies in the packages.
BUILDS = {
    "wllama.wasm": "wllama/esm/wasm/wllama.wasm",
    "wllama-compat.wasm": "wllama-compat/wasm/wllama.wasm",
    "wllama-compat.js": "wllama-compat/wasm/wllama.js",
}


def main() -> None:
    for name, place in BUILDS.items():
        raw = (PACKAGES / place).read_bytes()
        (SITE / f"{name}.xz").write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
