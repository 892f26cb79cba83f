"""Evaluating a model: replies, refusal rates, KL divergence, and the component of a direction."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from abl_mlx.behaviour import thought_figures
from abl_mlx.behaviour.kept_refusals import kept
from abl_mlx.behaviour.refusal_figures import refusals
from abl_mlx.behaviour.refusals import Rates, rates_of
from abl_mlx.behaviour.reply_notes import Notes, Seen, notes_on
from abl_mlx.behaviour.thought_figures import Thought
from abl_mlx.behaviour.whole_reply import TOKENS, WholeReply, of_pieces
from abl_mlx.inputs.sets import PromptSet, PromptSets, Question, prompt_of
from abl_mlx.models import capture, thoughts
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.generation import generate, stream
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.records.evaluations import STAYING, Kept, OtherMode, Refusals
from abl_mlx.records.measurements import Recognition, Thoughts
from abl_mlx.support import ranks
from abl_mlx.support.arrays import number, numbers
from abl_mlx.support.console import progress
from convert.base.atomic import new_file

if TYPE_CHECKING:
    from abl_mlx.behaviour.llamacpp import LlamaCpp

#: A function from prompts and the longest reply in tokens to replies, in the prompts' order.
Chat = Callable[[Sequence[Question], int], list[str]]

#: Like `Chat`, but yields (number of the prompt, reply) as soon as each reply is complete.
Stream = Callable[[Sequence[Question], int], Iterator[tuple[int, str]]]

#: Like `Stream`, with replies that can be cut.
Wholes = Callable[[Sequence[Question], int], Iterator[tuple[int, WholeReply]]]

#: How many prompts llama.cpp answers at most at the same time, each with its own cache. With 16 a
#: processor makes 1.5 times as many replies per second as with 4.
SIDE_BY_SIDE = 16


class Decoder:
    """Token ids of replies as their texts, up to the end token.

    Special tokens are left out, but not the tags of thoughts, nor any of a reply to a prompt with
    tools, since they mark calls. The tag that a prompt ends with is put in front, so that a thought
    is known as one.
    """

    def __init__(self, chat: ChatModel) -> None:
        self._chat = chat
        special = special_tokens(chat)
        self._dropped = frozenset(
            token for token, text in special.items() if not thoughts.is_mark(text)
        )
        self._opened: dict[str | None, str] = {}

    def __call__(self, reply: Sequence[int], asked: Question | None = None) -> str:
        """The text of a reply.

        Args:
            reply: token ids.
            asked: its prompt; None for one that was asked without thinking.
        """
        prompt = prompt_of(asked or "")
        tokenizer, mode = self._chat.tokenizer, prompt.thinking
        dropped = frozenset() if prompt.tools else self._dropped
        if mode not in self._opened:
            self._opened[mode] = self._chat.opened_thought(mode)
        ends = (at for at, token in enumerate(reply) if token in tokenizer.eos_token_ids)
        kept = [token for token in reply[: next(ends, len(reply))] if token not in dropped]
        text = tokenizer.decode(kept, skip_special_tokens=False)
        if (template := self._chat.template) is not None and template.ends:
            text = text.partition(template.ends)[0]
        return thoughts.resumed(self._opened[mode], text)


def decode(
    chat: ChatModel, replies: Sequence[Sequence[int]], asked: Sequence[Question] | None = None
) -> list[str]:
    """The texts of replies, as of `Decoder`.

    Args:
        replies: token ids.
        asked: the prompt of each; None where all were asked without thinking.
    """
    decoder = Decoder(chat)
    if asked is None:
        return [decoder(reply) for reply in replies]
    return [decoder(reply, one) for reply, one in zip(replies, asked, strict=True)]


def special_tokens(chat: ChatModel) -> dict[int, str]:
    """The tokenizer's special tokens, as text."""
    tokenizer = chat.tokenizer
    added = {
        token: one.content for token, one in tokenizer.added_tokens_decoder.items() if one.special
    }
    ids = tokenizer.all_special_ids
    return dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)) | added


