"""Loads the prompts for a model, the demo's own, the user's or the bundled ones; encodes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from abl_mlx import demo
from abl_mlx.choices import Finding, Measuring, Prompting
from abl_mlx.commands import prompt_lengths
from abl_mlx.directions import protecting
from abl_mlx.inputs import kept, prompts, thinking
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, Split, prompt_hashes, split
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import ByMode, EncodedSets, encode
from abl_mlx.outputs.model_file import ModelFile
from convert.base.errors import UserError

#: With ``--quick``, the number of prompts of each set to measure, to choose on and to ask.
QUICK = (48, 16, 24)


def load(model: ModelFile | None, chosen: Prompting, borderline: str | None = None) -> PromptSets:
    """The prompt sets of this run: the demo's own, the user's, or the bundled ones.

    Models made from the demo model get the demo's prompts, because they know nothing else.

    Args:
        model: the model to be asked; None for a server.
        chosen: the chosen options.
        borderline: prompt file or dataset of ``--borderline``.
    """
    speaks_demo = model is not None and (
        model.source.is_demo or model.has_tokens(demo.vocabulary())
    )
    if speaks_demo and chosen.harmful is None and chosen.harmless is None:
        sets = prompts.load_demo()
    else:
        sets = prompts.load_sets(chosen.harmful, chosen.harmless, chosen.seed)
    if borderline is not None:
        sets = replace(sets, borderline=prompts.load(borderline, "--borderline"))
    if chosen.keep is not None:
        sets = kept.with_kept(sets, chosen.keep, chosen.seed)
    if (message := prompts.system_message(chosen.keep_system, "--keep-system")) is not None:
        sets = kept.with_off_topic(sets, message)
    sets = sets.asked(
        system=prompts.system_message(chosen.system), thinking=thinking.modes(chosen.thinking)[0]
    )
    if chosen.quick:
        sets = cut(sets, *QUICK)
    sets = cut(sets, chosen.limit)
    return sets if model is None else prompt_lengths.fitting(sets, model)


def cut(
    sets: PromptSets, train: int | None, validation: int | None = None, test: int | None = None
) -> PromptSets:
    """The sets with at most so many prompts in each part; ``train`` is for all parts if it is the
    only number."""
    if train is None:
        return sets
    validation, test = validation or train, test or train

    def few(parts: Split) -> Split:
        return Split(
            parts.train.take(train), parts.validation.take(validation), parts.test.take(test)
        )

    return replace(
        sets,
        harmful=few(sets.harmful),
        harmless=few(sets.harmless),
        borderline=sets.borderline and sets.borderline.take(train),
        kept=sets.kept and few(sets.kept),
        off_topic=sets.off_topic and few(sets.off_topic),
    )


def borderline_part(
    sets: PromptSets, chosen: Prompting, finding: Finding, part: str
) -> PromptSet | None:
    """A part of the borderline prompts for the method ``over-refusal``; None for other methods.

    Raises:
        UserError: when there are too few borderline prompts.
    """
    if finding.method != "over-refusal":
        return None
    whole = sets.borderline
    if whole is None or len(whole) < prompts.MINIMUM:
        raise UserError(
            "--method over-refusal needs harmless prompts that this model refuses: give at least "
            f"{prompts.MINIMUM} of them with --borderline FILE."
        )
    return getattr(split(whole, chosen.seed), part)


def encoded(chat: ChatModel, sets: PromptSets, how: Measuring) -> ByMode:
    """The prompts with which a direction is found, encoded in every mode of thinking.

    Raises:
        UserError: when a prompt cannot be encoded, or there are too few borderline prompts.
    """
    return {
        mode: _encoded(chat, sets.asked(thinking=mode), mode, how)
        for mode in thinking.modes(how.prompting.thinking)
    }


def _encoded(chat: ChatModel, sets: PromptSets, mode: str | None, how: Measuring) -> EncodedSets:
    """The prompts in one mode of thinking."""
    parts: dict[str, dict[str, tuple[Prompt, ...]]] = {"train": {}, "validation": {}}
    for part, named in parts.items():
        for name, split_ in {"harmful": sets.harmful, "harmless": sets.harmless}.items():
            named[name] = getattr(split_, part).prompts
        borderline = borderline_part(sets, how.prompting, how.finding, part)
        if borderline is not None:
            named["borderline"] = borderline.prompts
        for name, split_ in sets.staying.items():
            named[name] = getattr(split_, part).prompts
    if how.finding.protect is not None:
        parts["train"] |= _protected(how.finding.protect, mode)
    if sets.off_topic is not None:
        parts["train"]["on_topic"] = _on_topic(sets, sets.off_topic)
    train, validation = (
        {name: encode(chat, prompts) for name, prompts in named.items()} for named in parts.values()
    )
    refused = "borderline" if how.finding.method == "over-refusal" else "harmful"
    tail = chat.message_tail(mode)
    return EncodedSets(mode, refused, train, validation, tail, prompt_hashes(sets))


def _protected(given: str, mode: str | None) -> dict[str, tuple[Prompt, ...]]:
    """The prompts of ``--protect`` by concept, as train sets.

    Raises:
        UserError: when a concept has too few prompts.
    """
    concepts: dict[str, list[Prompt]] = {}
    for one in prompts.load(given, "--protect").prompts:
        name = protecting.PREFIX + (one.category or Path(given).stem)
        concepts.setdefault(name, []).append(replace(one, thinking=mode))
    for name, some in concepts.items():
        if len(some) < prompts.MINIMUM:
            raise UserError(
                f"--protect {given}: {name.removeprefix(protecting.PREFIX)} has {len(some)} "
                f"of the {prompts.MINIMUM} prompts that a concept needs at least."
            )
    return {name: tuple(some) for name, some in concepts.items()}


def _on_topic(sets: PromptSets, off_topic: Split) -> tuple[Prompt, ...]:
    """The off-topic train prompts as harmless ones, without the message that puts them off topic.

    Where ``--system`` gives the same message, they are asked without any.
    """
    harmless = sets.harmless.train.prompts
    if harmless == off_topic.train.prompts:
        return tuple(replace(one, system=None) for one in harmless)
    return harmless


def borderline_asked(sets: PromptSets, chosen: Prompting, finding: Finding) -> PromptSet | None:
    """The borderline prompts that a run asks before and after; none was used for measuring.

    With the bundled sets these are all borderline prompts (with ``--quick`` as many as of the other
    sets); with ``--method over-refusal`` their held-out part; with the user's own prompts none.
    """
    if finding.method == "over-refusal":
        return borderline_part(sets, chosen, finding, "test")
    whole = sets.borderline
    if not whole or chosen.harmful is not None:
        return None
    return whole.take(len(sets.harmful.test)) if chosen.quick else whole


def further_asked(sets: PromptSets, chosen: Prompting, finding: Finding) -> dict[str, PromptSet]:
    """Name -> what a run asks beside the harmful and harmless prompts, before and after.

    That is `borderline_asked`, and the test parts of the prompts whose refusals are to stay.
    """
    borderline = borderline_asked(sets, chosen, finding)
    staying = {name: parts.test for name, parts in sets.staying.items()}
    return ({} if borderline is None else {"borderline": borderline}) | staying
