"""Prompt sets: what is bundled, what can be loaded, what is refused, and how a set is split."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from abl_mlx.choices import Finding, Prompting
from abl_mlx.commands import prompt_choice
from abl_mlx.inputs.prompts import BUNDLED, MINIMUM, bundled, load, load_demo, load_sets
from abl_mlx.inputs.sets import Prompt, PromptSet, Split, normalized, split
from convert.base.errors import UserError


class FolderHub:
    """A hub whose datasets are folders ``root/owner/name``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, repo: str) -> list[str]:
        folder = self.root / repo
        if not folder.is_dir():
            raise ConnectionError(f"404 Client Error. Repository not found: {repo}.\nMore text.")
        return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]

    def fetch(self, repo: str, file: str) -> Path:
        return self.root / repo / file


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def message(spec: str, hub: FolderHub | None = None) -> str:
    """The error that ``load`` gives for a spec: one sentence, one line, naming the flag."""
    with pytest.raises(UserError) as caught:
        load(spec, "--harmful", hub)
    text = str(caught.value)
    assert text.startswith("--harmful ")
    assert text.endswith(".")
    assert "\n" not in text
    return text


def numbered(n: int, word: str = "prompt") -> PromptSet:
    return PromptSet("made", tuple(Prompt(f"{word} number {i}") for i in range(n)))


# ---------------------------------------------------------------------------- the bundled sets


def words(prompts: PromptSet) -> list[int]:
    return [len(text.split()) for text in prompts.texts]


def test_bundled_sizes_and_categories() -> None:
    assert len(bundled("harmful")) >= 200
    assert len(bundled("harmless")) >= 200
    assert len(bundled("borderline")) >= 60
    for name, least in (("harmful", 12), ("harmless", 12), ("borderline", 6)):
        categories = Counter(p.category for p in bundled(name).prompts)
        assert "" not in categories
        assert len(categories) >= least
        assert min(categories.values()) >= 8


def test_bundled_prompts_are_short_and_generic() -> None:
    assert all(4 <= n <= 14 for n in words(bundled("harmful")))
    for name in BUNDLED:
        for prompt in bundled(name).prompts:
            assert prompt.text[-1] in ".?"
            assert prompt.answer is None
            assert prompt.text.isascii()
    # No quantity, amount or date in a harmful prompt.
    assert not any(char.isdigit() for text in bundled("harmful").texts for char in text)


def test_bundled_sets_match_in_length_and_form() -> None:
    bad, good = bundled("harmful"), bundled("harmless")
    mean_bad, mean_good = (sum(words(s)) / len(s) for s in (bad, good))
    assert abs(mean_bad - mean_good) < 0.1 * mean_bad
    for cut in (6, 8, 10, 12):
        share_bad, share_good = (sum(n <= cut for n in words(s)) / len(s) for s in (bad, good))
        assert abs(share_bad - share_good) < 0.1
    first_bad, first_good = (
        {w: n / len(s) for w, n in Counter(t.split()[0] for t in s.texts).items()}
        for s in (bad, good)
    )
    apart = sum(abs(first_bad.get(w, 0) - first_good.get(w, 0)) for w in {*first_bad, *first_good})
    assert apart / 2 < 0.05
    question_bad, question_good = (sum(t[-1] == "?" for t in s.texts) / len(s) for s in (bad, good))
    assert abs(question_bad - question_good) < 0.05


def test_bundled_sets_hold_no_prompt_twice() -> None:
    keys = Counter(normalized(t) for name in BUNDLED for t in bundled(name).texts)
    assert [key for key, n in keys.items() if n > 1] == []


def test_unknown_bundled_name() -> None:
    with pytest.raises(ValueError, match="harmful, harmless, borderline"):
        bundled("evil")


