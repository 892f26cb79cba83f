"""What measuring costs beside the bare forward passes it cannot do without.

    python benchmarks/measure.py
    python benchmarks/measure.py --width 1024 --layers 16 --system 40

128 harmful and 128 harmless prompts run through a Llama of random weights, in the batches that
`capture` makes of them: bare, up to the last layer and with the output head; then `directions
.measure` at 5 positions of every layer, with every prompt run whole; then with what the prompts
begin with (a system prompt of ``--system`` tokens) run once. All passes compute the same products;
what measuring adds is bounded by reading L·P·d numbers a prompt.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from abl_mlx import directions, models, prefix
from abl_mlx.batches import batches
from abl_mlx.hooks import around
from abl_mlx.models import ChatModel
from tests import tiny

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--system", type=int, default=40, help="tokens that all prompts share")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        tiny.write_model(
            folder, "llama", hidden_size=args.width, intermediate_size=3 * args.width,
            num_hidden_layers=args.layers,
        )  # fmt: skip
        chat = models.load(folder)
        harmful, harmless = sequences(128, args.system, 0), sequences(128, args.system, 1000)

        def measured() -> None:
            found = directions.measure(chat, harmful, harmless, POSITIONS)
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