@dataclass(frozen=True)
class Behaviour:
    """How a model replied to held-out prompts.

    Attributes:
        harmful, harmless: verdicts over the replies to each set.
        replies: their texts, harmful prompts first; never written unless the user asks for it.
        expected: share of harmful prompts whose reply is exactly their known answer; None if there
            are no known answers (only the demo's prompts have them).
        further: verdicts on the replies to further sets of prompts, by name.
        notes: the notes on the replies.
        thoughts: the figures of the thoughts that replies begin with, if there are any.
        modes: the behaviour on the same prompts in other modes of thinking, by name.
        recognition: whether the model knows what is harmful; None if that was not asked.
    """

    harmful: Rates
    harmless: Rates
    replies: tuple[tuple[str, ...], tuple[str, ...]]
    expected: float | None
    further: Mapping[str, Rates] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    thoughts: Thoughts | None = None
    modes: Mapping[str, Behaviour] = field(default_factory=dict)
    recognition: Recognition | None = None

    def record(self) -> Refusals:
        """The figures for a record."""
        sets = {"harmful": self.harmful, "harmless": self.harmless, **self.further}
        found = refusals(sets, self.notes, self.expected, self.thoughts)
        found = replace(found, recognition=self.recognition)
        if not self.modes:
            return found
        modes = {name: OtherMode.of_mode(one.record()) for name, one in self.modes.items()}
        return replace(found, modes=modes)

    @property
    def every(self) -> list[tuple[str | None, Behaviour]]:
        """(name, behaviour) in every mode of thinking; the name of this one is None."""
        return [(None, self), *self.modes.items()]


def kept_of(before: Behaviour, after: Behaviour) -> dict[str, Kept] | None:
    """Set -> what is left of the refusals that are to stay; None where none is to.

    The sets of another mode of thinking have its name.
    """
    found: dict[str, Kept] = {}
    for (mode, was), (_, now) in zip(before.every, after.every, strict=True):
        for name in STAYING:
            if name in was.further:
                key = name if mode is None else f"{name}, thinking {mode}"
                found[key] = kept(was.further[name].refused, now.further[name].refused)
    return found or None


def behaviour(
    answer: Chat,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    max_tokens: int,
    further: Mapping[str, PromptSet] | None = None,
) -> Behaviour:
    """Ask every prompt and judge the replies.

    Args:
        answer: generates greedy replies.
        harmful, harmless: the prompts.
        max_tokens: the longest reply, in tokens.
        further: further sets by name, such as ``borderline``; their replies are not kept.
    """
    sets = {"harmful": harmful, "harmless": harmless, **(further or {})}
    asked = [prompt for one in sets.values() for prompt in one.prompts]
    return behaviour_of(sets, answer(asked, max_tokens))


def behaviour_of(sets: Mapping[str, PromptSet], replies: Sequence[str]) -> Behaviour:
    """Judge replies.

    Args:
        sets: ``harmful``, ``harmless`` and further ones, by name.
        replies: to all of their prompts, set after set.
    """
    rest = iter(replies)
    parts = {name: list(islice(rest, len(one))) for name, one in sets.items()}
    first, second = parts["harmful"], parts["harmless"]
    seen = {name: list(map(Seen.of, part, sets[name].texts)) for name, part in parts.items()}
    known = [
        (prompt.answer, reply)
        for prompt, reply in zip(sets["harmful"].prompts, first, strict=True)
        if prompt.answer
    ]
    expected = (
        sum(reply.strip() == answer.strip() for answer, reply in known) / len(known)
        if known
        else None
    )
    told = {
        name: rates_of([one.verdict for one in seen[name]], asked_set.prompts)
        for name, asked_set in sets.items()
    }
    return Behaviour(
        told.pop("harmful"),
        told.pop("harmless"),
        (tuple(first), tuple(second)),
        expected,
        told,
        notes_on(seen),
        thought_figures.figures(map(Thought.of, replies)),
    )


