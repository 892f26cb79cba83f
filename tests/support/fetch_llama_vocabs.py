"""llama.cpp's own vocabulary files with their test vectors, from the sdist of llama-cpp-python.

    python tests/support/fetch_llama_vocabs.py

downloads it once (77 MB) through pip and keeps models/ggml-vocab-* (74 MB) in $ABL_MLX_CACHE or
~/.cache/abl-mlx. NAME.gguf is a vocabulary without weights, NAME.gguf.inp has texts, NAME.gguf.out
a line of token ids for each: what llama.cpp makes of it without bos and eos.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.3.36"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_INSIDE = "/vendor/llama.cpp/models/ggml-vocab-"
_BETWEEN_TEXTS = "\n__ggml_vocab_test__\n"


class Unavailable(Exception):
    """The files are not in the cache and cannot be fetched; says why."""


def fetch() -> Path:
    """The folder with the files, downloading it if need be.

    Raises:
        Unavailable: when there is no pip, no index in reach, or no such version.
    """
    cache = Path(os.environ.get("ABL_MLX_CACHE") or Path.home() / ".cache" / "abl-mlx")
    folder = cache / f"llama-vocabs-{VERSION}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".llama-vocabs-") as name:
            temporary = Path(name)
            archive = _download(temporary)
            extracted = temporary / "extracted"
            extracted.mkdir()
            _extract(archive, extracted)
            try:
                extracted.rename(folder)
            except OSError:
                # Another process was faster.
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise Unavailable(f"{cache} cannot be written to: {error}") from None
    return folder


def _download(folder: Path) -> Path:
    # Without a look at what the package depends on; its own metadata pip insists on, which takes
    # a build backend, but no compiler.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "60"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable("pip download took more than ten minutes") from None
    archives = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if line.startswith("ERROR")] or lines
        raise Unavailable(f"pip download failed: {telling[-1] if telling else 'no message'}")
    return archives[0]


def _extract(archive: Path, folder: Path) -> None:
    """Only the vocabulary files, as plain files in ``folder``."""
    with tarfile.open(archive) as files:
        for member in files:
            if _INSIDE in member.name and member.isfile():
                source = files.extractfile(member)
                assert source is not None
                with source, open(folder / member.name.rpartition("/")[2], "wb") as target:
                    shutil.copyfileobj(source, target)
    if not any(folder.iterdir()):
        raise Unavailable(f"{archive.name} has no vocabulary files")


def vectors(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    """The texts of a vocabulary and the token ids that llama.cpp gives them."""
    path = folder / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{path}.inp").read_bytes().decode().split(_BETWEEN_TEXTS)
    lines = Path(f"{path}.out").read_text().split("\n")
    ids = [[int(word) for word in line.split()] for line in lines[: len(texts)]]
    if len(ids) != len(texts) or any(line.strip() for line in lines[len(texts) :]):
        raise ValueError(f"{path}.inp and .out do not have the same number of entries")
    return list(zip(texts, ids, strict=True))


if __name__ == "__main__":
    try:
        print(fetch())
    except Unavailable as problem:
        sys.exit(str(problem))