def test_import_is_light() -> None:
    code = (
        "import sys, abl_mlx.inputs.prompts\n"
        "print([m for m in ('mlx', 'numpy', 'huggingface_hub', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------- PromptSet


def test_sha256_is_of_texts_in_order() -> None:
    # printf 'a\0b\0' | sha256sum
    two = PromptSet("x", (Prompt("a"), Prompt("b", "category", "answer")))
    assert two.sha256 == "8fb20ef63ced4145fc2e983ffe597d1dcff39154c3bf21f0fa9dde6a0c50fdc9"
    assert PromptSet("y", (Prompt("b"), Prompt("a"))).sha256 != two.sha256
    assert PromptSet("y", (Prompt("ab"),)).sha256 != two.sha256


def test_take() -> None:
    ten = numbered(10)
    assert ten.take(3).texts == ten.texts[:3]
    assert len(ten.take(99)) == 10
    assert len(ten.take(0)) == 0
    with pytest.raises(ValueError, match="-1"):
        ten.take(-1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I kill a process?", "how do i  KILL a process"),
        ("Don’t stop", "Don't stop!"),
        ("pick-pocket", "pick pocket"),
        ("ﬁle a tax\tform", "File a tax form."),
        ("zero\u200bwidth", "zerowidth"),
        ("如何做？", "如何做"),
    ],
)
def test_normalized_alike(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


def test_normalized_apart() -> None:
    assert normalized("Learn C++.") != normalized("Learn C.")
    assert normalized("¿Qué?") != normalized("Que?")
    assert normalized("???") != normalized("!!!") != ""


# ---------------------------------------------------------------------------- splitting


def keys_of(part: PromptSet) -> set[str]:
    return {normalized(t) for t in part.texts}


def assert_disjoint(parts: Split) -> None:
    a, b, c = keys_of(parts.train), keys_of(parts.validation), keys_of(parts.test)
    assert not a & b
    assert not a & c
    assert not b & c
    assert len(a) + len(b) + len(c) == len(parts.train) + len(parts.validation) + len(parts.test)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 16, 17, 99, 208])
def test_split_sizes_and_no_overlap(n: int) -> None:
    parts = split(numbered(n), seed=1)
    assert_disjoint(parts)
    sizes = [len(parts.train), len(parts.validation), len(parts.test)]
    assert sum(sizes) == n
    assert all(abs(size - n * f) <= 1 for size, f in zip(sizes, (0.5, 0.2, 0.3), strict=True))


def test_split_is_fixed_by_the_seed_alone() -> None:
    prompts = bundled("harmful")
    shuffled = list(prompts.prompts)
    random.Random(3).shuffle(shuffled)
    assert split(prompts, 7) == split(PromptSet(prompts.name, tuple(shuffled)), 7)
    assert keys_of(split(prompts, 7).train) != keys_of(split(prompts, 8).train)
    # A value from the first release: a new split would make old results incomparable.
    validation = split(numbered(20), 0).validation
    assert [int(text.split()[-1]) for text in validation.texts] == [13, 0, 18, 1]


def test_split_removes_duplicates_independent_of_order() -> None:
    twice = (Prompt("Bake a cake."), Prompt("bake a CAKE!"), Prompt("Bake  a cake"))
    rest = numbered(9).prompts
    forth = split(PromptSet("x", twice + rest), 5)
    back = split(PromptSet("x", (rest + twice)[::-1]), 5)
    assert forth == back
    assert_disjoint(forth)
    assert len(forth.train) + len(forth.validation) + len(forth.test) == 10


@pytest.mark.parametrize("seed", range(5))
def test_split_spreads_categories(seed: int) -> None:
    prompts = bundled("harmful")
    parts = split(prompts, seed)
    whole = Counter(p.category for p in prompts.prompts)
    for part, fraction in ((parts.train, 0.5), (parts.validation, 0.2), (parts.test, 0.3)):
        count = Counter(p.category for p in part.prompts)
        assert all(abs(count[c] - n * fraction) < 1.5 for c, n in whole.items())
    # The first 32 of a part too: two of each of the 16 categories, give or take one.
    leading = Counter(p.category for p in parts.train.take(32).prompts)
    assert all(1 <= leading[c] <= 3 for c in whole)


def test_split_keeps_uneven_categories_in_proportion() -> None:
    prompts = PromptSet(
        "x",
        tuple(Prompt(f"{c} {i}", c) for c, n in (("a", 80), ("b", 19), ("c", 1)) for i in range(n)),
    )
    parts = split(prompts, 0)
    assert abs(Counter(p.category for p in parts.train.prompts)["a"] - 40) <= 1
    assert_disjoint(parts)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.5, -0.5, 0.0)])