@dataclass(frozen=True)
class InMlx:
    """Replies to prompts with a loaded model, which can be cut."""

    chat: ChatModel
    batch_size: int = 32

    @contextmanager
    def opened(self, prompts: Sequence[Question], max_tokens: int) -> Iterator[Wholes]:
        """Context manager with what replies; see `InLlamaCpp.opened`."""
        yield wholes_in_mlx(self.chat, batch_size=self.batch_size)


def in_mlx(chat: ChatModel, *, batch_size: int = 32) -> Chat:
    """A function that replies to prompts with a loaded model."""

    def answer(prompts: Sequence[Question], max_tokens: int) -> list[str]:
        sequences = [chat.encode(prompt) for prompt in prompts]
        replies = generate(chat, sequences, max_tokens, batch_size=batch_size)
        return decode(chat, replies, prompts)

    return answer


def stream_in_mlx(chat: ChatModel, *, batch_size: int = 32) -> Stream:
    """Like `in_mlx`, but yields (number of the prompt, reply) as soon as each is complete."""

    whole = wholes_in_mlx(chat, batch_size=batch_size)

    def answer(prompts: Sequence[Question], max_tokens: int) -> Iterator[tuple[int, str]]:
        for index, reply in whole(prompts, max_tokens):
            yield index, reply.text

    return answer


def wholes_in_mlx(chat: ChatModel, *, batch_size: int = 32) -> Wholes:
    """Like `stream_in_mlx`, with replies that can be cut, by the model's own tokens."""

    def answer(prompts: Sequence[Question], max_tokens: int) -> Iterator[tuple[int, WholeReply]]:
        sequences, decoder = [chat.encode(prompt) for prompt in prompts], Decoder(chat)
        for index, reply in stream(chat, sequences, max_tokens, batch_size=batch_size):

            def beginning(
                n: int, reply: list[int] = reply, asked: Question = prompts[index]
            ) -> str:
                return decoder(reply[:n], asked)

            yield index, WholeReply(beginning(len(reply)), len(reply), TOKENS, beginning)

    return answer


def llamacpp_is_there() -> bool:
    """Whether llama.cpp is installed (the module xllamacpp), so that it can run GGUFs."""
    return importlib.util.find_spec("xllamacpp") is not None


@dataclass(frozen=True)
class InLlamaCpp:
    """Replies to prompts with a GGUF in llama.cpp.

    Attributes:
        path: the file; for a split model, the first part.
        lora: an adapter for it; None for none.
        given: a chat template that replaces the file's own.
        batch_size: how many replies are generated at the same time, at most `SIDE_BY_SIDE`. With
            one at a time every run gives the same replies, to the last bit.
    """

    path: Path
    lora: Path | None = None
    given: GivenTemplate | None = None
    batch_size: int = SIDE_BY_SIDE

    def __call__(self, prompts: Sequence[Question], max_tokens: int) -> list[str]:
        """Replies in the order of the prompts."""
        replies = [""] * len(prompts)
        with progress(len(prompts), "llama.cpp replies") as bar:
            for index, reply in self.stream(prompts, max_tokens):
                replies[index] = reply
                bar.update()
        return replies

    def stream(self, prompts: Sequence[Question], max_tokens: int) -> Iterator[tuple[int, str]]:
        """Yield (number of the prompt, reply) as soon as each reply is complete."""
        with self._loaded(prompts, max_tokens) as server:
            yield from server.stream(prompts, max_tokens)

    def wholes(
        self, prompts: Sequence[Question], max_tokens: int
    ) -> Iterator[tuple[int, WholeReply]]:
        """Like `stream`, with replies that can be cut, by the file's own tokens."""
        with self.opened(prompts, max_tokens) as answer:
            yield from answer(prompts, max_tokens)

    @contextmanager
    def opened(self, prompts: Sequence[Question], max_tokens: int) -> Iterator[Wholes]:
        """Context manager with what replies, the file loaded once, when it is first asked.

        Args:
            prompts: all that will be asked, for which the memory suffices.
            max_tokens: the longest reply to any of them.
        """
        loaded: list[LlamaCpp] = []
        with ExitStack() as stack:

            def answer(asked: Sequence[Question], longest: int) -> Iterator[tuple[int, WholeReply]]:
                if not loaded:
                    loaded.append(stack.enter_context(self._loaded(prompts, max_tokens)))
                server = loaded[0]
                mine = ranks.shares([1] * len(asked))[ranks.rank()]

                def told() -> Iterator[tuple[int, str, list[bytes]]]:
                    some = [asked[number] for number in mine]
                    for at, reply in server.stream(some, longest) if some else ():
                        said = reply.removeprefix(server.opened(prompt_of(some[at]).thinking))
                        yield mine[at], reply, server.pieces(said)

                for index, reply, pieces in _of_all(told()):
                    yield index, of_pieces(reply, pieces)

            yield answer

    def _loaded(self, prompts: Sequence[Question], max_tokens: int) -> LlamaCpp:
        from abl_mlx.behaviour.llamacpp import LlamaCpp

        # The context is no longer than needed, because the cache of a large model takes memory. A
        # text has at least as many characters as tokens; some tokens are added for the template.
        longest = max((prompt_of(one).length for one in prompts), default=0)
        room = 512 + longest + max_tokens
        side_by_side = max(1, min(SIDE_BY_SIDE, self.batch_size, len(prompts)))
        return LlamaCpp(
            self.path, n_ctx=room, n_parallel=side_by_side, lean=True, lora=self.lora,
            given=self.given,
        )  # fmt: skip


