"""Talk of a GGUF: llama.cpp replies, and the strength is the scale of a LoRA adapter."""

from itertools import zip_longest

import pytest

from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import SteerOptions
from abl_mlx.commands import session
from abl_mlx.inputs import prompts
from abl_mlx.studio.talking_llamacpp import Talking
from convert.base.errors import UserError
from tests.support.command import abl_mlx

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow


def test_both_columns_of_a_gguf(tmp_path):
    direction, gguf = tmp_path / "direction.safetensors", tmp_path / "demo.gguf"
    abl_mlx("measure", "demo", "--layer", 2, "-o", direction, "--limit", 16)
    abl_mlx("convert", "demo", gguf)
    options = SteerOptions.of(direction=direction)
    steered = session.load(str(gguf), options)
    talking = Talking(str(gguf), gguf, "llama.cpp", options)
    locked, allowed = (one.test.prompts[0] for one in (prompts.load_demo().harmful,
                                                       prompts.load_demo().harmless))  # fmt: skip

    def ask(prompt, **body):
        messages = [{"role": "user", "content": prompt.text}]
        said = list(talking.reply(steered, {"messages": messages, **body}))
        return "".join(one.get("text", "") for one in said), said[-1]

    try:
        assert ask(locked)[0] == locked.answer
        refused, end = ask(locked, strength=0)
        assert classify(refused) is Verdict.REFUSAL
        assert (end["done"], end["verdict"]) == ("stop", "refusal")
        assert ask(allowed, strength=0)[0] == allowed.answer
        (server,) = talking._servers
        # Side by side, as both columns are.
        messages = [{"role": "user", "content": locked.text}]
        asked = [talking.reply(steered, {"messages": messages, "strength": one}) for one in (0, 1)]
        said = [one.get("text", "") for pair in zip_longest(*asked, fillvalue={}) for one in pair]
        assert ("".join(said[::2]), "".join(said[1::2])) == (refused, locked.answer)
        assert ask(locked, max_tokens=2)[1]["done"] == "length"
        # Another direction is another adapter; the server of the first one has ended.
        ask(locked, layer=1, max_tokens=2)
        assert talking._servers != [server]
        assert len(talking._servers) == 1
        steps = talking.reply(steered, {"messages": [{"role": "user", "content": "a"}],
                                        "max_tokens": 3000})  # fmt: skip
        next(one for one in steps if "text" in one)
        steps.close()
        assert talking._servers[0].users == 0
        with pytest.raises(UserError, match="messages must be a list"):
            ask(allowed, messages=[])
    finally:
        talking.close()
