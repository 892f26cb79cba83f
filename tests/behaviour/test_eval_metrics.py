"""Perplexity, the capability check and lm-evaluation-harness in `abl-mlx eval`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.behaviour import capability, lm_eval_harness, perplexity
from abl_mlx.behaviour.capability import Task, right, tasks
from abl_mlx.behaviour.target import Target
from abl_mlx.commands import evaluate_model
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.inputs import sources
from abl_mlx.models import chat_model
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.reports import eval_tables
from convert.base.errors import UserError


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def demo() -> ChatModel:
    return chat_model.load(sources.resolve("demo").path)


def nothing(prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[int, str]]:
    raise AssertionError("nobody is asked")


# --- perplexity ----------------------------------------------------------------------------------


def log_probability(chat: ChatModel, before: Sequence[int], token: int) -> float:
    """ln p of a token in float64, from one plain forward pass."""
    row = np.array(chat.model(mx.array([list(before)]))[0, -1].astype(mx.float32), np.float64)
    return float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))


@pytest.mark.parametrize(("n", "given"), [(2, 1), (129, 1), (600, 1), (1500, 3), (512, 2)])
def test_every_token_is_predicted_once_from_a_window(n: int, given: int) -> None:
    parts = perplexity.windows(n, given)
    assert [token for _, first, end in parts for token in range(first, end)] == list(
        range(given, n)
    )
    for start, first, end in parts:
        assert end - start <= perplexity.WINDOW
        # Only the very beginning of the text has less before it.
        assert start == 0 or first - start >= perplexity.WINDOW - perplexity.STRIDE
        assert first > start


def test_perplexity_in_mlx_is_what_plain_forward_passes_say(
    demo: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "WINDOW", 64)
    monkeypatch.setattr(perplexity, "STRIDE", 16)
    given, ids = perplexity.encode(demo)
    assert demo.tokenizer.decode(ids[given - 1 :]).strip().endswith("(Which was very likely true.)")
    ids = ids[:100]
    logs = perplexity.in_mlx(demo, ids, given)
    assert len(logs) == 100 - given
    starts = {
        token: start
        for start, first, end in perplexity.windows(100, given)
        for token in range(first, end)
    }
    for token in (given, given + 1, 16, 17, 63, 64, 65, 80, 81, 99):
        expected = log_probability(demo, ids[starts[token] : token], ids[token])
        assert logs[token - given] == pytest.approx(expected, abs=2e-4), token
    record = perplexity.record(Target("demo", "mlx-lm", {}, nothing, chat=demo), tokens=100)
    assert record.perplexity == pytest.approx(math.exp(-np.mean(logs)))
    size = len(demo.tokenizer.decode(ids[given:]).encode())
    assert record.bits_per_byte == pytest.approx(-sum(logs) / math.log(2) / size)
    assert record.tokens == len(logs)


def test_a_bos_is_given_and_not_predicted() -> None:
    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            body = [10 + byte % 7 for byte in text.encode()[:20]]
            return [1, 2, *body, 3] if add_special_tokens else body

    chat = ChatModel(Path(), None, Tokenizer(), {})  # type: ignore[arg-type]
    given, ids = perplexity.encode(chat)
    assert given == 2
    assert ids[:2] == [1, 2]
    assert len(ids) == 22


def test_llama_cpp_agrees_where_it_tells_every_token_and_is_a_bound_where_not(
    demo: ChatModel, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 20
    exact = perplexity.record(Target("demo", "mlx-lm", {}, nothing, chat=demo), tokens=tokens)
    monkeypatch.setattr(perplexity, "TOP_N", 2000)
    target = Target("demo.gguf", "llama.cpp", {}, nothing, gguf=gguf)
    whole = perplexity.record(target, tokens=tokens)
    assert whole.outside == 0
    assert whole.tokens == exact.tokens
    assert whole.perplexity == pytest.approx(exact.perplexity, rel=0.02)
    assert whole.bits_per_byte == pytest.approx(exact.bits_per_byte, rel=0.02)
    monkeypatch.setattr(perplexity, "TOP_N", 20)
    cut = perplexity.record(target, tokens=tokens)
    # A token outside counts as the least likely one that is told, by MLX's probabilities too.
    given, ids = perplexity.encode(demo)
    expected, outside = [], 0
    for at in range(given, tokens):
        row = np.array(demo.model(mx.array([ids[:at]]))[0, -1].astype(mx.float32), np.float64)
        row -= row.max() + np.log(np.exp(row - row.max()).sum())
        least = np.sort(row)[-20]
        outside += row[ids[at]] < least
        expected.append(max(row[ids[at]], least))
    assert cut.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=0.02)
    assert cut.outside == pytest.approx(outside, abs=1)
    assert 0 < cut.outside < tokens
    assert cut.perplexity < whole.perplexity
    assert cut.kind == "top-n"


def test_a_server_tells_no_perplexity() -> None:
    with pytest.raises(UserError, match="which a server's chat does not tell"):
        evaluate_model.evaluate_model("http://127.0.0.1:9/v1", EvalOptions.of(perplexity=True))


# --- the capability check ------------------------------------------------------------------------


def test_there_are_sixty_different_tasks_and_they_stay_the_same() -> None:
    found = tasks()
    assert len({task.prompt for task in found}) == len(found) == 60
    assert [task.group for task in found] == [
        group for group in capability.GROUPS for _ in range(20)
    ]
    assert found == tasks(0)
    assert found != tasks(1)
    assert found[0] == Task("arithmetic", "What is 64 + 16? Reply with the number only.", "80")


def test_the_answers_are_right() -> None:
    # Worked out from the prompt in another way than the generator's.
    checked = 0
    for task in tasks() + tasks(5):
        prompt = task.prompt
        if prompt.startswith("What is "):
            sum_ = prompt.split("What is ")[1].split("?")[0]
            for word, sign in (("times", "*"), ("divided by", "//")):
                sum_ = sum_.replace(word, sign)
            assert int(task.answer) == eval(sum_)
        elif prompt.startswith("A shop"):
            a, b, c = (int(word) for word in prompt.split() if word.isdigit())
            assert int(task.answer) == sum([b] * a) + c
        elif prompt.startswith("Put"):
            words = prompt.split(": ")[1].split(". ")[0].split(", ")
            assert task.answer.split(", ") == sorted(words)
        elif task.group == "extraction":
            assert task.answer in prompt.split("\n\n")[0]
        else:
            continue
        checked += 1
    assert checked >= 80


@pytest.mark.parametrize(
    ("group", "answer", "reply", "ok"),
    [
        ("arithmetic", "216", "216", True),
        ("arithmetic", "216", " **216**.\n", True),
        ("arithmetic", "1216", "1,216", True),
        ("arithmetic", "216", "<think>4 * 47 = 188</think>216", True),
        ("arithmetic", "216", "The answer is 216", False),
        ("arithmetic", "216", "2160", False),
        ("arithmetic", "21", "2,1", False),
        ("arithmetic", "216", "", False),
        ("arithmetic", "216", "<think>216", False),
        ("instructions", "a, b", "a, b", True),
        ("instructions", "a, b", "b, a", False),
        ("instructions", "LEMON", "lemon", False),
        ("instructions", "LEMON", "“LEMON”", True),
        ("extraction", "Graz", "Graz.", True),
        ("extraction", "Graz", "They went to Graz.", False),
    ],
)
def test_only_the_answer_is_right(group: str, answer: str, reply: str, ok: bool) -> None:
    assert right(Task(group, "", answer), reply) is ok


def test_what_is_right_is_counted_by_group() -> None:
    known = {task.prompt: task for task in tasks()}

    def ask(prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[int, str]]:
        # In another order than asked; right in one group, wrong in another.
        for number in reversed(range(len(prompts))):
            task = known[prompts[number]]
            yield number, task.answer if task.group != "instructions" else "I do not know."

    record = capability.record(Target("m", "server", {}, ask))
    assert (record.n, record.right) == (60, 40)
    assert record.share == pytest.approx(2 / 3)
    rights = {name: one.right for name, one in record.groups.items()}
    assert rights == {"arithmetic": 20, "instructions": 0, "extraction": 20}


def test_eval_tells_them_for_target_and_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "MAX_TOKENS", 4)
    monkeypatch.setattr(capability, "EACH", 3)
    monkeypatch.setattr(perplexity, "TEXT", perplexity.TEXT[:300])
    options = EvalOptions.of(
        limit=2, max_tokens=8, perplexity=True, capability=True, baseline="demo"
    )
    record = evaluate_model.evaluate_model("demo", options)
    one, was = record["perplexity"], record["baseline"]["perplexity"]
    assert one == was
    assert one["perplexity"] > 1
    assert record["capability"]["n"] == record["baseline"]["capability"]["n"] == 9
    table = eval_tables.table(record)
    assert f"{one['perplexity']:.2f}  {one['perplexity']:.2f}" in " ".join(table.split("\n"))
    assert f"{record['capability']['right']}/9" in table


# --- lm-evaluation-harness -----------------------------------------------------------------------


def test_lm_eval_that_is_not_there_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--lm-eval needs .*: pip install lm_eval\.$"):
        evaluate_model.evaluate_model("demo", EvalOptions.of(lm_eval="arc_easy"))


def test_lm_eval_runs_folders_alone(gguf: Path) -> None:
    with pytest.raises(UserError, match="runs only models in MLX or Hugging Face folders"):
        evaluate_model.evaluate_model(str(gguf), EvalOptions.of(lm_eval="arc_easy"))
    for text in ("", " , ", "--model"):
        with pytest.raises(UserError, match="name tasks with commas"):
            lm_eval_harness.task_names(text)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A python whose `-m mlx_lm evaluate` writes what it was told, since lm_eval is no dependency.

    What it stands in for is checked against mlx-lm's own source below.
    """
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "given = sys.argv[1:]\n"
        "place = pathlib.Path(given[given.index('--output-dir') + 1])\n"
        "if 'broken' in given:\n"
        "    sys.exit('Traceback\\nKeyError: no such task')\n"
        "print('Results:')\n"
        "found = {'arc_easy': {'alias': 'arc_easy', 'acc,none': 0.25, 'acc_stderr,none': 0.1}}\n"
        "found['given'] = {'command': given}\n"
        "(place / 'eval_results').write_text(json.dumps(found))\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(lm_eval_harness.importlib.util, "find_spec", lambda name: object())
    return program