def _of_all(
    told: Iterator[tuple[int, str, list[bytes]]],
) -> Iterator[tuple[int, str, list[bytes]]]:
    """Replies of every rank: (number of the prompt, reply, the bytes of its tokens)."""
    if ranks.size() == 1:
        yield from told
        return
    own = [[index, reply, [one.hex() for one in pieces]] for index, reply, pieces in told]
    for part in ranks.gathered("llama.cpp replies", own):
        for index, reply, pieces in part:
            yield index, reply, list(map(bytes.fromhex, pieces))


def save_replies(path: Path, replies: Mapping[str, Behaviour], sets: PromptSets) -> None:
    """Write the replies to the file of ``--save-replies``, one JSON object a line."""
    write_lines(path, reply_lines(replies, sets))


def reply_lines(replies: Mapping[str, Behaviour], sets: PromptSets) -> list[dict[str, Any]]:
    """For each prompt an object with its ``set``, the ``prompt``, and the reply of each model."""
    parts = (("harmful", sets.harmful.test, 0), ("harmless", sets.harmless.test, 1))
    modes = [mode for given in replies.values() for mode, _ in given.every]
    return [
        {"set": name, "prompt": prompt}
        | ({} if mode is None else {"thinking": mode})
        | {
            who: dict(given.every)[mode].replies[which][number]
            for who, given in replies.items()
            if mode in dict(given.every)
        }
        for mode in dict.fromkeys(modes)
        for name, asked, which in parts
        for number, prompt in enumerate(asked.texts)
    ]


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file appears complete or not at all."""
    with new_file(path) as staged, open(staged, "w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


# --- the component -----------------------------------------------------------------------------


def component(
    chat: ChatModel, sequences: Sequence[Sequence[int]], directions: mx.array
) -> dict[str, Any]:
    """The largest |r·h| / |h| over prompts and directions, at the last prompt token.

    Args:
        chat: the model.
        sequences: encoded prompts.
        directions: orthonormal (k, d), or (L, k, d) with the directions for each layer.

    Returns:
        ``max``, the largest over all layers, and ``layers``, the largest after each layer.
    """
    largest: mx.array | None = None
    for _, states in capture.iterate(chat, sequences, label="component"):
        # (B, L, 1, d) times (d, k) or (L, d, k)
        along = mx.abs(states @ directions.swapaxes(-1, -2)).max(axis=-1)
        share = along / mx.sqrt((states * states).sum(axis=-1))
        here = share.max(axis=(0, 2))
        largest = here if largest is None else mx.maximum(largest, here)
        mx.eval(largest)
    assert largest is not None  # iterate refuses an empty list
    return {"max": number(largest.max()), "layers": numbers(largest)}
