"""The time of measuring, compared with that of the forward passes alone.

    python benchmarks/measure.py
    python benchmarks/measure.py --width 1024 --layers 16 --system 40
    python benchmarks/measure.py --model FILE.gguf

128 harmful and 128 harmless prompts run through a Llama of random weights, in the batches that
`capture` makes of them: bare passes up to the last layer, and with the output head; then
`directions.measure` at 5 positions of every layer, with every prompt run whole; then with the
common beginning of the prompts (a system prompt of ``--system`` tokens) run once. All passes
compute the same products; measuring also reads L·P·d numbers per prompt.

With ``--model`` the passes are those of a real GGUF over ``--tokens`` tokens of prompts. They are
compared with a bound (two operations for each weight and token, at the speed of NumPy's sgemm on
this machine) and with llama.cpp's prompt processing of the same tokens on the same cores. CPU
seconds of all cores are printed too, because a busy machine lengthens the others.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.directions import measuring
from abl_mlx.models import chat_model, from_gguf, heads, prefix
from abl_mlx.models.batches import batches
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.plain import vocabulary
from convert.gguf.file import GgufSource
from tests.support import tiny

POSITIONS = [-5, -4, -3, -2, -1]


def sequences(count: int, system: int, seed: int) -> list[list[int]]:
    """Prompts of 12 to 40 tokens behind ``system`` common ones."""
    lengths = mx.random.randint(12, 41, (count,), key=mx.random.key(seed)).tolist()
    return [
        list(range(5, 5 + system))
        + mx.random.randint(5, 60, (length,), key=mx.random.key(seed + index)).tolist()
        for index, length in enumerate(lengths)  # type: ignore[arg-type]
    ]


def bare(chat: ChatModel, prompts: list[list[int]], head: bool) -> None:
    """The forward passes alone."""
    last: list[mx.array] = []

    def keep(call: Callable[..., mx.array], *args: object, **kwargs: object) -> mx.array:
        last[:] = [call(*args, **kwargs)]
        return last[0]

    with around([(chat.layers[-1], keep)]):
        for batch in batches(prompts):
            with nullcontext() if head else heads.unseen(chat.model):
                output = chat.model(batch.tokens)
            mx.eval(output if head else last)


def seconds(work: Callable[[], object], repeat: int) -> float:
    """The best of some runs."""
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def clocks(work: Callable[[], object], repeat: int) -> tuple[float, float]:
    """The best of some runs: seconds, and CPU seconds of all cores together."""
    found = []
    for _ in range(repeat):
        start, used = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - start, time.process_time() - used))
    return min(one for one, _ in found), min(one for _, one in found)


def sgemm(operations: float) -> tuple[float, float]:
    """Seconds of NumPy's float32 product for this many operations, at the sizes of a batch."""
    x = np.random.default_rng(0).standard_normal((2048, 1024), dtype=np.float32)
    w = np.random.default_rng(1).standard_normal((4096, 1024), dtype=np.float32)
    x @ w.T
    share = operations / (2 * 2048 * 1024 * 4096)
    whole, used = clocks(lambda: x @ w.T, 10)
    return share * whole, share * used


def real(path: Path, tokens: int, repeat: int) -> None:
    """Ours, the bound, and llama.cpp, over the same prompts of a real GGUF."""
    with GgufSource(path) as source:
        chat, _ = from_gguf.load(source)
        table = {name: math.prod(entry.shape) for name, entry in source.tensors.items()}
    weights = sum(size for name, size in table.items() if name.startswith("blk."))
    width = vocabulary(chat)
    prompts: list[list[int]] = []
    while sum(map(len, prompts)) < tokens:
        length = 24 + 8 * (len(prompts) % 5)
        drawn = np.random.default_rng(len(prompts)).integers(0, width // 2, length)
        prompts.append([int(token) for token in drawn])
    count = sum(map(len, prompts))
    bare(chat, prompts[:4], head=False)  # warm
    ours, used = clocks(lambda: bare(chat, prompts, head=False), repeat)
    bound, least = sgemm(2 * weights * count)
    print(f"{path.name}: {len(prompts)} prompts, {count:,} tokens, {weights / 1e6:.0f} M weights")
    print(f"bound, NumPy's sgemm   {bound:7.2f} s   {least:7.2f} CPU s")
    print(f"bare passes, no head   {ours:7.2f} s   {used:7.2f} CPU s")
    print(f"                       {ours / bound:7.2f} ×   {used / least:7.2f} × bound")
    with LlamaCpp(path, n_ctx=64, n_parallel=1, n_threads=len(os.sched_getaffinity(0))) as runtime:
        runtime.greedy(prompts[0], 1)  # warm

        def ask() -> float:
            """Milliseconds that llama.cpp says it spent on prompts."""
            spent = 0.0
            for prompt in prompts:
                request = {"prompt": prompt, "n_predict": 1, "cache_prompt": False}
                spent += runtime._post("/completion", request)["timings"]["prompt_ms"]
            return spent

        theirs = min(ask() for _ in range(repeat)) / 1000
    print(f"llama.cpp, prompts     {theirs:7.2f} s   ours is {ours / theirs:.2f} × that")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--system", type=int, default=40, help="tokens that all prompts share")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a GGUF, instead of the random Llama")
    parser.add_argument("--tokens", type=int, default=2048, help="of prompts, with --model")
    args = parser.parse_args()
    if args.model:
        real(args.model, args.tokens, args.repeat)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        tiny.write_model(
            folder, "llama", hidden_size=args.width, intermediate_size=3 * args.width,
            num_hidden_layers=args.layers,
        )  # fmt: skip
        chat = chat_model.load(folder)
        harmful, harmless = sequences(128, args.system, 0), sequences(128, args.system, 1000)

        def measured() -> None:
            found = measuring.measure(chat, harmful, harmless, POSITIONS)
            mx.eval(found.harmful_mean, found.harmless_mean)

        def passes(head: bool) -> None:
            bare(chat, harmful, head)
            bare(chat, harmless, head)

        passes(True)  # warm
        plain, headed = (seconds(lambda h=h: passes(h), args.repeat) for h in (False, True))  # type: ignore[misc]
        shortest, prefix.SHORTEST = prefix.SHORTEST, 10**9
        whole = seconds(measured, args.repeat)
        prefix.SHORTEST = shortest
        shared = seconds(measured, args.repeat)
    tokens = sum(map(len, harmful + harmless))
    shape = f"{args.layers} layers of {args.width}"
    print(f"{shape}, 256 prompts, {tokens:,} tokens, {args.system} of each shared")
    print(f"bare passes, no head   {plain:7.2f} s")
    print(f"bare passes, with head {headed:7.2f} s")
    print(f"measure, whole prompts {whole:7.2f} s   {whole / plain:.2f} × bare")
    print(f"measure, shared prefix {shared:7.2f} s   {shared / plain:.2f} × bare")


if __name__ == "__main__":
    main()
