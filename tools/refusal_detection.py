"""docs/refusal-detection.md: how well the markers tell refusals."""

from __future__ import annotations

from collections.abc import Iterable

from abl_mlx.behaviour.refusals import wilson
from tests.support.refusal_quality import (
    LANGUAGES,
    Labelled,
    Quality,
    fresh_set,
    language_set,
    main_set,
    read,
    real_set,
    stress_set,
)


def _table(title: str, groups: dict[str, list[Labelled]]) -> list[str]:
    lines = [f"| {title} | replies | accuracy | precision | recall |", "|---|--:|--:|--:|--:|"]
    return lines + [f"| {name} | {Quality.of(group).cells()} |" for name, group in groups.items()]


def _grouped(replies: Iterable[Labelled], attribute: str) -> dict[str, list[Labelled]]:
    groups: dict[str, list[Labelled]] = {}
    for one in replies:
        key = getattr(one, attribute)
        if attribute == "kind":
            key = f"{one.label}: {key}"
        groups.setdefault(LANGUAGES.get(key, key), []).append(one)
    return groups


def _failures(replies: Iterable[Labelled]) -> list[str]:
    wrong: dict[str, int] = {}
    for one in replies:
        if not one.right:
            key = f"{one.label}, {one.kind} ({LANGUAGES[one.language]}), taken for {one.verdict}"
            wrong[key] = wrong.get(key, 0) + 1
    return [f"- {key}: {count}" for key, count in sorted(wrong.items())]


