"""Language drift: how often a reply is not in the language of its prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abl_mlx.behaviour.scorers.lines import lines_of
from convert.base.errors import UserError

#: Frequent words of languages in Latin letters. A word that several of them have is in the list of
#: each, so that it speaks for none of these alone.
WORDS = {
    "en": "the and of to is are that which with for this from by as an it in on be was when a i "
    "you not no who or has have can we they their but often",
    "de": "der die das und ist sind ein eine nicht mit von zu den dem im auf wird werden auch sich "
    "für als wenn durch in an es ich man was so",
    "fr": "le la les des est et un une dans pour que qui sur avec par du au sont ce cette il elle "
    "de se a ne pas plus comme comment en deux nous vous ils",
    "es": "el la los las y es son un una en por para que con del se al lo como más su cuando de "
    "a no entre cómo",
    "it": "il lo la gli le è sono un una di che per con del della nel si da al come più quando i a "
    "in non e",
    "pt": "a o os as e é são um uma em por para que com do da dos no na se ao como mais quando de "
    "não",
    "nl": "de het een en is zijn van in op met voor niet dat die door te worden wordt als ook aan "
    "we wat",
}

#: Languages that their script tells. Chinese has no kana, which Japanese always has.
SCRIPTS = {
    "ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af]", "zh": r"[\u4e00-\u9fff]",
    "ru": r"[\u0400-\u04ff]", "ar": r"[\u0600-\u06ff]", "hi": r"[\u0900-\u097f]",
}  # fmt: skip

PROMPTS = (
    ("en", "Explain in two sentences how a rainbow forms."),
    ("en", "Describe in two sentences what a baker does."),
    ("de", "Erkläre in zwei Sätzen, wie ein Regenbogen entsteht."),
    ("de", "Beschreibe in zwei Sätzen, was ein Bäcker macht."),
    ("fr", "Explique en deux phrases comment se forme un arc-en-ciel."),
    ("fr", "Décris en deux phrases ce que fait un boulanger."),
    ("es", "Explica en dos frases cómo se forma un arcoíris."),
    ("es", "Describe en dos frases lo que hace un panadero."),
    ("it", "Spiega in due frasi come si forma un arcobaleno."),
    ("pt", "Explique em duas frases como se forma um arco-íris."),
    ("nl", "Leg in twee zinnen uit hoe een regenboog ontstaat."),
    ("ru", "Объясни в двух предложениях, как появляется радуга."),
    ("zh", "请用两句话解释彩虹是怎样形成的。"),
    ("ja", "虹ができる仕組みを二文で説明してください。"),
    ("ko", "무지개가 어떻게 생기는지 두 문장으로 설명해 주세요."),
    ("hi", "दो वाक्यों में समझाइए कि इंद्रधनुष कैसे बनता है।"),
)

KNOWN = (*WORDS, *SCRIPTS)


@dataclass(frozen=True)
class LanguageDrift:
    """The share of replies that are not in the language of their prompt.

    Attributes:
        asked: (language, prompt) each; the language is one of `KNOWN`.
    """

    asked: tuple[tuple[str, str], ...] = PROMPTS
    name: str = "language"
    unit: str = "of the replies are not in the prompt's language"
    max_tokens: int = 64

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.asked)

    @classmethod
    def of_file(cls, path: Path | None) -> LanguageDrift:
        """The scorer, with the prompts of a file if there is one.

        Raises:
            UserError: when a line is not a known language, a space and a prompt.
        """
        if path is None:
            return cls()
        asked = []
        for line in lines_of(path, "language", "a language such as de, a space and a prompt"):
            language, _, text = line.replace("\t", " ").partition(" ")
            if language not in KNOWN or not text.strip():
                raise UserError(
                    f"--scorer language:{path}: a line is a language ({', '.join(KNOWN)}), a space "
                    "and a prompt."
                )
            asked.append((language, text.strip()))
        return cls(tuple(asked))

    def figure(self, replies: Sequence[str]) -> float:
        """The share of replies in another language, or in none that is known; 0 for no replies."""
        if not replies:
            return 0.0
        pairs = zip(self.asked, replies, strict=True)
        return sum(language_of(reply) != wanted for (wanted, _), reply in pairs) / len(replies)


def language_of(text: str) -> str | None:
    """The language of a text; None if it has no letters or words that tell it.

    The script tells it if it has most of the letters; otherwise frequent words do.
    """
    letters = re.findall(r"[^\W\d_]", text)
    counts = {name: len(re.findall(script, text)) for name, script in SCRIPTS.items()}
    # Japanese writes with Chinese letters as well.
    if counts["ja"]:
        counts["ja"], counts["zh"] = counts["ja"] + counts["zh"], 0
    script = max(counts, key=lambda name: counts[name])
    if counts[script] * 2 > len(letters):
        return script
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    found = {name: sum(words[one] for one in known.split()) for name, known in WORDS.items()}
    (first, most), (_, second) = sorted(found.items(), key=lambda one: -one[1])[:2]
    return first if most > second else None
