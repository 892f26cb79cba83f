"""`eval --recognition`: whether a model can tell harmful from harmless prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.behaviour import llamacpp, recognition, separation, word_margins
from abl_mlx.behaviour.chat_answer import told_tokens
from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.behaviour.target import Target
from abl_mlx.behaviour.word_margins import Margin
from abl_mlx.choices import RunOptions
from abl_mlx.commands import evaluate_model
from abl_mlx.commands.run import run
from abl_mlx.eval_choices import Asking, EvalOptions
from abl_mlx.inputs import prompts, sources
from abl_mlx.inputs.sets import Prompt, PromptSet
from abl_mlx.models import chat_model
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.reports import eval_tables, tables
from abl_mlx.reports.page_eval import eval_page
from convert.base.errors import UserError
from tests.support.servers import Handler, Server

WORDS = ("harmful", "harmless")


@pytest.fixture(scope="module")
def demo() -> ChatModel:
    return chat_model.load(sources.resolve("demo").path)


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    return [Prompt(text) for text in prompts.load_demo().harmful.test.take(3).texts]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def never(asked: Sequence[Any], tokens: int) -> Iterator[tuple[int, str]]:
    raise AssertionError("nobody is asked for a reply")


# --- the margin ----------------------------------------------------------------------------------


def log_probability(chat: ChatModel, before: Sequence[int], token: int) -> float:
    """ln p of a token in float64, from one plain forward pass."""
    row = np.array(chat.model(mx.array([list(before)]))[0, -1].astype(mx.float32), np.float64)
    return float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))


def by_hand(chat: ChatModel, prompt: Prompt, word: str, other: str) -> float:
    """p of a word in all spellings, in float64: each token given those before it."""

    def spelled(text: str) -> set[tuple[int, ...]]:
        forms = (text, text.capitalize(), f" {text}")
        return {tuple(chat.tokenizer.encode(one, add_special_tokens=False)) for one in forms}

    total = 0.0
    for ids in spelled(word) - spelled(other):
        given = list(chat.encode_message(prompt))
        total += math.exp(
            sum(log_probability(chat, [*given, *ids[:at]], ids[at]) for at in range(len(ids)))
        )
    return total


def test_margins_in_mlx_are_those_of_plain_forward_passes_in_float64(
    demo: ChatModel, asked: list[Prompt]
) -> None:
    for prompt, found in zip(asked, word_margins.in_mlx(demo, asked, WORDS), strict=True):
        first, second = by_hand(demo, prompt, *WORDS), by_hand(demo, prompt, *WORDS[::-1])
        assert found.nats == pytest.approx(math.log(first) - math.log(second), abs=1e-3)
        assert found.mass == pytest.approx(first + second, rel=1e-3)
    swapped = word_margins.in_mlx(demo, asked, WORDS[::-1])
    for one, other in zip(word_margins.in_mlx(demo, asked, WORDS), swapped, strict=True):
        assert one.nats == pytest.approx(-other.nats, abs=1e-5)  # type: ignore[operator]


def test_spellings_that_begin_alike_are_followed_to_where_they_part() -> None:
    ids = {"harmful": [1, 2], "Harmful": [3, 2], " harmful": [4], "harmless": [1, 5],
           "Harmless": [3, 5], " harmless": [6]}  # fmt: skip
    spelled = word_margins.spellings(WORDS, ids.__getitem__)
    assert word_margins.beginnings(spelled) == [(), (1,), (3,)]
    p = {(): {1: 0.5, 3: 0.2, 4: 0.1, 6: 0.05}, (1,): {2: 0.75, 5: 0.2}, (3,): {2: 0.5, 5: 0.4}}
    found = word_margins.margin(spelled, lambda before, token: math.log(p[before][token]))
    harmful, harmless = 0.5 * 0.75 + 0.2 * 0.5 + 0.1, 0.5 * 0.2 + 0.2 * 0.4 + 0.05
    assert found.nats == pytest.approx(math.log(harmful / harmless))
    assert found.mass == pytest.approx(harmful + harmless)


def test_llama_cpp_agrees_with_mlx_and_bounds_what_it_does_not_tell(
    demo: ChatModel, asked: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    from abl_mlx.commands import conversion

    path = tmp_path / "demo.gguf"
    conversion.convert("demo", path, quantize="F16")
    monkeypatch.setattr(llamacpp, "LlamaCpp", partial(LlamaCpp, n_threads=1))
    exact = word_margins.in_mlx(demo, asked, WORDS)
    monkeypatch.setattr(word_margins, "TOP_N", 2000)  # more than its whole vocabulary
    for one, other in zip(exact, word_margins.in_llamacpp(path, None, asked, WORDS), strict=True):
        assert other.nats == pytest.approx(one.nats, abs=0.1)
    monkeypatch.setattr(word_margins, "TOP_N", 5)
    for one, other in zip(exact, word_margins.in_llamacpp(path, None, asked, WORDS), strict=True):
        assert other.mass >= one.mass


# --- a server ------------------------------------------------------------------------------------


def step(chosen: str, **told: float) -> tuple[str, dict[str, float]]:
    return chosen, {name.replace("_", " "): math.log(p) for name, p in told.items()}


@pytest.mark.parametrize(
    ("steps", "odds", "mass"),
    [
        ([step("harmful", harmful=0.6, harmless=0.3)], 2, 0.9),
        ([step("Harmful", Harmful=0.4, harmful=0.2, _harmless=0.3)], 2, 0.9),
        # Both words begin with one token.
        ([step("Harm", Harm=0.8, harm=0.1), step("less", ful=0.1, less=0.9)], 1 / 9, 0.8),
        # What is not told is at most the least that is.
        ([step("harmful", harmful=0.7, The=0.1, A=0.05)], 14, 0.7),
        # A reply that is neither word tells nothing.
        ([step("The", The=0.9, A=0.05), step("harmful", harmful=0.9)], None, 0),
        ([], None, 0),
    ],
)
def test_a_servers_reply_is_followed_to_where_the_words_part(
    steps: list[Any], odds: float | None, mass: float
) -> None:
    found = word_margins.followed(steps, WORDS)
    assert found.mass == pytest.approx(mass)
    assert found.nats == (None if odds is None else pytest.approx(math.log(odds)))


def test_what_mlx_lms_server_tells_of_a_token_is_read() -> None:
    """It gives tokens as they are in the vocabulary, in any order, and names any as the chosen."""
    top = [
        {"id": 3, "token": "Ġharmless", "logprob": math.log(0.2)},
        {"id": 4, "token": "▁Harmful", "logprob": math.log(0.6)},
    ]
    content = [{**top[0], "top_logprobs": top}, {}]
    found = told_tokens({"choices": [{"logprobs": {"content": content[:1]}}]})
    assert found == [step(" Harmful", _harmless=0.2, _Harmful=0.6)]
    assert word_margins.followed(found, WORDS).nats == pytest.approx(math.log(3))
    assert told_tokens({"choices": [{"logprobs": {"content": content}}]}) == found
    assert told_tokens({"choices": [{"logprobs": {"content": [{}]}}]}) is None
    assert told_tokens({"choices": [{"logprobs": None}]}) is None
    assert told_tokens([]) is None


def knowing(handler: Handler, request: dict[str, Any], number: int) -> None:
    """A model that takes prompts with "kill" for harmful, and does not know long from short."""
    asked = request["messages"][0]["content"]
    assert request["logprobs"] is True
    assert request["top_logprobs"] == word_margins.SERVED
    first, second = WORDS if "harmful" in asked else ("long", "short")
    p = (0.9 if "kill" in asked else 0.1) if "harmful" in asked else 0.5
    # It likes the first place, which the two orders cancel.
    p = min(0.99, p + 0.05) if asked.index(first) < asked.index(second) else max(0.01, p - 0.05)
    top = [{"token": first, "logprob": math.log(p)}, {"token": second, "logprob": math.log(1 - p)}]
    content = [{"token": first, "logprob": math.log(p), "top_logprobs": top}]
    message = {"role": "assistant", "content": first}
    choice = {"index": 0, "message": message, "logprobs": {"content": content}}
    handler.send(200, json.dumps({"choices": [choice]}))


def texts(word: str, n: int) -> PromptSet:
    return PromptSet(word, tuple(Prompt(f"How do I {word} {'a ' * k}fly?") for k in range(n)))


def test_a_server_with_log_probabilities_is_asked() -> None:
    with Server(knowing) as server:
        endpoint = Endpoint(server.url, None, Asking())
        target = Target("s", "server", {}, never, endpoint=endpoint)
        found = recognition.record(target, texts("kill", 12), texts("feed", 12))
    assert found.kind == f"top-{word_margins.SERVED}"
    assert found.characters[0] == found.characters[1]
    assert found.harm.n == [12, 12]
    assert (found.harm.auc, found.harm.accuracy) == (1, 1)
    assert found.harm.mass == pytest.approx(1)
    assert found.harm.tells
    assert not found.length.tells
    assert found.length.auc == 0.5


@pytest.mark.usefixtures("cache")
def test_a_server_without_log_probabilities_is_refused_before_it_is_asked_anything() -> None:
    with Server() as server:
        with pytest.raises(UserError, match=r"gives no log-probabilities \(logprobs\)") as caught:
            evaluate_model.evaluate_model(server.url, EvalOptions.of(recognition=True, limit=3))
        assert "\n" not in str(caught.value)
        assert {request["max_tokens"] for _, _, request in server.posts} == {4}


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_are_matched_in_length() -> None:
    sets = prompts.load_sets(None, None, 0)
    harmful, harmless = recognition.matched(sets.harmful.test, sets.harmless.test)
    assert len(harmful) == len(harmless) == recognition.PAIRS
    assert len(set(harmful)) == len(set(harmless)) == recognition.PAIRS
    for one, other in zip(harmful, harmless, strict=True):
        longer = max(len(one), len(other))
        assert abs(len(one) - len(other)) <= recognition.DIFFERENCE * longer
    lengths = [np.mean([len(text) for text in texts]) for texts in (harmful, harmless)]
    assert abs(lengths[0] - lengths[1]) < 2
    far = PromptSet("far", tuple(Prompt("word " * 100 + str(k)) for k in range(9)))
    with pytest.raises(UserError, match="of the same length"):
        recognition.matched(far, texts("feed", 9))


def test_the_question_has_both_orders_and_the_control_is_about_the_same_prompts() -> None:
    seen: list[str] = []

    def margins(asked: Sequence[Prompt], words: tuple[str, str]) -> list[Margin]:
        seen.extend(prompt.text for prompt in asked)
        # It would rather say the word that stands first, whatever is asked.
        return [
            Margin(3.0 if one.text.index(words[0]) < one.text.index(words[1]) else -3.0, 1.0)
            for one in asked
        ]

    found = recognition.told_apart(margins, ["kill it", "burn it"], ["feed it"], WORDS)
    assert found.auc == 0.5
    assert found.margin == 0
    assert len(seen) == len(set(seen)) == 6
    assert all(text.endswith(("kill it", "burn it", "feed it")) for text in seen)


# --- the figures ---------------------------------------------------------------------------------


def test_the_auc_counts_pairs_and_its_interval_covers() -> None:
    chance = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        # Of normal scores a unit apart the AUC is Φ(1/√2) = 0.7602.
        high, low = chance.normal(1, 1, 20), chance.normal(0, 1, 20)
        area = separation.auc(high, low)
        wins = np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low])
        assert area == pytest.approx(wins)
        below, above = separation.auc_interval(area, 20, 20)
        assert 0 <= below <= area <= above <= 1
        covered += below <= 0.7602 <= above
    assert 0.92 <= covered / 400 <= 0.98
    assert separation.auc_interval(1, 20, 20) == (pytest.approx(0.88, abs=0.03), 1)
    assert separation.auc_interval(0, 20, 20) == (0, pytest.approx(0.12, abs=0.03))


def test_shuffled_labels_tell_nothing_apart_however_good_the_scores() -> None:
    high, low = np.arange(20.0) + 100, np.arange(20.0)
    shuffled = separation.shuffled_aucs(high, low)
    assert len(shuffled) == 1000
    assert shuffled.mean() == pytest.approx(0.5, abs=0.01)
    found = recognition.figures(high.tolist(), low.tolist(), WORDS, mass=1)
    assert found.shuffled_interval is not None
    assert found.shuffled_interval[0] < 0.5 < found.shuffled_interval[1]
    assert found.tells
    assert found.p == pytest.approx(1 / 1001)


def test_a_preference_for_one_word_changes_neither_auc_nor_accuracy() -> None:
    chance = np.random.default_rng(1)
    high, low = chance.normal(1, 1, 30), chance.normal(0, 1, 30)
    plain, shifted = (
        recognition.figures(list(high + shift), list(low + shift), WORDS, mass=1)
        for shift in (0, 7)
    )
    assert plain.auc == shifted.auc
    assert plain.accuracy == shifted.accuracy
    assert plain.margin == pytest.approx(shifted.margin)
    assert plain.accuracy == pytest.approx(0.69, abs=0.1)


def test_a_model_that_never_answers_cannot_tell() -> None:
    found = recognition.figures([None] * 7, [1.0], WORDS, mass=0.0)
    assert not found.tells
    assert found.auc is None
    assert found.unread == 7
    assert set(found.json) == {"words", "n", "unread", "mass", "margins"}
    assert found.n == [0, 1]


def test_a_change_is_told_prompt_by_prompt() -> None:
    chance = np.random.default_rng(5)
    high, low = chance.normal(1, 3, 30), chance.normal(0, 3, 30)
    after = [list(high - 0.5 + chance.normal(0, 0.1, 30)), list(low)]
    found = separation.growth([list(high), list(low)], after)
    assert found is not None
    change, interval = found
    assert change == pytest.approx(-0.5, abs=0.05)
    # Far narrower than the interval of either model's own margin.
    assert interval[0] < change < interval[1] < -0.4
    own = separation.mean_difference(high, low)[1]
    assert interval[1] - interval[0] < 0.1 * (own[1] - own[0])
    # The same by hand, in float64.
    moved = np.array(after[0], np.float64) - high
    half = 1.96 * np.sqrt(moved.var(ddof=1) / 30)
    assert interval == (pytest.approx(moved.mean() - half), pytest.approx(moved.mean() + half))
    # A prompt that one of the two did not answer is left out; other prompts are no comparison.
    missing: list[float | None] = [None, *high[1:].tolist()]
    some = separation.growth([missing, low.tolist()], after)
    assert some is not None
    assert some[0] == pytest.approx(moved[1:].mean())
    assert separation.growth([[1.0], [2.0]], after) is None
    assert separation.growth([[None], [2.0]], [[1.0], [2.0]]) is None


@pytest.mark.usefixtures("cache")
def test_the_demo_cannot_tell_and_that_is_said_of_both_models() -> None:
    chosen: dict[str, Any] = {"length_sweep": frozenset({2, 4})}
    options = EvalOptions.of(recognition=True, limit=9, baseline="demo", **chosen)
    record = evaluate_model.evaluate_model("demo", options)
    found = record["recognition"]
    assert found == record["baseline"]["recognition"]
    assert found["kind"] == "exact"
    assert found["harm"]["mass"] < 1e-6
    assert not record.recognition.harm.tells  # type: ignore[union-attr]
    table = eval_tables.table(record)
    assert "harmful from harmless, AUC" in table
    assert "cannot tell: chance gives" in table
    assert "harmful or harmless has probability 0%: hardly an answer" in table
    assert "control, long from short, margin" in table
    assert "changed by +0.00 (95% interval 0.00 to 0.00)" in table
    assert "harmful from harmless, AUC" in eval_page(record, "abl-mlx eval demo")


@pytest.mark.usefixtures("cache")
def test_run_asks_before_and_after_if_it_is_told_to(tmp_path: Path) -> None:
    options = RunOptions.of(recognition=True, limit=6, quick=True, max_tokens=8, layer=2)
    record = run("demo", [tmp_path / "out"], options)
    before, after = record.before.recognition, record.after.recognition
    assert before is not None
    assert after is not None
    assert before.harm.n == after.harm.n
    assert before != after
    assert "harmful from harmless, AUC" in tables.run_table(record)
    assert "control, long from short, AUC" in (tmp_path / "out" / "report.html").read_text()
    far = tmp_path / "far.txt"
    far.write_text("".join(f"{'word ' * 90}{number}\n" for number in range(60)))
    near = tmp_path / "near.txt"
    near.write_text("".join(f"word {number}\n" for number in range(60)))
    given = RunOptions.of(recognition=True, harmful=str(far), harmless=str(near))
    with pytest.raises(UserError, match="of the same length"):
        run("demo", [tmp_path / "other"], given)
