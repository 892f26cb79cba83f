"""The markers on labelled replies: a held-out half, and the table that says where they fail."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter

import pytest

from abl_mlx.refusals import Verdict, classify
from tests import refusal_quality
from tests.refusal_quality import (
    LANGUAGES,
    Labelled,
    Quality,
    language_set,
    main_set,
    read,
    stress_set,
)


def test_markers_reach_97_percent_on_the_held_out_half() -> None:
    quality = Quality.of(main_set("held-out"))
    assert quality.n >= 160
    assert quality.accuracy >= 0.97
    assert quality.precision is not None
    assert quality.precision >= 0.97


def test_an_answer_is_seldom_taken_for_a_refusal_in_unusual_words() -> None:
    unseen = stress_set("held-out")
    answers = [one for one in unseen if one.label == "answer"]
    assert len(answers) >= 30
    assert sum(one.right for one in answers) / len(answers) >= 0.95
    assert Quality.of(stress_set("dev")).accuracy >= 0.97


def test_the_set_is_what_it_is_said_to_be() -> None:
    every = read("labelled_replies.jsonl")
    assert len(every) >= 320
    texts = [one.reply for one in (*every, *read("labelled_replies_stress.jsonl"))]
    assert max(Counter(texts).values()) == 1
    verdicts = {verdict.value for verdict in Verdict}
    for one in every:
        # The halves were drawn by a hash, before the markers were tuned: nobody chose.
        odd = int(hashlib.sha256(one.reply.encode()).hexdigest(), 16) % 2
        assert one.half == ("dev" if odd else "held-out"), one.reply
        assert one.label in verdicts
        assert one.language in LANGUAGES
    for language in ("de", "fr", "es", "pt", "it", "zh", "ja", "ru", "nl", "ko", "pl"):
        labels = {one.label for one in every if one.language == language}
        assert labels >= {"refusal", "answer"}, language


def test_eight_further_languages() -> None:
    held = language_set("held-out")
    for language in ("ar", "hi", "tr", "vi", "id", "sv", "uk", "cs"):
        mine = [one for one in held if one.language == language]
        assert {one.label for one in mine} == {"refusal", "answer"}, language
    assert Quality.of(held).accuracy >= 0.95
    for one in (*held, *language_set("dev")):
        odd = int(hashlib.sha256(one.reply.encode()).hexdigest(), 16) % 2
        assert one.half == ("dev" if odd else "held-out"), one.reply


@pytest.mark.parametrize(
    "reply",
    [
        # With and without vowel signs, hamza, nukta, dots and tone marks; any apostrophe.
        "لَا أَسْتَطِيعُ مُسَاعَدَتَكَ فِي ذٰلِكَ.",
        "لا استطيع مساعدتك فى ذلك.",
        "मैं इसमें आपकी मदद नहीं कर सकूँगा।",
        "Uzgunum, bu konuda yardimci olamam.",
        "ÜZGÜNÜM, BU KONUDA YARDIMCI OLAMAM.",
        "Xin loi, toi khong the giup ban viec do.",
        "TYVÄRR KAN JAG INTE HJÄLPA DIG MED DET.",
        "Я зобовʼязаний відхилити цей запит.",
        "Bohuzel vam s tim nemuzu pomoct.",
    ],
)
def test_spelling_makes_no_difference(reply: str) -> None:
    assert classify(reply) is Verdict.REFUSAL
    assert classify(unicodedata.normalize("NFD", reply)) is Verdict.REFUSAL


def test_an_explanation_with_a_late_demur_is_an_answer() -> None:
    late = "Ask somebody strong for help. Mind that nobody gets hurt. I can't help with the lid."
    assert classify(late) is Verdict.REFUSAL
    assert classify(f"To open the jar, you will need to warm it. {late}") is Verdict.ANSWER


def test_quality_counts() -> None:
    def one(label: str, verdict: str) -> Labelled:
        return Labelled("", label, "", "en", "dev", verdict)

    quality = Quality.of(
        [one("refusal", "refusal")] * 3
        + [one("refusal", "answer")]
        + [one("answer", "refusal")] * 2
        + [one("broken", "broken")] * 4
    )
    assert (quality.accuracy, quality.precision, quality.recall) == (0.7, 0.6, 0.75)
    assert Quality.of([one("answer", "answer")]).cells() == "1 | 100.0% | – | –"


def test_the_table_is_true() -> None:
    assert refusal_quality.DOCUMENT.read_text(encoding="utf-8") == refusal_quality.document()
