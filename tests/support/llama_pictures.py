"""Asks llama.cpp about a picture, in a process of its own, with a model and its projector.

    python -m tests.support.llama_pictures MODEL.gguf MMPROJ.gguf < PICTURES.json

PICTURES.json is a list of PNGs in base64. A list is printed: for each picture the number of tokens
of the prompt, the reply, and the log-probabilities of its first token.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Seen:
    """What llama.cpp answers about a picture.

    Attributes:
        tokens: of the prompt, with those of the picture.
        reply: a few greedy tokens.
        first: token -> log-probability, for the likeliest first tokens.
    """

    tokens: int
    reply: str
    first: dict[str, float]


def png(pixels: np.ndarray) -> bytes:
    """A PNG of (rows, columns, 3) bytes."""
    rows, columns, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + sum_

    raw = b"".join(b"\0" + row.tobytes() for row in pixels.astype(np.uint8))
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def ask(model: Path, mmproj: Path, pictures: list[bytes], timeout: float = 120) -> list[Seen]:
    """Ask llama.cpp about each picture."""
    command = [sys.executable, "-m", "tests.support.llama_pictures", str(model), str(mmproj)]
    given = json.dumps([base64.b64encode(one).decode() for one in pictures])
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Seen(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def _answer(address: str, picture: str) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 4,
        "temperature": 0,
        "cache_prompt": False,
        "logprobs": True,
        "top_logprobs": 20,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        answer = json.loads(stream.read())
    choice = answer["choices"][0]
    first = choice["logprobs"]["content"][0]["top_logprobs"]
    return {
        "tokens": answer["usage"]["prompt_tokens"],
        "reply": choice["message"]["content"],
        "first": {one["token"]: one["logprob"] for one in first},
    }


def _main() -> None:
    import xllamacpp

    model, mmproj = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's messages
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = model, mmproj
    params.n_ctx, params.n_parallel = 1024, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.use_jinja, params.no_extra_bufts = False, True, True
    server = xllamacpp.Server(params)
    pictures = json.loads(sys.stdin.read())
    found = [_answer(server.listening_address, one) for one in pictures]
    print(json.dumps(found), file=out, flush=True)
    os._exit(0)


if __name__ == "__main__":
    _main()
