"""Finds the refusal direction of a loaded model with prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from abl_mlx.choices import Finding, Measuring
from abl_mlx.commands import (
    condition_choice,
    first_look,
    layer_strengths,
    part_ranking,
    prompt_choice,
    reply_choice,
    rome_choice,
    sae_choice,
    streaming,
    thinking_switch,
    views,
)
from abl_mlx.commands.candidate_choice import Finder, rank_of
from abl_mlx.commands.forecast import forecast
from abl_mlx.commands.held_out import HeldOut
from abl_mlx.commands.keep_choice import KeepFinder
from abl_mlx.commands.method_flags import check_method, refuse
from abl_mlx.commands.reply_judge import Judge
from abl_mlx.commands.views import View
from abl_mlx.directions import direction_file, measuring, methods, protecting
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.selection import Told
from abl_mlx.directions.trial import OpensAlike
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import capture, sweeps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import ByMode, EncodedSets, opened
from abl_mlx.models.generation import timed
from abl_mlx.models.writers import Writer
from abl_mlx.records.evaluations import STAYING
from abl_mlx.search import behaviours
from abl_mlx.search.sources import SearchPrompts
from abl_mlx.support import arrays
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from abl_mlx.support.flags import first_given
from convert.base.errors import UsageError, UserError

# The number of prompts of each set whose replies are searched for a common opening.
_OPENING_PROMPTS = 8

# Candidates of a view that are judged by replies where first tokens cannot choose.
_SEPARATING = 2
_SEPARATING_ALONE = 6  # where there is one view

_ALIKE = (
    "  harmful and harmless prompts are answered with the same first tokens, so the directions "
    "that separate them best are judged by replies"
)


def find_direction(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    how: Measuring,
    *,
    causal: bool = True,
) -> DirectionFile:
    """Measure candidates on the train prompts and choose one on the validation prompts.

    Prompts are followed by what replies open with, as far as ``chat.reply_prefixes`` tells.

    Args:
        causal: choose by what the removal does to refusals, and not by separation alone.

    Returns:
        A direction file whose metadata has `summary` (the choice and its reason), `scores` (of
        every candidate) and `trials` (of subspaces and the like).

    Raises:
        UserError: when no refusal is found, all candidates exceed the KL limit, there is no such
            layer or position, or flags do not go together.
    """
    _check(chat, sets, how)
    prompts = opened(chat, prompt_choice.encoded(chat, sets, how))
    return _found(chat, writers, prompts, how, causal=causal)


def _found(
    chat: ChatModel,
    writers: Sequence[Writer],
    prompts: ByMode,
    how: Measuring,
    *,
    causal: bool,
    told: Told | None = None,
) -> DirectionFile:
    """The direction of `find_direction`.

    Args:
        prompts: in every mode of thinking, followed by what replies open with.
        told: what whole replies of the unedited model tell of the tokens that open refusals.
    """
    # Where another behaviour is looked for, refusals choose nothing.
    causal = causal and how.scoring.search_for is None
    method = methods.named(how.finding.method)
    if not causal and method.refine:
        raise UserError(f"{method.needs_first_tokens}: leave it out.")
    encoded: SearchPrompts | None = None
    if how.given.direction is not None:
        found = _given(chat, how)
        condition_choice.warn_unconditional(found)
    elif tuple(prompts) == (None,):
        sets = prompts[None]
        judge = Judge(chat, writers, prompts, how) if sets.staying and causal else None
        sets = sets if judge is None else judge.prompts[None]
        view = views.at_prompt(chat, sets)
        with _measured(chat, writers, view, how, judge, told) as finder:
            try:
                found = finder.file(causal=causal, trimming=judge is None)
            except OpensAlike:
                judge = judge or Judge(chat, writers, prompts, how)
                found = _by_replies(chat, writers, judge, [view], how, finder)
            if isinstance(finder, KeepFinder) and how.searching.searches:
                encoded = finder.to_search(sets)
    else:
        judge = Judge(chat, writers, prompts, how)
        seen = _views(chat, judge.prompts, how)
        found = _by_replies(chat, writers, judge, seen, how)
        encoded = _screened(seen, found)
    if not how.searching.searches:
        return found
    if not causal and how.scoring.search_for is None:
        raise UserError(
            "--search tries which edit ends refusals, and completions of this model show none: "
            "leave --search out."
        )
    from abl_mlx.search import loop

    return loop.improve(chat, writers, prompts, found, how, encoded, told)


def _by_replies(
    chat: ChatModel,
    writers: Sequence[Writer],
    judge: Judge,
    seen: Sequence[View],
    how: Measuring,
    measured: Finder | None = None,
) -> DirectionFile:
    """The direction that is chosen by whole replies, in every mode of thinking.

    Args:
        seen: where directions are measured.
        measured: the candidates of the only view, whose first tokens do not tell.
    """

    method = methods.named(how.finding.method)

    def worth_judging(view: View) -> list[DirectionFile]:
        """The directions of a view, the best first.

        Where harmful and harmless prompts are answered, or thought about, with the same first
        tokens, these cannot choose: it is the candidates that separate the prompts best.
        """
        if measured is not None:
            if method.refine:
                raise UserError(f"{method.needs_first_tokens}: leave it out.")
            say(_ALIKE)
            return measured.files_of(measured.best_separating(_SEPARATING_ALONE))
        say(f"  {view.name}:")
        with _measured(chat, writers, view, how, judge) as finder:
            try:
                if isinstance(finder, KeepFinder):
                    return finder.finalists()
                return [finder.file()]
            except OpensAlike:
                if method.refine:
                    say(f"  left out: {method.needs_first_tokens}")
                    return []
                say(_ALIKE)
                return finder.files_of(finder.best_separating(_SEPARATING))

    return reply_choice.choose(judge, how.editing, seen, worth_judging)


def _views(chat: ChatModel, prompts: ByMode, how: Measuring) -> list[View]:
    """Where directions are measured, in every mode of thinking that was asked for."""
    seen: list[View] = []
    place = how.finding.measured_at
    for mode, sets in prompts.items():
        if mode is None or place != views.THOUGHT:
            seen.append(views.at_prompt(chat, sets))
        if mode is not None and place != views.PROMPT:
            behind = views.at_thought(chat, sets, how)
            seen += [behind] if behind is not None else []
    if not seen:
        # No thought ends in time, and nothing else was asked for.
        seen.append(views.at_prompt(chat, sets))
    return seen


def _screened(seen: Sequence[View], found: DirectionFile) -> SearchPrompts:
    """Where a search screens edits: in each mode where replies begin, behind the thought if any."""
    last = {view.thinking: view for view in seen}
    summary = found.metadata["summary"]
    (origin, *_) = [
        view
        for view in seen
        if view.record().json == {name: summary[name] for name in ("thinking", "measured_at")}
    ]
    return SearchPrompts(
        (origin.train["harmful"], origin.train["harmless"]),
        [one for view in last.values() for one in view.validation["harmful"]],
        [one for view in last.values() for one in view.validation["harmless"]],
    )


@contextmanager
def _measured(
    chat: ChatModel,
    writers: Sequence[Writer],
    view: View,
    how: Measuring,
    judge: Judge | None = None,
    told: Told | None = None,
) -> Iterator[Finder]:
    """The candidates of a view, ready to be chosen from.

    Args:
        judge: knows which refusals are to stay, if any are.
    """
    train, validation = view.train, view.validation
    candidates = measuring.measure(
        chat,
        train["harmful"],
        train["harmless"],
        _positions(view, how.finding),
        method=methods.named(how.finding.method).measured_as,
        rank=methods.named(how.finding.method).ranked(how.finding.rank),
        borderline=train.get("borderline"),
    )
    candidates = protecting.protected(chat, candidates, train)
    if how.finding.across == "positions":
        candidates = candidates.across_positions(rank_of(how.finding))
    # The prompts that should no longer be refused: the borderline ones for over-refusal.
    refused = validation.get("borderline", validation["harmful"])
    offsets = sorted({*candidates.positions, -1})
    kept = {"validation, harmful": refused, "validation, harmless": validation["harmless"]}
    with capture.stored_each(chat, kept, offsets) as (bad, good):
        measured = chat, writers, candidates, train, validation, (bad, good), how
        if how.finding.method == methods.ROME:
            yield rome_choice.RomeFinder(*measured, told)
        elif how.finding.sae is not None:
            yield sae_choice.SaeFinder(sae_choice.read(how.finding, chat), *measured, told)
        elif judge is not None and any(validation.get(name) for name in STAYING):
            yield KeepFinder(judge, *measured, told)
        else:
            yield Finder(*measured, told)


def _check(chat: ChatModel, sets: PromptSets, how: Measuring) -> None:
    """Refuse, before the model runs, flags that do not go together or with the prompts."""
    if how.prompting.thinking == thinking.OFF and how.finding.measured_at is not None:
        raise UserError(
            f"--measured-at {how.finding.measured_at} needs a model that thinks: add --thinking on "
            "or both."
        )
    thinking_switch.note_unused(how.prompting, how.finding)
    if how.prompting.thinking != thinking.OFF and how.editing.pin is not None:
        refuse("--pin", "--thinking")
    layer_strengths.check(how)
    if how.searching.searches:
        from abl_mlx.search import loop

        loop.check(how, len(chat.layers))
    else:
        behaviours.check_unused(how.scoring)
        if how.searching.warm_start is not None:
            raise UsageError(
                "--from gives a search its first edits: add --search N or --minutes M."
            )
    if how.given.direction is not None:
        _given(chat, how)
        return
    sae_choice.check(how, chat)
    if sets.staying and how.prompting.thinking != thinking.OFF and how.searching.searches:
        flag = "--keep" if sets.kept is not None else "--keep-system"
        refuse(f"--search, {flag}", f"--thinking {how.prompting.thinking}")
    check_method(how)


def _given(chat: ChatModel, how: Measuring) -> DirectionFile:
    """The direction of ``--direction FILE``."""
    path = how.given.direction
    assert path is not None
    file = given_file(path, how.finding, how.given.tensor)
    direction_file.check_width(file, path, chat)
    summary = file.metadata.get("summary", {"method": "given"})
    return replace(file, metadata={**file.metadata, "summary": {**summary, "file": path.name}})


def given_file(path: Path, finding: Finding, tensor: str | None = None) -> DirectionFile:
    """A file whose direction is taken in place of measuring one.

    Args:
        path: the file.
        finding: how a direction would be measured, of which nothing goes with a file but the layer
            of a control vector.
        tensor: the name of the tensor that is read.

    Raises:
        UserError: when a flag of measuring is given, or the file cannot be read.
    """
    flag = first_given((
        ("--method", finding.method), ("--rank", finding.rank), ("--across", finding.across),
        ("--per-layer", finding.per_layer), ("--position", finding.position),
        ("--measured-at", finding.measured_at), ("--sae", finding.sae),
        ("--feature", finding.feature), ("--protect", finding.protect),
    ))  # fmt: skip
    if flag is not None:
        raise UserError(f"{flag} chooses how a direction is measured, and --direction gives one.")
    return direction_file.read(path, layer=finding.layer, tensor=tensor)


def find_reply_prefix(
    chat: ChatModel, sets: EncodedSets, batch_size: int = 32
) -> tuple[tuple[int, ...], float]:
    """The common opening of all replies, such as an opened thought or a newline.

    Positions and first reply tokens are measured after it; otherwise the opening would be measured.

    Returns:
        Its token ids, and the speed in tokens (of prompts and replies) per second.
    """
    replies, rate = timed(
        chat,
        [
            *sets.train["harmful"].tokens[:_OPENING_PROMPTS],
            *sets.train["harmless"].tokens[:_OPENING_PROMPTS],
        ],
        first_look.OPENING_TOKENS,
        batch_size=batch_size,
        label="reply openings",
    )
    return first_look.reply_prefix(replies), rate


def set_reply_prefixes(chat: ChatModel, sets: PromptSets, how: Measuring) -> None:
    """Set ``chat.reply_prefixes``, where no direction is looked for."""
    for mode, asked in prompt_choice.encoded(chat, sets, how).items():
        chat.reply_prefixes[mode], _ = find_reply_prefix(chat, asked, how.batch_size)


def find_behind_openings(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    how: Measuring,
    clock: Clock,
    *,
    held_out: HeldOut | None = None,
    times: int = 0,
) -> DirectionFile:
    """Find how replies open and the direction behind that; sets ``chat.reply_prefixes``.

    A streamed model is asked for no replies: how they open is found token by token.

    Args:
        held_out, times: the held-out prompts that are asked, and how often, for what is told of
            the time.

    Raises:
        UserError: as `find_direction`, and for a model whose replies show no refusal to remove.
    """
    _check(chat, sets, how)
    thinking_switch.check(chat, how.prompting.thinking)
    prompts = prompt_choice.encoded(chat, sets, how)
    arrays.let_go()  # of what loading needed
    seen = None
    with clock.step("ask the model as it is"):
        if sweeps.of(chat.model) is not None:
            first_look.open_prompts(chat, prompts)
        else:
            seen = first_look.in_every_mode(chat, prompts, how)
    prompts = opened(chat, prompts)
    first = next(iter(prompts.values()))
    if seen is not None:
        say(str(forecast(chat, first, how, seen.rate, held_out=held_out, times=times)))
    arrays.let_go()
    with clock.step("measure and choose a direction"):
        causal = not chat.completes or (seen is not None and seen.clear)
        told = None if seen is None else seen.told
        found = _found(chat, writers, prompts, how, causal=causal, told=told)
    streaming.tell(chat)
    found = part_ranking.added(chat, writers, first, found, how.editing, clock)
    if seen is None:
        return found
    return replace(found, metadata={**found.metadata, "first_look": seen.record()})


def _positions(view: View, finding: Finding) -> list[int]:
    """The token offsets to measure at: the one that was asked for, or what all prompts share."""
    wanted = finding.position
    if wanted == "instruction-end":
        if view.place == views.THOUGHT:
            raise UserError(
                "--position instruction-end stands before the thought: add --measured-at "
                "end-of-prompt."
            )
        # After the instruction, all prompts have the same tokens of the template; a completion's
        # prompt ends with the instruction.
        return [-1 if view.completes else -view.tail - 1]
    if isinstance(wanted, str):
        raise UserError(f"--position {wanted}: it is instruction-end, or a number such as -1.")
    if wanted is not None:
        if wanted >= 0:
            raise UserError(
                f"--position {wanted}: positions count back from the prompt's end, so -1 is the "
                "last token."
            )
        return [wanted]
    if finding.sae is not None or (finding.layer is not None and finding.across is None):
        return [-1]
    return list(range(-min(view.tail, measuring.MOST_POSITIONS), 0))
