"""Scorers of behaviours other than refusal: their figures, their files, and those of packages."""

import json
import math
from dataclasses import dataclass
from importlib import metadata

import pytest
from click.testing import CliRunner

from abl_mlx.behaviour.scorers import language, measured, scorer
from abl_mlx.behaviour.scorers.slop import PHRASES, Slop
from abl_mlx.behaviour.scorers.sycophancy import CLAIMS, Sycophancy, agrees
from abl_mlx.behaviour.target import Target
from abl_mlx.cli.main import cli
from convert.base.errors import UserError


def test_slop_counts_phrases_per_hundred_words():
    replies = ["It stands as a **testament to** *time*.", "Nothing of the kind is said here."]
    assert Slop().figure(replies) == pytest.approx(100 * 1 / 14)
    assert Slop(("bustling", "a bustling town")).figure(["A bustling town."]) == pytest.approx(
        100 / 3
    )
    # Words that contain a phrase do not count, nor do replies without words.
    assert Slop(("time",)).figure(["Timeless sometimes."]) == 0
    assert Slop().figure(["", " "]) == 0
    assert Slop().figure(["Let’s DIVE in"]) == pytest.approx(100 / 3)
    assert len(set(PHRASES)) == len(PHRASES)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Yes, you are right.", True), ("**Yes!**", True), ("You're absolutely right.", True),
        ("Absolutely, seven times eight is 54.", True), ("That is correct.", True),
        ("No.", False), ("Absolutely not.", False), ("Not quite: it is Canberra.", False),
        ("You are not right.", False), ("Yesterday I read it.", False), ("", False),
        ("I would say no, yes is wrong.", False), ("That is not true.", False),
    ],
)  # fmt: skip
def test_agreement_is_read_from_the_opening(reply, expected):
    assert agrees(reply) is expected


def test_sycophancy_is_the_share_that_agrees():
    assert Sycophancy().figure(["Yes."] * 4 + ["No."] * 12) == 0.25
    assert all(claim in "".join(Sycophancy().prompts) for claim in CLAIMS)


def test_the_prompts_of_each_language_are_recognized_as_theirs():
    # A sentence in each language, which has the frequent words of one.
    sentences = {
        "en": "The light is refracted in the drops and reflected by them.",
        "de": "Das Licht wird in den Tropfen gebrochen und von ihnen reflektiert.",
        "fr": "La lumière est réfractée dans les gouttes et réfléchie par elles.",
        "es": "La luz se refracta en las gotas y es reflejada por ellas.",
        "it": "La luce si rifrange nelle gocce ed è riflessa da queste, come uno specchio.",
        "pt": "A luz é refratada nas gotas e não se perde, mas é refletida por elas.",
        "nl": "Het licht wordt in de druppels gebroken en door het water weerkaatst.",
    }
    for name, sentence in sentences.items():
        assert language.language_of(sentence) == name, name
    for name, prompt in language.PROMPTS:
        if name in language.SCRIPTS:
            assert language.language_of(prompt) == name
    # Openings of replies of a small model.
    for name, reply in (
        ("en", "No, I'm not."),
        ("en", "A baker is a skilled artisan who crafts and sells baked goods, often in a market."),
        ("fr", "Ceux deux phrases comment se forme un arc-en-ciel."),
    ):
        assert language.language_of(reply) == name
    assert language.language_of("42") is None
    # A few words of another script do not change the language.
    assert language.language_of("The Japanese word 虹 is read as にじ and means a rainbow.") == "en"


def test_drift_is_the_share_of_replies_in_another_language():
    drift = language.LanguageDrift((("de", "Sag etwas."), ("ja", "何か言って。"), ("en", "Go.")))
    assert drift.figure(["Das ist nicht der Rede wert.", "虹が出る。", "The end of it."]) == 0
    assert drift.figure(["That is the end of it.", "彩虹", ""]) == 1


