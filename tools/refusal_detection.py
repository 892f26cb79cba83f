"""docs/refusal-detection.md: how well the markers tell refusals."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.refusal_quality import (
    LANGUAGES,
    Labelled,
    Quality,
    fresh_set,
    language_set,
    later_set,
    main_set,
    read,
    real_set,
    stress_set,
)


def _table(title: str, groups: dict[str, list[Labelled]]) -> list[str]:
    lines = [
        f"| {title} | replies | accuracy | 95% interval | precision | recall |",
        "|---|--:|--:|--:|--:|--:|",
    ]
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
    """The whole of docs/refusal-detection.md; long because it holds the text of the page."""
    held = main_set("held-out")
    quality = Quality.of(held)
    fresh = fresh_set("held-out")
    later = later_set("held-out")
    real = Quality.of(later)
    former = Quality.of(fresh)
    doubtful = sum(one.note != "" for one in (*later, *later_set("dev")))
    every_fresh = read("labelled_replies_fresh.jsonl")
    unsure = sum(one.note != "" for one in every_fresh)
    unseen = stress_set("held-out")
    stress = Quality.of(unseen)
    answers = [one for one in unseen if one.label == "answer"]
    halves = {
        "held-out half": list(held),
        "development half": list(main_set("dev")),
        "latest replies of real models, held out": list(later),
        "latest replies of real models, tuned on": list(later_set("dev")),
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
            "# How well refusals are recognized",
            "",
            "`abl-mlx` counts refusals by a list of markers (`abl_mlx/behaviour/refusals.py`,",
            "`refusal_markers.py`), and lectures by the make-up of the reply (`lectures.py`).",
            "Where it knows the prompt, that counts too (`requests.py`). This is what the rules",
            "are worth, on replies labelled for the project.",
            "Generated: `python -m tools.regenerate`.",
            "",
            f"**{real.accuracy:.1%}** of {real.n} replies of real models are judged as labelled",
            f"(95% interval {real.interval}); of what is called a refusal {real.precision:.0%} is",
            f"one, and {real.recall:.0%} of the refusals are called so. They were labelled when",
            "the rules were settled, and judged once. Of the held-out half of the replies before",
            f"them, {former.n}, it is {former.accuracy:.1%} ({former.interval}), and of held-out",
            f"replies that were made up, {quality.n}, {quality.accuracy:.1%} ({quality.interval}).",
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
            "  replies were never read here, 94.9% of 1,031 agree; 2.8% of the answers are taken",
            "  for refusals and 7.6% of the refusals for answers; in the other half of the prompts",
            "  these were mostly corrections of a premise. (Not part of the repository, so no test",
            "  keeps this. The share was seen a dozen times while rules changed; it was 94.3%.)",
            "- The latest replies of real models (`tests/support/labelled_replies_later.jsonl`):",
            "  of the two untouched models, for 64 to 128 tokens, greedily and at temperatures of",
            "  0.7 and 1. The rules about make-up, loops and prompts were made by the half that",
            f"  was tuned on, {len(later_set('dev'))} replies to bundled prompts, by the older",
            "  development halves, and by published replies to half of the prompts of XSTest.",
            "  Then nothing was changed any more, and the held-out half was read and labelled, by",
            "  whoever made the rules: replies to new harmless and borderline prompts, and",
            "  refusals of those bundled harmful prompts that the tuned half does not ask, under",
            "  other system messages. The labels were committed before any of these was judged,",
            "  once. **The aim of 97% was not reached**: what is missed are lectures that wander",
            "  off, refusals in mangled sentences or with an offer of something else, and a",
            "  question that is asked back in other words; and two answers are taken for",
            "  refusals. The rules before these, from the text alone, judged 148 of the 157 right,",
            "  and 102 of the 117 that were tuned on: most of what the new rules gained on the one",
            "  half they did not gain on the other.",
            f"  {doubtful} labels of both halves have a note that says what made them doubtful. As",
            "  before, of harmful prompts refusals alone were kept; replies that neither refuse",
            "  nor comply were left out, as was what is in another set already, such as the one",
            "  sentence that most of Qwen's refusals are, which is always told.",
            "- No words of the subject count, and no prompt is judged for being harmful. In all",
            "  these sets whoever was asked for something harmful refuses, since answers were not",
            "  kept, so a model fitted to them would take any reply about a crime for a refusal.",
            "  That is why none was fitted. 24 answers to harmful prompts were judged in memory",
            "  and only counted: 23 were called answers, and one, which opens with what it has not",
            "  the ability to do, a refusal.",
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
            "## Latest replies of real models, held out",
            "",
            *_table("model and prompts", _grouped(later, "source")),
            "",
            *_table("kind", _grouped(later, "kind")),
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
            "In the latest replies of real models, held out:",
            "",
            *_failures(later),
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
