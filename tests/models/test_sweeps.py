"""A streamed model: figures equal those in memory, and one stage at a time has its weights."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from mlx_lm.utils import load as load_with_mlx
from mlx_lm.utils import quantize_model, save_config

from abl_mlx.directions import measuring
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation
from abl_mlx.models import capture, from_gguf, parked, prefix, sweeps
from abl_mlx.models.chat_model import ChatModel, load
from abl_mlx.models.hooks import around, around_method
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.shortcuts import trusted
from abl_mlx.models.stages import Stages
from abl_mlx.models.writers import find_writers
from abl_mlx.support.arrays import parameters
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import memory
from tests.support import tiny_gguf, zoo
from tests.support.gguf_recipes import RECIPES

PROMPTS = [
    [5, 7, 9, 11, 3, 8],
    [5, 7, 9, 11, 3],
    [4, 6, 9],
    [5, 7, 9, 11, 3, 8, 2, 2, 6, 7, 12, 44],
]


def streamed(chat: ChatModel) -> ChatModel:
    """The same model, whose matrices are handed out from memory."""
    kept = dict(parameters(chat.model))

    def read(paths: Sequence[str]) -> dict[str, mx.array]:
        return {path: kept[path] for path in paths}

    sweeps.stream(chat.model, Stages(chat.model, chat.layers, read))
    return chat


def same(one: ChatModel, other: ChatModel, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
    """Assert that states, stored states and logits are the same."""
    for positions in ((-1,), (-2, -1)):
        expected = capture.mean(one, prompts, positions)
        np.testing.assert_allclose(
            np.array(capture.mean(other, prompts, positions)), np.array(expected), rtol=1e-5,
            atol=1e-5 * float(mx.abs(expected).max()),
        )  # fmt: skip
    with capture.stored(one, prompts) as first, capture.stored(other, prompts) as second:
        np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        np.array(first_reply_token(other, prompts)), np.array(first_reply_token(one, prompts)),
        atol=1e-4,
    )  # fmt: skip


# A dense model, a mixture of experts, hybrids, shared keys and values, and a layer that runs again.
@pytest.mark.parametrize(
    "arch", ["llama", "qwen3_moe", "falcon_h1", "qwen3_next", "gemma4_text", "nanochat"]
)
def test_any_architecture_gives_the_same_figures(arch: str) -> None:
    same(zoo.chat(arch), streamed(zoo.chat(arch)))


def test_states_over_the_bound_go_to_files(monkeypatch) -> None:
    written: list[int] = []
    plain, chat = zoo.chat("llama"), streamed(zoo.chat("llama"))
    monkeypatch.setattr(parked, "IN_MEMORY", 1 << 13)
    monkeypatch.setattr(parked, "_SMALL", 0)
    write = parked.Parking._written

    def counted(self: parked.Parking, one: mx.array) -> Path:
        path = write(self, one)
        written.append(path.stat().st_size)
        assert mx.isnan(one).all().item()
        return path

    monkeypatch.setattr(parked.Parking, "_written", counted)
    same(plain, chat, PROMPTS * 4)
    assert sum(written) > 1 << 13


def test_keys_and_values_are_dropped_behind_their_layer(monkeypatch) -> None:
    """Where the common first tokens run once, every pass has a cache of all layers."""
    prompts = [[*range(3, 15), *one] for one in PROMPTS]
    plain, chat = zoo.chat("llama"), streamed(zoo.chat("llama"))
    made: list[Any] = []
    copied = prefix._repeated

    def repeated(value: Any, count: int) -> Any:
        found = copied(value, count)
        if hasattr(found, "keys"):
            made.append(found)
        return found

    monkeypatch.setattr(prefix, "_repeated", repeated)
    expected = first_reply_token(plain, prompts)
    made.clear()
    found = first_reply_token(chat, prompts)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)
    assert len(made) >= len(chat.layers)
    assert all(mx.isnan(one.keys).all().item() for one in made)


def test_a_folder_in_shards(tiny_folder) -> None:
    folder = tiny_folder("qwen3_moe", shards=3)
    same(load(folder), load(folder, streamed=True))


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_quantized_folder(mode: str, tiny_folder, tmp_path: Path) -> None:
    folder = tiny_folder("qwen3", hidden_size=64)
    model, _, config = load_with_mlx(str(folder), return_config=True)
    model, config = quantize_model(model, config, 32, 4, mode=mode)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(parameters(model)))
    save_config(config, tmp_path / "config.json")
    same(load(tmp_path), load(tmp_path, streamed=True))


@pytest.mark.parametrize(
    ("recipe", "kind"), [("llama", "Q4_K"), ("qwen3moe", "Q6_K"), ("lfm2", "Q8_0")]
)
def test_a_gguf(recipe: str, kind: str, tmp_path: Path, monkeypatch) -> None:
    # Small models are unpacked when they are loaded whole; packed, weights of some types have their
    # scales in half precision.
    monkeypatch.setattr(memory, "_AFFORDABLE", -(1 << 40))
    file = tiny_gguf.write(tmp_path / "m.gguf", RECIPES[recipe], GGMLQuantizationType[kind])
    with GgufSource(file) as source:
        same(from_gguf.load(source)[0], from_gguf.load(source, streamed=True)[0])


def test_writers_are_found_without_reading_a_matrix(tiny_folder) -> None:
    folder = tiny_folder("gemma2")
    chat = load(folder, streamed=True)
    expected = {(one.path, one.kind, one.layer) for one in find_writers(load(folder))}
    assert {(one.path, one.kind, one.layer) for one in find_writers(chat)} == expected
    streaming = sweeps.of(chat.model)
    assert streaming is not None
    assert streaming.stages.traffic.bytes == 0


def present(chat: ChatModel) -> set[int]:
    """The layers whose first matrix is in memory."""
    streaming = sweeps.of(chat.model)
    assert streaming is not None
    found = set()
    numbers = {id(layer): number for number, layer in enumerate(chat.layers)}
    for stage in streaming.stages.stages:
        if id(stage.module) in numbers:
            module, name = next(iter(stage.places.values()))
            if not mx.isnan(module[name]).all().item():
                found.add(numbers[id(stage.module)])
    return found


def test_one_layer_is_in_memory_at_a_time_and_all_passes_go_through_it() -> None:
    chat = streamed(zoo.chat("llama"))
    seen: list[tuple[int, int, set[int]]] = []

    def run(index: int) -> None:
        def enter(number: int):
            def wrapper(call, *args, **kwargs):
                output = call(*args, **kwargs)
                seen.append((number, index, present(chat)))
                return output

            return wrapper

        with around([(layer, enter(number)) for number, layer in enumerate(chat.layers)]):
            mx.eval(chat.model(mx.array([PROMPTS[index]])))

    assert not present(chat)
    list(sweeps.each(chat.model, run, range(3)))
    count = len(chat.layers)
    assert [(layer, index) for layer, index, _ in seen] == [
        (layer, index) for layer in range(count) for index in range(3)
    ]
    assert all(there == {layer} for layer, _, there in seen)


def test_what_one_pass_wraps_others_call_as_it_is() -> None:
    plain, chat = zoo.chat("llama"), streamed(zoo.chat("llama"))
    unit = mx.random.normal((chat.width,), key=mx.random.key(1))
    edits = [Edit((unit * sign)[None], strength) for sign, strength in ((1, 1.0), (-1, 0.5))]

    def tried(chat: ChatModel, edit: Edit | None) -> mx.array:
        if edit is None:
            return first_reply_token(chat, PROMPTS)
        with ablation(find_writers(chat), edit):
            return first_reply_token(chat, PROMPTS)

    first_reply_token(chat, PROMPTS)  # compares the shortcuts
    streaming = sweeps.of(chat.model)
    assert streaming is not None
    before = streaming.stages.traffic.bytes
    found = list(sweeps.each(chat.model, lambda edit: tried(chat, edit), [None, *edits]))
    swept = streaming.stages.traffic.bytes - before
    whole = sum(value.nbytes for _, value in parameters(plain.model))
    assert swept < 1.2 * whole  # all three in one sweep
    for edit, one in zip([None, *edits], found, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(tried(plain, edit)), atol=1e-4)


def test_an_error_in_one_pass_ends_the_sweep_and_its_threads() -> None:
    chat = streamed(zoo.chat("llama"))
    ended: list[int] = []

    def run(index: int) -> None:
        def fails(call, *args, **kwargs):
            raise ValueError("broken")

        try:
            with around([(chat.layers[1], fails)] if index == 1 else []):
                mx.eval(chat.model(mx.array([PROMPTS[index]])))
        finally:
            ended.append(index)

    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"):
        list(sweeps.each(chat.model, run, range(3)))
    assert sorted(ended) == [0, 1, 2]
    assert threading.active_count() <= before + 1  # the thread that reads
    with around([]):
        assert mx.isfinite(first_reply_token(chat, PROMPTS)).all().item()


def test_wrapped_methods_nest_and_are_taken_off_in_any_order() -> None:
    module = zoo.chat("qwen2").model.model.embed_tokens
    states = mx.ones((1, 1, module.weight.shape[1]))
    before = module.as_linear(states)
    first = around_method(module, "as_linear", lambda call, x: call(x) + 1)
    second = around_method(module, "as_linear", lambda call, x: 2 * call(x))
    first.__enter__()
    second.__enter__()
    np.testing.assert_allclose(np.array(module.as_linear(states)), np.array(2 * (before + 1)))
    first.__exit__(None, None, None)
    np.testing.assert_allclose(np.array(module.as_linear(states)), np.array(2 * before))
    second.__exit__(None, None, None)
    assert "as_linear" not in vars(module)


def test_a_weight_that_is_not_finite_is_named(tiny_folder, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = dict(mx.load(str(tmp_path / "model.safetensors")))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = mx.nan
    mx.eval(weights)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    chat = load(tmp_path, streamed=True)
    with pytest.raises(UserError, match=rf"{name} holds NaN"):
        first_reply_token(chat, PROMPTS)


def sweeps_so_far(chat) -> int:
    stages = sweeps.of(chat.model).stages
    # And the first stage of one more, which is read beside the work.
    return round(stages.traffic.bytes / sum(stage.bytes for stage in stages.stages))


def test_finding_out_how_a_model_may_run_takes_two_sweeps() -> None:
    chat, like = streamed(zoo.chat("llama")), zoo.chat("llama")
    assert trusted(chat, PROMPTS) == trusted(like, PROMPTS)
    assert sweeps_so_far(chat) == 2


def test_a_model_that_needs_a_cache_is_known_by_it_when_it_is_streamed() -> None:
    chat = streamed(zoo.chat("gemma3n"))
    assert trusted(chat, PROMPTS) == trusted(zoo.chat("gemma3n"), PROMPTS)
    assert trusted(chat, PROMPTS).cached


def test_two_sets_with_common_first_tokens_are_measured_in_three_sweeps() -> None:
    sets = [[[*range(1, 13), *end] for end in ([5 * n, 7], [8], [9, n], [n])] for n in (2, 3)]
    chat, like = streamed(zoo.chat("llama")), zoo.chat("llama")
    found, expected = (measuring.measure(one, *sets, [-1]) for one in (chat, like))
    np.testing.assert_allclose(
        np.array(found.harmful_mean), np.array(expected.harmful_mean), atol=1e-4
    )
    assert sweeps_so_far(chat) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_what_several_passes_ask_for_is_done_once(fails: bool) -> None:
    chat = streamed(zoo.chat("llama"))
    known: dict[str, int] = {}
    done = []

    def work() -> int:
        mx.eval(chat.model(mx.array([PROMPTS[0]])))
        done.append(1)
        if fails:
            raise ValueError("broken")
        return len(done)

    def ask(_: int) -> int:
        return sweeps.once(chat.model, known, "name", work)

    if fails:
        with pytest.raises(ValueError, match="broken"):
            list(sweeps.each(chat.model, ask, range(3)))
        assert known == {}
    else:
        assert list(sweeps.each(chat.model, ask, range(3))) == [1, 1, 1]
        assert sweeps.once(chat.model, known, "name", work) == 1
    assert len(done) == 1
    assert sweeps_so_far(chat) == 1
