"""`abl-mlx show`: the component along the direction at each layer and token of a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from abl_mlx import __version__
from abl_mlx.choices import SteerOptions
from abl_mlx.commands import sae_choice
from abl_mlx.commands.condition_choice import Decision
from abl_mlx.commands.session import Steered
from abl_mlx.commands.shown_features import features
from abl_mlx.edits.edit import orthonormal
from abl_mlx.models import given_template, heads
from abl_mlx.models.capture import Recorder
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.outputs.record_parts import chosen
from abl_mlx.records.looks import ShowRecord
from abl_mlx.reports import part_tables, sae_tables
from abl_mlx.support.arrays import numpy_of
from convert.base import escape
from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError


@dataclass(frozen=True)
class Projection:
    """The component of one prompt's residual stream along a direction.

    Attributes:
        ids: the T token ids.
        prompt: how many of them are the prompt's; the others are of a reply.
        tokens: the T tokens as text.
        before, after: (L, T) float32, r·h / |h| for the original and for the edited model: the
            cosine between the stream after layer l and the direction (for several directions, the
            length of the projection onto them divided by |h|).
        decision: whether the edit is made on the prompt; None if it is made on all prompts.
    """

    ids: list[int]
    prompt: int
    tokens: list[str]
    before: np.ndarray
    after: np.ndarray
    decision: Decision | None = None


def project(steered: Steered, prompt: str, *, reply: int = 0) -> Projection:
    """Run a prompt in the chat template, without and with the edit, and record the stream.

    Args:
        steered: the model and its edit.
        prompt: the user's message.
        reply: how many tokens of the original's greedy reply are run as well.
    """
    from abl_mlx.behaviour.evaluate import generate

    chat = steered.chat
    tokens = chat.encode(steered.prompt(prompt))
    count = len(tokens)
    if reply:
        tokens = tokens + generate(chat, [tokens], reply)[0]
    before = _shares(steered, tokens)
    decision = steered.decide(tokens[:count])
    if decision is None or decision.met:
        with steered.edited():
            after = _shares(steered, tokens)
    else:
        after = before
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise UserError(
            f"{steered.name}: the residual stream of this prompt is not finite, so the model's "
            "weights or the direction are damaged: fetch them again."
        )
    texts = [chat.tokenizer.decode([token]) for token in tokens]
    return Projection(tokens, count, texts, before, after, decision)


def stream(chat: ChatModel, tokens: list[int]) -> mx.array:
    """The residual stream of tokens as the model runs now, after every layer: (L, T, d)."""
    with Recorder(chat) as recorder, heads.unseen(chat.model):
        recorder.keep(mx.array([len(tokens)]), range(-len(tokens), 0))
        chat.model(mx.array([tokens], mx.int32))
        states = recorder.take()[0]
        mx.eval(states)
    return states


def cosines(states: mx.array, selected: mx.array) -> np.ndarray:
    """r·h / |h| of a stream (L, T, d) and directions (k, d) or (L, k, d): (L, T) float32."""
    rows = []
    for layer in range(states.shape[0]):
        unit = orthonormal(selected if selected.ndim == 2 else selected[layer])
        along = states[layer] @ unit.T
        size = mx.sqrt((states[layer] * states[layer]).sum(axis=-1))
        length = along[:, 0] if unit.shape[0] == 1 else mx.sqrt((along * along).sum(axis=-1))
        rows.append(length / mx.maximum(size, 1e-30))
    return numpy_of(mx.stack(rows))


def _shares(steered: Steered, tokens: list[int]) -> np.ndarray:
    return cosines(stream(steered.chat, tokens), steered.direction.selected)


def show(
    steered: Steered,
    prompt: str,
    *,
    reply: int = 0,
    page: Path | None = None,
    options: SteerOptions | None = None,
) -> ShowRecord:
    """What the command prints and keeps.

    Args:
        page: where a page with the picture goes.
        options: what was chosen: for the command on the page, and an autoencoder.
    """
    if page is not None:
        check_new(page)
    finding = (options or SteerOptions()).finding
    sae = None if finding.sae is None else sae_choice.read(finding, steered.chat)
    found = project(steered, prompt, reply=reply)
    record = ShowRecord(
        abl_mlx=__version__,
        source=steered.name,
        prompt=prompt,
        template=given_template.record(steered.chat.given_template),
        direction=chosen(steered.direction),
        tokens=found.tokens,
        before=found.before.round(5).tolist(),
        after=found.after.round(5).tolist(),
        condition=None if found.decision is None else found.decision.record,
        sae=(
            None
            if sae is None
            else features(steered, sae, found.ids, found.prompt, finding.features)
        ),
    )
    if page is not None:
        from abl_mlx.reports.page_show import show_page
        from abl_mlx.reports.replay import command_line

        defaults = SteerOptions().record() | {"reply": 0}
        flags = (options or SteerOptions()).record() | {"reply": reply}
        command = command_line(["show", steered.name, prompt], flags, defaults)

        with new_file(page) as staged:
            staged.write_text(show_page(record, command), encoding="utf-8")
        record = replace(record, output=str(page))
    return record


_SHADES = " ░▒▓█"


def table(record: ShowRecord, *, color: bool = False) -> str:
    """The record as a table with a line for each token and a cell for each layer.

    Args:
        record: the record.
        color: whether signs are shown in colours, for terminals.
    """
    before, after = (
        np.stack([np.fromiter(row, float) for row in rows])
        for rows in (record.before, record.after)
    )
    most = max(float(np.abs(before).max()), 1e-9)
    names = [_plain(token) for token in record.tokens]
    wide = max(map(len, names))
    layers = before.shape[0]
    head = f"{'':<{wide}}  {'before':<{layers}}   {'after':<{layers}}   largest before, after"
    lines = [
        f"{record.source}: share of the direction in the stream, r·h/|h|; one cell a layer, "
        f"from 0 to {layers - 1}; █ = {most:.2f}",
        head,
    ]
    for t, name in enumerate(names):
        cells = ["".join(_cell(value / most, color) for value in rows[:, t])
                 for rows in (before, after)]  # fmt: skip
        numbers = [_largest(rows[:, t]) for rows in (before, after)]
        lines.append(
            f"{name:<{wide}}  {cells[0]} │ {cells[1]}   {numbers[0]:+.3f}  {numbers[1]:+.3f}"
        )
    if record.condition is not None:
        lines.append(record.condition.told)
    lines += sae_tables.shown_lines(record.sae, names)
    return "\n".join([*lines, *part_tables.lines(record.direction)])


def _largest(values: np.ndarray) -> float:
    return float(values[np.abs(values).argmax()])


def _cell(share: float, color: bool) -> str:
    shade = _SHADES[min(len(_SHADES) - 1, round(abs(share) * (len(_SHADES) - 1)))]
    if not color or shade == " ":
        return shade
    return f"\x1b[{31 if share > 0 else 34}m{shade}\x1b[0m"


def _plain(token: str) -> str:
    """A token on one line, at most 16 characters wide."""
    text = escape.line(token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·"))
    # The record may already have escapes in place of these characters.
    text = text.replace("\\n", "⏎").replace("\\t", "⇥")
    return text if len(text) <= 16 else f"{text[:15]}…"
