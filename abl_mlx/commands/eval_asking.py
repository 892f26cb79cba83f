"""Asks a model and judges its replies; what the journal holds is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from abl_mlx.behaviour import length_sweep, reply_notes
from abl_mlx.behaviour.journal import Answered, Section
from abl_mlx.behaviour.refusals import Oddity, Verdict, classify, examine
from abl_mlx.behaviour.target import Target
from abl_mlx.behaviour.thought_figures import Thought
from abl_mlx.choices import Replying
from abl_mlx.inputs.sets import Prompt, PromptSet
from abl_mlx.models.thoughts import closes_only, has_thought
from abl_mlx.support.console import progress, say
from abl_mlx.support.flags import said
from convert.base.errors import UserError

#: A prompt and a reply to the verdict on it, None if a judge gave none; called from one thread.
Judge = Callable[[str, str], "Verdict | None"]


def by_markers(prompt: str, reply: str) -> Verdict:
    """The verdict of the list of markers."""
    return classify(reply, prompt)


def ask(
    target: Target,
    parts: Mapping[str, PromptSet],
    replying: Replying,
    section: Section,
    by: Judge = by_markers,
    lengths: Sequence[int] = (),
) -> list[Answered]:
    """Judged replies to all prompts, set after set; what the journal has is not asked again.

    Args:
        by: says what is a refusal.
        lengths: in tokens, shortest first, at which each reply is judged; the last is that of
            the whole reply. Without them it is judged whole.

    Raises:
        UserError: when the target fails; what was answered is in the journal.
    """
    keep = replying.save_replies is not None or replying.save_completions
    prompts = [prompt for part in parts.values() for prompt in part.prompts]

    def known(prompt: Prompt) -> Answered | None:
        found = section.get(prompt.identity)
        return None if found is None or (keep and found.reply is None) else found

    open_ones = {prompt.identity: prompt for prompt in prompts if known(prompt) is None}
    missing = list(open_ones.values())
    there = len(prompts) - len(missing)
    if there and section.path is not None:
        say(f"· {there} of {len(prompts)} answers are there already, in {section.path}")
    try:
        with progress(len(prompts), "replies") as bar:
            bar.update(there)
            if missing:
                for number, given in _answers(target, missing, replying, lengths, by):
                    kept = given if keep else replace(given, reply=None)
                    section.add(missing[number].identity, kept)
                    bar.update()
    except UserError as error:
        done = sum(known(prompt) is not None for prompt in prompts)
        if not done or section.path is None:
            raise
        raise UserError(
            f"{said(error)} {done} of {len(prompts)} verdicts are kept in {section.path}: the same "
            "command goes on from there."
        ) from None
    return [answer for prompt in prompts if (answer := known(prompt)) is not None]


def _answers(
    target: Target,
    prompts: Sequence[Prompt],
    replying: Replying,
    lengths: Sequence[int],
    by: Judge,
) -> Iterator[tuple[int, Answered]]:
    """Judged replies as they come, with their texts: (number of the prompt, answer)."""
    if not lengths:
        for number, reply in target.ask(prompts, replying.max_tokens):
            yield number, _judged(prompts[number], by, reply)
        return
    for number, whole in target.ask_wholes(prompts, lengths[-1]):
        prompt = prompts[number]
        judge = partial(_judged, prompt, by)
        yield number, length_sweep.judged(whole, lengths, judge, prompt.text)


def _judged(prompt: Prompt, by: Judge, reply: str) -> Answered:
    found, thought = examine(reply, prompt.text), Thought.of(reply)
    return Answered(
        by(prompt.text, reply),
        None if prompt.answer is None else reply.strip() == prompt.answer.strip(),
        found.oddity,
        reply,
        None if by is by_markers else found.verdict,
        reply_notes.sameness(reply, found),
        "closed" if closes_only(reply) else "own" if has_thought(reply) else None,
        thought.words,
        thought.loops,
    )


def settled(answers: Sequence[Answered]) -> list[Answered]:
    """What answers are, seen together: a server's prompts may open a thought that it does not show.

    Where replies end such a thought, one that holds no tag has not come to its end.
    """
    if sum(one.thought == "closed" for one in answers) < 2:
        return list(answers)
    return [_in_a_thought(one) for one in answers]


def _in_a_thought(one: Answered) -> Answered:
    """An answer to a prompt that opens a thought."""
    if one.begins is not None:
        cuts = tuple(map(_in_a_thought, one.begins.cuts))
        one = replace(one, begins=replace(one.begins, cuts=cuts))
    if one.thought is not None or one.oddity is not None:
        return one
    return replace(
        one,
        verdict=Verdict.BROKEN,
        markers=one.markers and Verdict.BROKEN,
        oddity=Oddity.UNFINISHED,
        same=None,
    )
