"""Attacks over a connection: a hub and a chat server that answer wrongly in many ways.

`attacks.hostile_server` acts as both; the requested address says what it does.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from attacks.case import Case

#: The environment variable that tells the attacking processes the server's address.
ADDRESS = "ABL_ATTACKS_ADDRESS"

HUB = [
    "sound", "truncated", "longer", "no length", "wrong etag", "bad json", "html", "empty", "deep",
    "no siblings", "traversal", "absolute", "control", "null", "redirect loop", "redirect away",
    "404", "401", "403", "429", "500", "garbage", "closed", "wrong commit", "many", "mutated",
]  # fmt: skip

SERVER = [
    "sound", "empty", "html", "bad json", "list", "deep", "null", "no choices", "no message",
    "content list", "content number", "control", "surrogate", "long", "500", "404", "401", "429",
    "closed", "garbage", "half", "slow", "redirect loop", "chunks", "mutated", "digits", "gzip",
]  # fmt: skip


def hub(base: Path, to: Path, rng: Random) -> Case:
    """A repository of a hub that answers wrongly."""
    how = rng.randrange(len(HUB))
    name = f"attack/h{how}-{rng.getrandbits(40):x}"
    what = rng.choice(["inspect", "inspect", "convert", "gguf"])
    arguments = {
        "inspect": ["inspect", name],
        "convert": ["convert", name, str(to / "out.gguf")],
        "gguf": ["inspect", f"{name}:F16"],
    }[what]
    return Case(tuple(arguments), 500_000, (to / "out.gguf",))


def server(base: Path, to: Path, rng: Random) -> Case:
    """A chat server that answers wrongly."""
    how = rng.randrange(len(SERVER))
    url = f"{os.environ[ADDRESS]}/s{how}-{rng.getrandbits(40):x}/v1"
    more = ["--timeout", "1", "--retries", "0", "--limit", "1"]
    if rng.random() < 0.2:
        more += ["--judge", f"{os.environ[ADDRESS]}/s0-{rng.getrandbits(40):x}/v1"]
    return Case(("eval", url, *more), 10_000_000)