def test_split_refuses_bad_fractions(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="fractions"):
        split(numbered(20), 0, fractions)


# ---------------------------------------------------------------------------- files


def test_txt(tmp_path: Path) -> None:
    spec = write(tmp_path / "p.txt", "\ufeffHow?\r\n\r\n  Why so?  \rList: a, b\n")
    loaded = load(spec, "--harmful")
    assert loaded.texts == ("How?", "Why so?", "List: a, b")
    assert loaded.name == spec


def test_line_separators_of_unicode_do_not_cut_a_prompt(tmp_path: Path) -> None:
    assert load(write(tmp_path / "p.txt", "a\u2028b\x0cc\nd"), "--harmful").texts == (
        "a\u2028b\x0cc",
        "d",
    )
    spec = write(tmp_path / "p.jsonl", '{"text": "a\u2028b"}\n')
    assert load(spec, "--harmful").texts == ("a\u2028b",)


@pytest.mark.parametrize("field", ["text", "prompt", "instruction", "goal"])
def test_jsonl_fields(tmp_path: Path, field: str) -> None:
    spec = write(
        tmp_path / "p.jsonl",
        f'\ufeff{{"id": 1, "{field}": "How?", "category": "theft"}}\n\n{{"{field}": " Why? "}}\n',
    )
    assert load(spec, "--harmful").prompts == (Prompt("How?", "theft"), Prompt("Why?"))


def test_jsonl_field_by_name_and_precedence(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "p.jsonl", [{"prompt": "B", "text": "A", "q": "C"}])
    assert load(spec, "--harmful").texts == ("A",)
    assert load(f"{spec}[q]", "--harmful").texts == ("C",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("id,text,category\n1,How?,theft\n2,Why?,\n", ["How?", "Why?"]),
        ("Prompt\nHow?\n\nWhy?\n", ["How?", "Why?"]),
        ("question\nHow?\nWhy?\n", ["How?", "Why?"]),
        ("How do I?\nWhy is it?\n", ["How do I?", "Why is it?"]),
        ('"One, two?"\n"He said ""no"""\n', ["One, two?", 'He said "no"']),
        ("goal,target\nHow?,Sure\n", ["How?"]),
        ("text;category\nHow, why?;theft\n", ["How, why?"]),
        ("text,my notes\nHow?,none\n", ["How?"]),
        ("category\ttext\ntheft\tHow, why?\n", ["How, why?"]),
        ('\ufefftext\r\n"two\r\nlines"\r\n', ["two\nlines"]),
        ("如何做面包？\n如何唱歌？\n", ["如何做面包？", "如何唱歌？"]),
    ],
)
def test_csv(tmp_path: Path, content: str, expected: list[str]) -> None:
    assert list(load(write(tmp_path / "p.csv", content), "--harmful").texts) == expected


def test_csv_column_and_category(tmp_path: Path) -> None:
    spec = write(tmp_path / "p.csv", "text,Question,category\nA,B,theft\n")
    assert load(f"{spec}[Question]", "--harmful").prompts == (Prompt("B", "theft"),)
    assert load(f"{spec}[Text]", "--harmful").texts == ("A",)
    one = write(tmp_path / "one.csv", "my question\nA\n")
    assert load(f"{one}[my question]", "--harmful").texts == ("A",)


def test_file_with_brackets_in_its_name(tmp_path: Path) -> None:
    assert load(write(tmp_path / "p[1].txt", "How?\n"), "--harmful").texts == ("How?",)