def test_lm_eval_is_handed_over_and_its_results_come_back(stand_in: Path) -> None:
    options = EvalOptions.of(limit=1, max_tokens=4, lm_eval="arc_easy, hellaswag")
    record = evaluate_model.evaluate_model("demo", options)
    assert record["lm_eval"]["arc_easy"]["acc,none"] == 0.25
    command = record["lm_eval"].pop("given")["command"]
    assert command[:3] == ["-m", "mlx_lm", "evaluate"]
    assert command[command.index("--model") + 1] == str(sources.resolve("demo").path)
    assert command[command.index("--tasks") + 1 :] == ["arc_easy", "hellaswag", "--limit", "1"]
    line = next(line for line in eval_tables.table(record).splitlines() if "lm-eval" in line)
    assert line.split() == ["lm-eval", "arc_easy", "0.250", "acc"]
    with pytest.raises(UserError, match="KeyError: no such task"):
        lm_eval_harness.run(sources.resolve("demo").path, "broken")


def test_mlx_lm_takes_the_flags_it_is_given() -> None:
    # The module itself imports lm_eval, so its text is read.
    import importlib.util

    found = importlib.util.find_spec("mlx_lm.evaluate")
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).read_text()
    for flag in ("--model", "--output-dir", "--tasks", "--limit"):
        assert f'"{flag}"' in text
    assert 'json.dumps(results["results"]' in text
    assert "output_dir / filename" in text
