"""How far `eval` reads replies: as far as the verdicts on the first of them need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from abl_mlx.behaviour import settling
from abl_mlx.behaviour.journal import Answered, Section
from abl_mlx.behaviour.target import Target
from abl_mlx.behaviour.whole_reply import TOKENS
from abl_mlx.choices import Replying
from abl_mlx.commands.eval_asking import ask
from abl_mlx.inputs.sets import PromptSet
from abl_mlx.records.evaluations import Settled
from abl_mlx.support.console import say

#: About how many replies are read whole, evenly from all sets: two batches of MLX, four of
#: llama.cpp.
FIRST = 64

#: The shortest length in tokens at which verdicts on these are compared with those on the whole.
_SHORTEST = 24


def asked(
    target: Target, parts: Mapping[str, PromptSet], replying: Replying, section: Section
) -> tuple[list[Answered], Settled | None]:
    """Judged replies to all prompts, set after set, and how far those behind the first were read.

    The first replies are read to ``replying.max_tokens``, and so are those to prompts with a known
    answer. They show from which length on no verdict changes. The others are read to the next
    longer one of the lengths that are compared.

    Returns:
        The replies, and the length; None where all replies were read whole.

    Raises:
        UserError: when the target fails; what was answered is in the journal.
    """
    each = FIRST // len(parts)
    wholly = {
        name: [at < each or one.answer is not None for at, one in enumerate(part.prompts)]
        for name, part in parts.items()
    }
    first, rest = _only(parts, wholly, True), _only(parts, wholly, False)
    lengths = [n for n in settling.LENGTHS if _SHORTEST <= n < replying.max_tokens]
    lengths.append(replying.max_tokens)
    if len(lengths) < 3 or _count(rest) < _count(first):
        return ask(target, parts, replying, section), None
    told = ask(target, first, replying, section, lengths=lengths)
    found = _settled(told, lengths)
    say(f"  {_sentence(found, len(told))}")
    others = ask(target, rest, replying.but(max_tokens=found.tokens), section)
    of_first, of_rest = iter(told), iter(others)
    whole = chain.from_iterable(wholly.values())
    return [next(of_first if one else of_rest) for one in whole], found


def _only(
    parts: Mapping[str, PromptSet], wholly: Mapping[str, Sequence[bool]], wanted: bool
) -> dict[str, PromptSet]:
    """The prompts whose replies are read whole, or the others.

    Args:
        wholly: for each prompt of each set, whether its reply is read whole.
    """
    return {
        name: replace(
            part,
            prompts=tuple(
                prompt
                for prompt, whole in zip(part.prompts, wholly[name], strict=True)
                if whole is wanted
            ),
        )
        for name, part in parts.items()
    }


def _settled(told: Sequence[Answered], lengths: Sequence[int]) -> Settled:
    """The length to which the other replies are read.

    Replies in an earlier journal, and those without the model's own tokens, cannot be cut: then it
    is the longest.
    """
    if not all(one.begins is not None and one.begins.unit == TOKENS for one in told):
        return Settled(longest=lengths[-1], tokens=lengths[-1], changing=0)
    found = settling.of_answers(told, lengths)
    longer = [n for n in lengths if n > found.tokens]
    return replace(found, tokens=min(longer, default=found.longest))


def _sentence(found: Settled, first: int) -> str:
    if found.tokens == found.longest:
        return settling.sentence(found)
    return (
        f"no verdict on the first {first} replies changes behind their first {found.tokens} "
        f"tokens: the others are read that far (--max-tokens {found.longest})"
    )


def _count(parts: Mapping[str, PromptSet]) -> int:
    return sum(map(len, parts.values()))