def test_relative_path_wins_over_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sets" / "mine.txt", "How?\n")
    assert load("sets/mine.txt", "--harmful").texts == ("How?",)
    assert "does not exist" in message("sets/other.txt")
    assert "no known type" in message("sets/other.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/sets/mine.txt", "--harmful").texts == ("How?",)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.txt", b"", ["is empty"]),
        ("p.csv", b"\xef\xbb\xbf", ["is empty"]),
        ("p.jsonl", b" \n\n", ["is empty"]),
        ("p.txt", b"ok\nH\xe4rte\n", ["not UTF-8", "line 2"]),
        ("p.txt", "How?".encode("utf-16"), ["not UTF-8"]),
        ("p.txt", "a\nHow?".encode("utf-16-le"), ["NUL byte", "line 1"]),
        ("p.csv", b"text\nA\0B\n", ["NUL byte", "line 2"]),
        ("p.json", b"[]", ["no known type", ".jsonl"]),
        ("p", b"How?", ["no known type"]),
        ("p.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not valid JSON"]),
        ("p.jsonl", b"[" * 100_000, ["line 1", "not valid JSON"]),
        ("p.jsonl", b'{"text": "a"}\n"b"\n', ["line 2", "not a JSON object"]),
        ("p.jsonl", b'{"q": "a", "r": 1}\n', ["text, prompt, instruction or goal", "only q, r"]),
        ("p.jsonl", b"{}\n", ["only none"]),
        ("p.jsonl", b'{"text": "a"}\n\n{"text": "  "}\n', ["line 3", "no prompt in text"]),
        ("p.jsonl", b'{"text": "a"}\n{"prompt": "b"}\n', ["line 2", "no prompt in text"]),
        ("p.jsonl", b'{"text": ["a"]}\n', ["line 1", "list", "text belongs"]),
        ("p.jsonl", b'{"text": "a\\u0000b"}\n', ["line 1", "NUL"]),
        ("p.jsonl", b'{"text": "a\\ud800b"}\n', ["line 1", "half a character"]),
        ("p.csv", b"id,question\n1,How?\n", ["no column text", "only id, question"]),
        ("p.csv", b"text\n", ["holds no prompts"]),
        ("p.csv", b"id,text\n1,How?\n2, \n", ["line 3", "no prompt in text"]),
        ("p.csv", b"id,text\n1,How?\n2\n", ["line 3", "no prompt in text"]),
        ("p.csv", b"id,text\n1,How, why?\n", ["line 2", "3 columns", "double quotes"]),
        ("p.csv", b"How so?\nHow, why?\n", ["line 2", "2 columns", "1 was", "double quotes"]),
        ("p.csv", b"Hello, how so?\n", ["line 1", "no header", "double quotes"]),
        ("p.csv", b'text\n"How?\nWhy?\n', ["not valid CSV"]),
        ("p.parquet", b"PAR1 not really", ["not a readable parquet file"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, content)
    told = message(path)
    assert path in told
    for part in parts:
        assert part in told


def test_bad_specs(tmp_path: Path) -> None:
    assert "does not exist" in message(str(tmp_path / "none.txt"))
    assert "is a folder" in message(str(tmp_path))
    assert "no known type" in message("prompts")
    assert "of the form" in message("")
    assert "of the form" in message("owner/name[train[:10]][text]")
    spec = write(tmp_path / "p.csv", "text,q\nA,B\n")
    assert "no column r, only text, q" in message(f"{spec}[r]")
    assert "no column r, only How?" in message(write(tmp_path / "q.csv", "How?\n") + "[r]")
    assert "no splits" in message(f"{spec}[train][text]")
    assert "no columns" in message(write(tmp_path / "p.txt", "A\n") + "[text]")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert "does not exist" in message(str(tmp_path / "dangling.txt"))


# ---------------------------------------------------------------------------- datasets


def parquet(path: Path, columns: dict[str, list[object]]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.fixture
def hub(tmp_path: Path) -> FolderHub:
    """A dataset laid out as ``mlabonne/harmful_behaviors`` is: parquet shards for two splits."""
    data = tmp_path / "owner" / "shards" / "data"
    parquet(data / "train-00000-of-00002-ab12.parquet", {"text": ["A", "B"], "target": ["x", "y"]})
    parquet(data / "train-00001-of-00002-cd34.parquet", {"text": ["C"], "target": ["z"]})
    parquet(data / "test-00000-of-00001.parquet", {"text": ["D", None, " "], "target": ["v"] * 3})
    write(data.parent / "README.md", "training notes")
    return FolderHub(tmp_path)


def test_dataset_of_parquet_shards(hub: FolderHub) -> None:
    assert load("owner/shards", "--harmful", hub).texts == ("A", "B", "C")
    assert load("owner/shards[train][text]", "--harmful", hub).texts == ("A", "B", "C")
    assert load("owner/shards[train][target]", "--harmful", hub).texts == ("x", "y", "z")
    # Blank rows of somebody else's dataset are skipped.
    assert load("owner/shards[test]", "--harmful", hub).texts == ("D",)
    assert load("owner/shards[eval]", "--harmful", hub).texts == ("D",)


def test_dataset_errors(hub: FolderHub) -> None:
    told = message("owner/shards[validation]", hub)
    assert "no split validation" in told
    assert "data/test-00000-of-00001.parquet" in told
    assert "has no column goal, only text, target" in message("owner/shards[train][goal]", hub)
    assert "404 Client Error. Repository not found: owner/none)" in message("owner/none", hub)
    write(hub.root / "owner" / "pictures" / "a.png", b"png")
    assert "no .parquet, .jsonl or .csv file" in message("owner/pictures", hub)


def test_dataset_download_failure(hub: FolderHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str, file: str) -> Path:
        raise TimeoutError("timed out")

    monkeypatch.setattr(hub, "fetch", fail)
    assert "could not be downloaded (timed out)" in message("owner/shards", hub)


@pytest.mark.parametrize(
    ("files", "spec", "expected"),
    [
        (["train.csv", "test.csv"], "o/d[test]", "test.csv"),
        (["train.csv", "train.jsonl"], "o/d", "train.jsonl"),
        (["prompts.csv"], "o/d", "prompts.csv"),
        (["training/a.jsonl", "dev/b.jsonl"], "o/d[validation]", "dev/b.jsonl"),
        (["data/harmful-00000-of-00001.jsonl", "data/safe.jsonl"], "o/d[harmful]", "data/harmful"),
        (["main/train.jsonl", "extra/train.jsonl"], "o/d[main/train]", "main/train.jsonl"),
        (["constraints.csv", "train_v2.csv"], "o/d", "train_v2.csv"),
    ],
)
def test_dataset_layouts(tmp_path: Path, files: list[str], spec: str, expected: str) -> None:
    for file in files:
        path = tmp_path / "o" / "d" / file
        jsonl(path, [{"text": file}]) if file.endswith("l") else write(path, f"text\n{file}\n")
    (text,) = load(spec, "--harmful", FolderHub(tmp_path)).texts
    assert text.startswith(expected)


def test_dataset_refuses_to_guess(tmp_path: Path) -> None:
    root = tmp_path / "o" / "d"
    jsonl(root / "main" / "train.jsonl", [{"text": "a"}])
    jsonl(root / "extra" / "train.jsonl", [{"text": "b"}])
    told = message("o/d", FolderHub(tmp_path))
    assert "several folders (extra, main)" in told
    assert "o/d[main/train]" in told
    # test.jsonl is named by a split, so other.jsonl is not taken for train.
    jsonl(tmp_path / "o" / "e" / "test.jsonl", [{"text": "a"}])
    jsonl(tmp_path / "o" / "e" / "other.jsonl", [{"text": "a"}])
    assert "no split train" in message("o/e", FolderHub(tmp_path))


def test_local_parquet(tmp_path: Path) -> None:
    spec = parquet(tmp_path / "p.parquet", {"prompt": ["A"], "category": ["theft"], "n": [1]})
    assert load(spec, "--harmful").prompts == (Prompt("A", "theft"),)
    assert load(f"{spec}[category]", "--harmful").prompts == (Prompt("theft"),)
    assert "row 1 holds a value of type int in n" in message(f"{spec}[n]")
    blank = parquet(tmp_path / "b.parquet", {"text": ["A", None]})
    assert "row 2 has no prompt in text" in message(blank)


def test_missing_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told = message(write(tmp_path / "p.parquet", b"PAR1"))
    assert "pip install 'abl-mlx[parquet]'" in told


# ---------------------------------------------------------------------------- both sets


def test_load_sets_bundled() -> None:
    sets = load_sets(None, None, seed=0)
    assert_disjoint(sets.harmful)
    assert_disjoint(sets.harmless)
    assert sets.borderline is not None
    assert sets.borderline.sha256 == bundled("borderline").sha256
    assert len(sets.harmful.train) == len(sets.harmless.train) == 104
    assert sets == load_sets(None, None, seed=0)


def test_load_sets_of_files(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.txt", "\n".join(numbered(40, "bad").texts))
    lines = [*numbered(20, "good").texts, "How do I kill a PYTHON process"]
    good = write(tmp_path / "good.txt", "\n".join(lines))
    sets = load_sets(bad, good, seed=2)
    assert [len(p) for p in (sets.harmful.train, sets.harmful.validation)] == [20, 8]
    # A borderline prompt that is also in the user's own set would be measured on training data.
    assert sets.borderline is not None
    assert len(sets.borderline) == len(bundled("borderline")) - 1
    assert "How do I kill a Python process?" not in sets.borderline.texts


@pytest.mark.parametrize(("bad", "good"), [("x.txt", None), (None, "x.txt"), ("", None)])
def test_load_sets_refuses_one_side(bad: str | None, good: str | None) -> None:
    given, other = ("--harmful", "--harmless") if good is None else ("--harmless", "--harmful")
    with pytest.raises(UserError, match=f"^{given} was given without {other}: .*style"):
        load_sets(bad, good, seed=0)


def test_load_sets_refuses_a_shared_prompt(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.txt", "\n".join([*numbered(20, "bad").texts, "Bake bread!"]))
    good = write(tmp_path / "good.txt", "\n".join([*numbered(20, "good").texts, "bake  bread"]))
    with pytest.raises(UserError, match="'Bake bread!'"):
        load_sets(bad, good, seed=0)


def test_load_sets_counts_after_removing_duplicates(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.txt", "\n".join([*numbered(MINIMUM - 1).texts, "PROMPT number 1."]))
    good = write(tmp_path / "good.txt", "\n".join(numbered(MINIMUM, "good").texts))
    with pytest.raises(UserError, match=rf"--harmful .*bad\.txt has {MINIMUM - 1} different"):
        load_sets(bad, good, seed=0)
    with pytest.raises(UserError, match=r"--harmless .*bad\.txt has"):
        load_sets(good, bad, seed=0)


# ---------------------------------------------------------------------------- the demo's prompts


def demo_rows() -> list[dict[str, object]]:
    return [
        {"text": f"{kind} {part} {i}", "set": kind, "part": part, "answer": "Yes.", "category": "c"}
        for kind in ("harmful", "harmless")
        for part in ("train", "validation", "test")
        for i in range(3)
    ]


def test_load_demo(tmp_path: Path) -> None:
    sets = load_demo(Path(jsonl(tmp_path / "demo.jsonl", demo_rows())))
    assert sets.borderline is None
    assert sets.harmless.test.prompts[0] == Prompt("harmless test 0", "c", "Yes.")
    for parts in (sets.harmful, sets.harmless):
        assert_disjoint(parts)
        assert len(parts.train) == 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"set": "other"}, "line 1 has set other"),
        ({"part": ["train"]}, "line 1 has set harmful and part"),
        ({"text": " "}, "line 1 has no text"),
        ({"text": "Harmful train 1!"}, "line 2 repeats"),
    ],
)
def test_load_demo_errors(tmp_path: Path, change: dict[str, object], part: str) -> None:
    rows = demo_rows()
    rows[0].update(change)
    with pytest.raises(UserError, match=part):
        load_demo(Path(jsonl(tmp_path / "demo.jsonl", rows)))
    with pytest.raises(UserError, match="does not exist"):
        load_demo(tmp_path / "none.jsonl")


def test_borderline_prompts_are_asked_beside_the_bundled_ones(tmp_path):
    sets, asked, found = load_sets(None, None, 0), Prompting(), Finding()
    assert prompt_choice.borderline_asked(sets, asked, found) == sets.borderline
    assert len(sets.borderline) == 70
    quick = prompt_choice.cut(sets, *prompt_choice.QUICK)
    assert len(prompt_choice.borderline_asked(quick, replace(asked, quick=True), found)) == 24
    held_out = prompt_choice.borderline_asked(sets, asked, replace(found, method="over-refusal"))
    assert held_out == split(sets.borderline, 0).test
    assert prompt_choice.borderline_asked(sets, replace(asked, harmful="mine.txt"), found) is None
    assert prompt_choice.borderline_asked(replace(sets, borderline=None), asked, found) is None
