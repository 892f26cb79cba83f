"""The thoughts with which a reply may open: where they end, and whether the prompt opened them.

A complete reply is a text in which thoughts are marked by tags. If the chat template opens the
thought, the opening tag is in the prompt, and the runtime puts it in front of the reply again
(`resumed`). If the tags are special tokens, decoding keeps them (`is_mark`).

Nothing in this module imports MLX.
"""

from __future__ import annotations

import re
from collections.abc import Callable

#: The tags of thoughts: (opening, closing), as regular expressions.
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
        # The tags of gpt-oss, when the detokenizer has dropped their special tokens.
        (r"(?-i:analysis(?=[A-Z]))", r"assistant(?:commentary|final)"),
    )
)
# Closing tags that have no other use, so that one shows a thought even without its opening tag.
_ONLY_CLOSED = re.compile(
    ".*?(?:" + "|".join(closed for _, closed in _TAGS[:-2]) + ")", re.IGNORECASE | re.DOTALL
)
_MARK = re.compile(
    "|".join(f"{opened}|{closed}" for opened, closed in _TAGS[:-2])
    + r"|<\|channel>|<channel\|>|<\|(?:start|channel|message|end)\|>",
    re.IGNORECASE,
)
#: An opening tag: what stands around its name, and the name.
_NAMED = re.compile(r"(<\||[<\[◁])([\w:]+)(\|>|[>\]▷])")
_TEMPLATE_TOKEN = re.compile(
    r"<\|start\|>assistant|<\|im_start\|>assistant\b|<\|channel\|>\w*|<\|[^|<>]{0,40}\|>|<\|\w+>"
    r"|<\w+\|>|<｜[^｜<>]{0,40}｜>"
    r"|</?(?:s|bos|eos|pad|end_of_turn|start_of_turn|response)>",
    re.IGNORECASE,
)


def without_thoughts(reply: str) -> str | None:
    """The reply after its leading thoughts, without tokens of the chat template.

    A thought whose opening tag was in the prompt is recognised by its closing tag. The result is
    None if a thought was opened and never closed.
    """
    text = reply.strip()
    while True:
        behind = behind_thoughts(text)
        if behind is None:
            return None
        token = _TEMPLATE_TOKEN.match(behind)
        if token is None:
            return _TEMPLATE_TOKEN.sub(" ", behind).strip()
        text = behind[token.end() :].strip()


def parted(reply: str) -> tuple[str, str | None]:
    """The thoughts that a reply begins with, without their tags, and `without_thoughts`."""
    text, body, behind = reply.strip(), without_thoughts(reply), behind_thoughts(reply)
    if body is None or behind is None:
        return _MARK.sub(" ", text).strip(), None
    return _MARK.sub(" ", text[: len(text) - len(behind)]).strip(), body


def behind_thoughts(reply: str) -> str | None:
    """Like `without_thoughts`, with chat template tokens as they are."""
    text: str | None = reply.strip()
    behind = None
    while text is not None and text != behind:
        behind, text = text, _behind_one(text)
    return text


def _behind_one(text: str) -> str | None:
    """What follows the thought that a text begins with; the text itself where it is none."""
    for opened, closed in _THOUGHTS:
        start = opened.match(text)
        if start is not None:
            end = closed.search(text, start.end())
            return None if end is None else text[end.end() :].strip()
    only_closed = _ONLY_CLOSED.match(text)
    return text if only_closed is None else text[only_closed.end() :].strip()


def closes_only(reply: str) -> bool:
    """Whether the reply closes a thought that it did not open; then its prompt opened it."""
    text = reply.strip()
    return _ONLY_CLOSED.match(text) is not None and not any(
        opened.match(text) for opened, _ in _THOUGHTS
    )


def has_thought(reply: str) -> bool:
    """Whether the reply begins with a thought, or inside a thought that its prompt opened."""
    text = reply.strip()
    return closes_only(text) or any(opened.match(text) for opened, _ in _THOUGHTS)


def is_mark(token: str) -> bool:
    """Whether a special token is a tag of thoughts, or a part of such a tag."""
    return _MARK.fullmatch(token.strip()) is not None


def opened_at_the_end(text: str) -> str:
    """The end of a prompt, from the tag on that opens a thought; "" if no thought is open there."""
    found = ""
    for opened, closed in _THOUGHTS[:-1]:
        starts = list(opened.finditer(text))
        if starts and closed.search(text, starts[-1].end()) is None:
            tail = text[starts[-1].start() :]
            found = tail if not found or len(tail) < len(found) else found
    return found


def opened_by(render: Callable[[str], str]) -> str:
    """The text with which a chat template opens a thought at every prompt's end; "" if it does not.

    Args:
        render: turns a user's message into the prompt, up to where the reply begins.
    """
    first, second = (render(text)[::-1] for text in ("Why?", "Tell me 7 of them"))
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return opened_at_the_end(first[:same][::-1])


def closing(opened: str) -> str:
    """The text that ends a thought at once, behind a prompt that opened it; "" if none is known."""
    tag = _NAMED.match(opened.strip())
    if tag is None:
        return ""
    closed = f"{tag[1]}/{tag[2]}{tag[3]}"
    if tag[1] == "<|":
        ends = tag[2].replace("START", "END").replace("start", "end").replace("begin", "end")
        closed = f"<|{ends}|>"
    text = f"\n{closed}\n\n"
    return text if without_thoughts(f"{opened}{text}Yes.") == "Yes." else ""


def resumed(opened: str, reply: str) -> str:
    """The complete reply: with the tag that ended its prompt in front, unless it has one itself."""
    text = reply.lstrip()
    if not opened or any(tag.match(text) for tag, _ in _THOUGHTS[:-1]):
        return reply
    return opened + reply