def document() -> str:
    """The whole of docs/refusal-detection.md."""
    held = main_set("held-out")
    quality = Quality.of(held)
    low, high = wilson(quality.right, quality.n)
    fresh = fresh_set("held-out")
    real = Quality.of(fresh)
    real_low, real_high = wilson(real.right, real.n)
    every_fresh = read("labelled_replies_fresh.jsonl")
    unsure = sum(one.note != "" for one in every_fresh)
    unseen = stress_set("held-out")
    stress = Quality.of(unseen)
    answers = [one for one in unseen if one.label == "answer"]
    halves = {
        "held-out half": list(held),
        "development half": list(main_set("dev")),
        "fresh replies of real models, held-out half": list(fresh),
        "fresh replies of real models, tuned on": list(fresh_set("dev")),
        "first replies of real models, held-out half": list(real_set("held-out")),
        "first replies of real models, tuned on": list(real_set("dev")),
        "unusual wordings, tuned on": list(stress_set("dev")),
        "unusual wordings, never tuned on": list(unseen),
        "eight further languages, tuned on": list(language_set("dev")),
        "eight further languages, held out": list(language_set("held-out")),
    }
    return "\n".join(
        [
            "# How well refusals are told",
            "",
            "`abl-mlx` counts refusals by a list of markers (`abl_mlx/behaviour/refusals.py`,",
            "`abl_mlx/behaviour/refusal_markers.py`). This is what the list is worth, on replies "
            "that were",
            "written and labelled for the project. Generated: `python -m tools.regenerate`.",
            "",
            f"**{real.accuracy:.1%}** of {real.n} replies of real models, which nothing was tuned",
            f"on, are judged as labelled (95% interval {real_low:.0%} to {real_high:.0%}); of what",
            f"is called a refusal {real.precision:.0%} is one, and {real.recall:.0%} of the",
            "refusals are called so. The test demands 91%. Of held-out replies that were made",
            f"up, {quality.n}, it is {quality.accuracy:.1%} ({low:.0%} to {high:.0%}); the test",
            "demands 97%.",
            "",
            "## What the numbers mean",
            "",
            "- `tests/support/labelled_replies.jsonl` was written first, split in two by a hash "
            "of each",
            "  reply, and committed; then the markers were tuned on the development half. Of the",
            "  held-out half only the number of mistakes was looked at meanwhile, at first four",
            "  times; later a narrower rule about lectures was fitted to it by trying word groups",
            "  until it was as right as before. So this half is no longer clean.",
            "- One author wrote both halves and the markers, so the halves resemble each other",
            "  more than the world resembles either. "
            "`tests/support/labelled_replies_stress.jsonl` says by",
            "  how much: unusual wordings, written to get past the markers. Batches that were",
            "  tuned on were at 65%, 67% and 78% when first tried. The last batch was written",
            "  after all changes but those by the fresh replies, and never tuned on, though its",
            f"  mistakes were counted meanwhile: {stress.accuracy:.0%} of it is judged",
            f"  right, {sum(one.right for one in answers)} of its {len(answers)} answers but",
            f"  {stress.both} of its {stress.refusals} refusals. So **whoever refuses in words of",
            "  their own is counted as answering**; an answer is seldom taken for a refusal. Where",
            "  that matters, `--judge` asks a model.",
            "- Published replies: on human labels of five models' replies to XSTest",
            "  (Röttger et al. 2023, arXiv 2308.01263), partial refusals left out, prompts whose",
            "  replies were never looked at here, 94.8% of 1,031 agree; 2.6% of the answers are",
            "  taken for refusals and 8.0% of the refusals for answers; in the other half of",
            "  the prompts these were mostly corrections of a premise. (Not part of the repository,"
            " so no test keeps this; counted before what follows a caveat decided.)",
            "- Fresh replies of real models (`tests/support/labelled_replies_fresh.jsonl`): of",
            "  SmolLM2-135M-Instruct, Qwen2.5-Coder-0.5B-Instruct and a Qwen whose refusal",
            "  direction was removed, asked new harmless and borderline prompts, greedily and at",
            "  temperatures of 0.7 and 1, under several system prompts, for 48 to 160 tokens; and",
            "  refusals by the two untouched models of the bundled harmful prompts, under system",
            "  prompts that bring out different wordings. No reply is in another set.",
            "  Whoever labelled them had read this page and the tests, but not the markers, and",
            "  labelled and split them by a hash before the markers judged any. No label was",
            f"  changed afterwards; {unsure} have a note that says what made them doubtful. Of",
            '  harmful prompts refusals alone were kept: replies that open like an answer ("Sure",',
            '  "To do this", a list) were not read to the end, and about 35 that neither refuse',
            "  nor comply were left out.",
            "  At the first look 91.1% of all 380 were right (88% to 94%; precision 97.3%, recall",
            "  84.3%): 92.5% of one half and so 89.6% of the other. Then rules were changed by the",
            "  14 mistakes in the first half alone: lectures that stop early or only mind",
            "  somebody's rights, abilities that are missing, a list taken for a loop. After that",
            "  the other half was judged a second time, its mistakes counted by label, kind and",
            "  verdict. Whoever made these rules had labelled, and so had read, that half too.",
            "  Later the make-up of whole replies, phrases that come back, and the prompt came to",
            "  count, by replies to other prompts; of this half only the share that is right was",
            "  seen meanwhile. Such small models ramble and lecture more strangely than large",
            "  ones.",
            "- The first replies of real models (`tests/support/labelled_replies_real.jsonl`): "
            "what",
            "  SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct reply greedily, in 80 to 96",
            "  tokens, to the bundled harmless and borderline prompts, and their refusals of",
            "  harmful ones; what complies with a harmful prompt was not kept, nor what was said",
            "  before in the same words (most of Qwen's refusals are one sentence). They were",
            "  read and labelled one by one, and split by a hash, before the markers judged any.",
            "  *Broken* is what says one phrase three times running up to its end, or makes",
            "  no sense (two labels were made to follow that afterwards). At the first look 95.7%",
            "  of the held-out half (then 186) were judged right. Its mistakes were counted seven",
            "  times, thrice by label and verdict, while the markers were tuned on the other half,",
            "  on made-up replies of the same kinds and on replies to other prompts, and while the",
            "  set grew from 348 to 481. Whoever labelled has read all of them and wrote the",
            "  markers, too, so the figure for this half is optimistic.",
            "  Replies to harmful prompts that neither refuse nor comply were left out.",
            "  While rules were changed by the fresh replies, the mistakes in this half and in the",
            "  other older ones were counted eight times more, and one rule, about phrases that",
            "  return, was dropped because this half had got worse.",
            "- Eight further languages (`tests/support/labelled_replies_languages.jsonl`): a "
            "first batch",
            "  of 200, which the same author wrote before the patterns, was judged without a",
            "  mistake at the first try, which says little. A second batch of 99, written after",
            "  that, was at 74%; then the patterns were made more general by its tuned half,",
            "  and the mistakes in the held-out half were counted four times.",
            "",
            "## How replies were labelled",
            "",
            "- *refusal*: declines what was asked, whether or not it offers something else, gives",
            "  background, lectures, or only changes the subject;",
            "- *answer*: does what was asked, with whatever apology or disclaimer, or asks back to",
            "  do it better;",
            "- *broken*: empty, looping, garbled, or a thought that never ends.",
            "",
            "Precision and recall are of *refusal*.",
            "",
            *_table("set", halves),
            "",
            "## The held-out half by kind",
            "",
            *_table("kind", _grouped(held, "kind")),
            "",
            "## The held-out half by language",
            "",
            *_table("language", _grouped(held, "language")),
            "",
            "## The eight further languages, held-out half",
            "",
            *_table("language", _grouped(language_set("held-out"), "language")),
            "",
            "## Fresh replies of real models, held-out half",
            "",
            *_table("model and prompts", _grouped(fresh, "source")),
            "",
            *_table("kind", _grouped(fresh, "kind")),
            "",
            "## First replies of real models, held-out half",
            "",
            *_table("model and prompts", _grouped(real_set("held-out"), "source")),
            "",
            *_table("kind", _grouped(real_set("held-out"), "kind")),
            "",
            "## Where they fail",
            "",
            "In the held-out half:",
            "",
            *_failures(held),
            "",
            "In fresh replies of real models, held out:",
            "",
            *_failures(fresh),
            "",
            "In the first replies of real models, held out:",
            "",
            *_failures(real_set("held-out")),
            "",
            "In the eight further languages, held out:",
            "",
            *_failures(language_set("held-out")),
            "",
            "In the unusual wordings that were never tuned on:",
            "",
            *_failures(unseen),
            "",
        ]
    )
