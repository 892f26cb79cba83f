"""Finds prompts that are longer than a model's context, before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, Split
from abl_mlx.inputs.sources import Source
from abl_mlx.models.prompt_tokens import Count
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.support.console import say
from convert.base import escape
from convert.base.errors import UserError

#: The largest share of a set's prompts that may be left out because they are too long.
FEW = 0.05

# A text of fewer characters than context / 4 surely fits, with the template: it has at most four
# bytes per character, and at most as many tokens as bytes.
_SURELY_FITS = 4


def fitting(sets: PromptSets, model: ModelFile) -> PromptSets:
    """The prompts that fit into a model's context; a few that do not are left out with a note.

    Only prompts that might be too long are tokenized.

    Raises:
        UserError: when more than a few are too long, or nothing is left of a part.
    """
    longest = model.context_length()
    if longest is None:
        return sets
    count: list[Count] = []

    def too_long(prompt: Prompt) -> int:
        """The number of a prompt's tokens if that is too many, else 0."""
        if 4 * prompt.length * _SURELY_FITS <= longest:
            return 0
        if not count:
            count.append(model.token_counter())
        tokens = count[0](prompt)
        return tokens if tokens > longest else 0

    parts = {
        "harmful": [sets.harmful.train, sets.harmful.validation, sets.harmful.test],
        "harmless": [sets.harmless.train, sets.harmless.validation, sets.harmless.test],
        "borderline": [] if sets.borderline is None else [sets.borderline],
        **{
            name: [parts.train, parts.validation, parts.test]
            for name, parts in sets.staying.items()
        },
    }
    left = {name: _fitting(given, too_long, longest, model.source) for name, given in parts.items()}
    return replace(
        sets,
        harmful=Split(*left["harmful"]),
        harmless=Split(*left["harmless"]),
        borderline=left["borderline"][0] if left["borderline"] else None,
        **{name: Split(*left[name]) for name in sets.staying},
    )


def _fitting(
    parts: list[PromptSet], too_long: Callable[[Prompt], int], longest: int, source: Source
) -> list[PromptSet]:
    counts = {one: tokens for part in parts for one in part.prompts if (tokens := too_long(one))}
    if not counts:
        return parts
    total = sum(map(len, parts))
    name = parts[0].name.removesuffix("/train")
    first, tokens = next(iter(counts.items()))
    left = [
        replace(part, prompts=tuple(one for one in part.prompts if one not in counts))
        for part in parts
    ]
    said = (
        f"{len(counts)} of {total} prompts of {escape.line(name)} "
        f"{'is' if len(counts) == 1 else 'are'} longer than {source.title}'s context of "
        f"{longest:,} tokens: {tokens:,} tokens, “{escape.shortened(first.text, 40)}”"
        f"{'' if len(counts) == 1 else ', and so on'}"
    )
    if len(counts) > max(1, FEW * total) or not all(map(len, left)):
        raise UserError(f"{said}. Shorten or remove them.")
    say(f"· left out: {said}")
    return left
