"""The thoughts that a reply may open with: where they end, and whether the prompt opened them.

A reply in full is text in which its thoughts are marked by their tags. Where the chat template
opens the thought, the tag stands in the prompt, and the runtime puts it back in front of the reply
(`resumed`); where the tags are special tokens, they are kept in decoding (`is_mark`).

Nothing in this module imports MLX.
"""

from __future__ import annotations

import re
from collections.abc import Callable

#: The tags of thoughts: an opening, and what closes it.
_TAGS = (
    (r"<think>", r"</think>"),
    (r"<thinking>", r"</thinking>"),
    (r"<thoughts?>", r"</thoughts?>"),
    (r"<reasoning>", r"</reasoning>"),
    (r"<(?:seed|longcat|ling)[:_]think>", r"</(?:seed|longcat|ling)[:_]think>"),
    (r"◁think▷", r"◁/think▷"),
    (r"\[think\]", r"\[/think\]"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|think_?start\|>", r"<\|think_?end\|>"),
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),
    (r"<unused94>(?:thought)?", r"<unused95>"),
    (r"<\|channel>thought", r"<channel\|>"),
    (r"<\|channel\|>(?:analysis|commentary)", r"<\|end\|>|(?=<\|channel\|>final)"),
)
_THOUGHTS = tuple(
    (re.compile(opened, re.IGNORECASE), re.compile(closed, re.IGNORECASE))
    for opened, closed in (
        *_TAGS,
        # OpenAI's, with its special tokens dropped by the detokenizer.
        (r"(?-i:analysis(?=[A-Z]))", r"assistant(?:commentary|final)"),
    )
)
# A tag that closes nothing else, so that it tells of a thought without its opening.
_ONLY_CLOSED = re.compile(
    ".*?(?:" + "|".join(closed for _, closed in _TAGS[:-2]) + ")", re.IGNORECASE | re.DOTALL
)
_MARK = re.compile(
    "|".join(f"{opened}|{closed}" for opened, closed in _TAGS[:-2])
    + r"|<\|channel>|<channel\|>|<\|(?:start|channel|message|end)\|>",
    re.IGNORECASE,
)
_TEMPLATE_TOKEN = re.compile(
    r"<\|start\|>assistant|<\|im_start\|>assistant\b|<\|channel\|>\w*|<\|[^|<>]{0,40}\|>|<\|\w+>"
    r"|<\w+\|>|<｜[^｜<>]{0,40}｜>"
    r"|</?(?:s|bos|eos|pad|end_of_turn|start_of_turn|response)>",
    re.IGNORECASE,
)


def without_thoughts(reply: str) -> str | None:
    """The reply behind its leading thought blocks, without chat template tokens.

    A block whose opening tag stood in the prompt is known by its closing tag. None: a block was
    opened and never closed.
    """
    text = reply.strip()
    while True:
        for opened, closed in _THOUGHTS:
            start = opened.match(text)
            if start is None:
                continue
            end = closed.search(text, start.end())
            if end is None:
                return None
            text = text[end.end() :].strip()
            break
        else:
            only_closed = _ONLY_CLOSED.match(text)
            if only_closed is not None:
                text = text[only_closed.end() :].strip()
                continue
            token = _TEMPLATE_TOKEN.match(text)
            if token is None:
                break
            text = text[token.end() :].strip()
    return _TEMPLATE_TOKEN.sub(" ", text).strip()


def closes_only(reply: str) -> bool:
    """Whether the reply ends a thought that it did not open, which its prompt must have done."""
    text = reply.strip()
    return _ONLY_CLOSED.match(text) is not None and not any(
        opened.match(text) for opened, _ in _THOUGHTS
    )


def has_thought(reply: str) -> bool:
    """Whether the reply begins with a thought, or within one."""
    text = reply.strip()
    return closes_only(text) or any(opened.match(text) for opened, _ in _THOUGHTS)


def is_mark(token: str) -> bool:
    """Whether a special token is a tag of thoughts, or a part of one."""
    return _MARK.fullmatch(token.strip()) is not None


def opened_at_the_end(text: str) -> str:
    """The end of a prompt from the tag on that opens a thought there; "" where none is open."""
    found = ""
    for opened, closed in _THOUGHTS[:-1]:
        starts = list(opened.finditer(text))
        if starts and closed.search(text, starts[-1].end()) is None:
            tail = text[starts[-1].start() :]
            found = tail if not found or len(tail) < len(found) else found
    return found


def opened_by(render: Callable[[str], str]) -> str:
    """What a chat template opens a thought with at the end of every prompt; "" where it does not.

    Args:
        render: a user's message to the prompt, up to where the reply begins.
    """
    first, second = (render(text)[::-1] for text in ("Why?", "Tell me 7 of them"))
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return opened_at_the_end(first[:same][::-1])


def resumed(opened: str, reply: str) -> str:
    """A reply in full: behind the tag with which its prompt ended, unless it has one itself."""
    text = reply.lstrip()
    if not opened or any(tag.match(text) for tag, _ in _THOUGHTS[:-1]):
        return reply
    return opened + reply
