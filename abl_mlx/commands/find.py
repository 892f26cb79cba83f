"""Finds the refusal direction of a loaded model with prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from abl_mlx.choices import Finding, Measuring
from abl_mlx.commands import first_look, prompt_choice
from abl_mlx.commands.candidate_choice import Finder, rank_of
from abl_mlx.commands.forecast import forecast
from abl_mlx.directions import direction_file, measuring
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.generation import timed
from abl_mlx.models.writers import Writer
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from convert.base.errors import UserError

# The number of prompts of each set whose replies are searched for a common opening.
_OPENING_PROMPTS = 8


def find_direction(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    how: Measuring,
    *,
    causal: bool = True,
) -> DirectionFile:
    """Measure candidates on the train prompts and choose one on the validation prompts.

    Args:
        causal: choose by what the removal does to refusals, and not by separation alone.

    Returns:
        A direction file whose metadata has `summary` (the choice and its reason), `scores` (of
        every candidate) and `trials` (of subspaces and the like).

    Raises:
        UserError: when no refusal is found, all candidates exceed the KL limit, there is no such
            layer or position, or flags do not go together.
    """
    found = _analytic(chat, writers, sets, how, causal)
    if how.searching.search is None:
        return found
    if not causal:
        raise UserError(
            "--search tries which edit ends refusals, and completions of this model show none: "
            "leave --search out."
        )
    from abl_mlx.search import loop

    return loop.improve(chat, writers, sets, found, how)


def _analytic(
    chat: ChatModel, writers: Sequence[Writer], sets: PromptSets, how: Measuring, causal: bool
) -> DirectionFile:
    """Measure and choose without a search."""
    _check(chat, sets, how)
    if how.given.direction is not None:
        return _given(chat, how)
    train, validation = (
        {
            "harmful": [chat.encode(one) for one in getattr(sets.harmful, part).prompts],
            "harmless": [chat.encode(one) for one in getattr(sets.harmless, part).prompts],
        }
        for part in ("train", "validation")
    )
    for part, kept in (("train", train), ("validation", validation)):
        borderline = prompt_choice.borderline_part(sets, how.prompting, how.finding, part)
        if borderline is not None:
            kept["borderline"] = [chat.encode(one) for one in borderline.prompts]
    candidates = measuring.measure(
        chat,
        train["harmful"],
        train["harmless"],
        _positions(chat, how.finding),
        method=how.finding.method or measuring.METHOD,
        rank=rank_of(how.finding) if how.finding.method == "svd" else 1,
        borderline=train.get("borderline"),
    )
    if how.finding.across == "positions":
        candidates = candidates.across_positions(rank_of(how.finding))
    # The prompts that should no longer be refused: the borderline ones for over-refusal.
    refused = validation.get("borderline", validation["harmful"])
    offsets = sorted({*candidates.positions, -1})
    with (
        capture.stored(chat, refused, offsets, label="validation, harmful") as bad,
        capture.stored(chat, validation["harmless"], offsets, label="validation, harmless") as good,
    ):
        found = Finder(chat, writers, candidates, train, validation, (bad, good), how)
        return found.file(causal=causal)


def check_method(how: Measuring) -> None:
    """Check that the flags of the measurement go together.

    Raises:
        UserError: naming two flags that do not.
    """

    finding = how.finding

    def refuse(first: str, second: str) -> None:
        raise UserError(f"{first} and {second} do not go together: leave one of them out.")

    by_rank = finding.method == "svd" or finding.across is not None
    if finding.rank is not None and not by_rank:
        raise UserError(
            f"--rank {finding.rank}: one direction is all that this method finds; add --method "
            "svd, --across layers or --across positions."
        )
    if finding.per_layer and finding.across is not None:
        refuse("--per-layer", f"--across {finding.across}")
    if finding.method == "svd" and finding.across is not None:
        refuse("--method svd", f"--across {finding.across}")
    if finding.per_layer and finding.layer is not None:
        refuse("--per-layer", "--layer")
    if finding.across == "layers" and finding.layer is not None:
        refuse("--across layers", "--layer")
    if finding.across == "positions" and finding.position is not None:
        refuse("--across positions", "--position")
    if finding.method == "biprojected":
        if finding.per_layer or finding.across is not None:
            refuse("--method biprojected", "--per-layer or --across")
        if finding.layer is not None and finding.layer != int(finding.layer):
            refuse("--method biprojected", "a --layer between two")
    if how.editing.pin is not None and (
        finding.per_layer or finding.across == "layers" or finding.method == "biprojected"
    ):
        raise UserError(
            "--pin holds what one layer's directions have: leave --per-layer, --across layers and "
            "--method biprojected out."
        )
    if how.given.tensor is not None:
        raise UserError("--tensor names a tensor of --direction FILE: give that too.")
    if finding.borderline is not None and finding.method != "over-refusal":
        raise UserError("--borderline is used by --method over-refusal: add that.")


def _check(chat: ChatModel, sets: PromptSets, how: Measuring) -> None:
    """Refuse, before the model runs, flags that do not go together or with the prompts."""
    if how.searching.search is not None:
        from abl_mlx.search import loop

        loop.check(how)
    if how.given.direction is not None:
        _given(chat, how)
        return
    check_method(how)
    prompt_choice.borderline_part(sets, how.prompting, how.finding, "validation")


def _given(chat: ChatModel, how: Measuring) -> DirectionFile:
    """The direction of ``--direction FILE``."""
    path, finding = how.given.direction, how.finding
    assert path is not None
    for flag, value in (
        ("--method", finding.method), ("--rank", finding.rank), ("--across", finding.across),
        ("--per-layer", finding.per_layer or None), ("--position", finding.position),
    ):  # fmt: skip
        if value is not None:
            raise UserError(
                f"{flag} chooses how a direction is measured, and --direction gives one."
            )
    file = direction_file.read(path, layer=finding.layer, tensor=how.given.tensor)
    direction_file.check_width(file, path, chat)
    summary = file.metadata.get("summary", {"method": "given"})
    return replace(file, metadata={**file.metadata, "summary": {**summary, "file": path.name}})


def find_reply_prefix(
    chat: ChatModel, sets: PromptSets, batch_size: int = 32
) -> tuple[tuple[int, ...], float]:
    """The common opening of all replies, such as an opened thought or a newline.

    Positions and first reply tokens are measured after it; otherwise the opening would be measured.

    Returns:
        Its token ids, and the speed in tokens (of prompts and replies) per second.
    """
    prompts = [
        *sets.harmful.train.prompts[:_OPENING_PROMPTS],
        *sets.harmless.train.prompts[:_OPENING_PROMPTS],
    ]
    replies, rate = timed(
        chat,
        [chat.encode_message(prompt) for prompt in prompts],
        first_look.OPENING_TOKENS,
        batch_size=batch_size,
        label="reply openings",
    )
    return first_look.reply_prefix(replies), rate


def find_behind_openings(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    how: Measuring,
    clock: Clock,
    times: int = 0,
    max_tokens: int = 64,
) -> DirectionFile:
    """Find how replies open and the direction behind that; sets ``chat.reply_prefixes``.

    Args:
        times: how often the held-out prompts are asked afterwards, for what is told of the time.
        max_tokens: longest reply to them.

    Raises:
        UserError: as `find_direction`, and for a model whose replies show no refusal to remove.
    """
    _check(chat, sets, how)
    with clock.step("ask the model as it is"):
        seen = first_look.look(chat, sets, how)
        first_look.check(seen, how)
        chat.reply_prefixes[sets.thinking] = seen.prefix
    say(str(forecast(chat, sets, how, times, seen.rate, max_tokens=max_tokens)))
    with clock.step("measure and choose a direction"):
        causal = seen.clear or not chat.completes
        found = find_direction(chat, writers, sets, how, causal=causal)
    return replace(found, metadata={**found.metadata, "first_look": seen.record()})


def _positions(chat: ChatModel, finding: Finding) -> list[int]:
    """The token positions to measure: the chosen one, or all of the template's tail."""
    wanted = finding.position
    if wanted == "instruction-end":
        # After the instruction, all prompts have the same tokens of the template; a completion's
        # prompt ends with the instruction.
        return [-1 if chat.completes else -chat.template_tail() - 1]
    if isinstance(wanted, str):
        raise UserError(f"--position {wanted}: it is instruction-end, or a number such as -1.")
    if wanted is not None:
        if wanted >= 0:
            raise UserError(
                f"--position {wanted}: positions count back from the prompt's end, so -1 is the "
                "last token."
            )
        return [wanted]
    if finding.layer is not None and finding.across is None:
        return [-1]
    return list(range(-min(chat.template_tail(), measuring.MOST_POSITIONS), 0))