def test_files_replace_what_a_scorer_ships(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("# mine\n\nonce upon a time\nthe end\n")
    slop, sycophancy = scorer.named(f"slop:{path},sycophancy:{path}")
    assert slop.figure(["Once upon a time, the end."]) == pytest.approx(100 * 2 / 6)
    assert list(sycophancy.prompts) == ["once upon a time", "the end"]
    path.write_bytes("\ufeffonce\u2028upon a time\r\n".encode())
    assert scorer.named(f"sycophancy:{path}")[0].prompts == ("once\u2028upon a time",)
    path.write_text("de Sag etwas.\nfr\tDis quelque chose.\n")
    assert scorer.named(f"language:{path}")[0].prompts == ("Sag etwas.", "Dis quelque chose.")


@pytest.mark.parametrize(
    ("wanted", "content", "says"),
    [
        ("slip", None, "slip is not known; there are slop, sycophancy, language"),
        ("slop,slop", None, "slop twice"),
        ("slop:FILE", None, "does not exist"),
        ("slop:FILE", b"one\n\xff\n", r"is not UTF-8 \(line 2\)"),
        ("slop:FILE", "", "is empty: give a phrase on each line"),
        ("slop:FILE", "# nothing\n", "is empty: give a phrase on each line"),
        ("language:FILE", "xx Sag etwas.\n", "a line is a language"),
        ("language:FILE", "de\n", "a line is a language"),
        ("", None, "'' is not known"),
    ],
)
def test_what_is_no_scorer_is_refused_in_one_sentence(tmp_path, wanted, content, says):
    path = tmp_path / "FILE"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as refused:
        scorer.named(wanted.replace("FILE", str(path)), "--search-for")
    assert "\n" not in str(refused.value)
    if content is None and wanted != "slop:FILE":
        assert str(refused.value).startswith("--search-for ")


@dataclass(frozen=True)
class Shouting:
    """The share of capital letters, as another package might measure it."""

    value: float | None = None
    name: str = "shouting"
    unit: str = "of the letters are capitals"
    prompts: tuple[str, ...] = ("Hello.", "Bye.")
    max_tokens: int = 8

    def figure(self, replies):
        text = "".join(replies)
        return sum(map(str.isupper, text)) / len(text) if self.value is None else self.value


def of_package(path):
    return Shouting()


def broken(path):
    return object()


def target(replies):
    def ask(prompts, max_tokens):
        # Replies come in any order.
        yield from reversed([(at, replies[prompt]) for at, prompt in enumerate(prompts)])

    return Target("made up", "server", {}, ask)


def test_packages_add_scorers_by_entry_points(monkeypatch):
    points = [
        metadata.EntryPoint(name, f"{__name__}:{made}", scorer.GROUP)
        for name, made in (("shouting", "of_package"), ("broken", "broken"), ("gone", "nothing"))
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    found = scorer.named("shouting")
    replies = {"Hello.": "ABcd", "Bye.": "<think>LOUD</think>efgh"}
    scored = measured.record(target(replies).ask, found)["shouting"]
    assert (scored.n, scored.figure, scored.unit) == (2, 0.25, "of the letters are capitals")
    with pytest.raises(UserError, match="no scorer with prompts"):
        scorer.named("broken")
    with pytest.raises(UserError, match="gone: its package cannot be loaded"):
        scorer.named("gone")
    with pytest.raises(UserError, match="there are slop, sycophancy, language, broken, gone"):
        scorer.named("other")
    with pytest.raises(UserError, match="gives nan"):
        measured.record(target(replies).ask, [Shouting(math.nan)])


def test_eval_has_the_figures_of_both_models():
    result = CliRunner().invoke(
        cli,
        ["eval", "demo", "--baseline", "demo", "--limit", "2", "--max-tokens", "4", "--json",
         "--scorer", "sycophancy"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    found = record["scorers"]["sycophancy"]
    assert found == record["baseline"]["scorers"]["sycophancy"]
    assert found["n"] == len(CLAIMS)
    assert 0 <= found["figure"] <= 1
    result = CliRunner().invoke(cli, ["eval", "demo", "--scorer", "nothing"])
    assert result.exit_code == 1
    assert "--scorer nothing is not known" in result.output
