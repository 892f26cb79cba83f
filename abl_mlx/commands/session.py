"""A loaded model with its writers and a direction, which `chat` and `show` steer at runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from abl_mlx.choices import ADD, Conditioning, Editing, Finding, Prompting, SteerOptions
from abl_mlx.commands import (
    condition_choice,
    edit_choice,
    part_ranking,
    prompt_choice,
    thinking_switch,
)
from abl_mlx.commands.condition_choice import Decision
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.commands.find import find_behind_openings, given_file, set_reply_prefixes
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.steering import ablation
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs import prompts, thinking
from abl_mlx.inputs.sets import Prompt
from abl_mlx.inputs.tools import Tool
from abl_mlx.models import memory
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.readers import with_readers
from abl_mlx.models.writers import Writer
from abl_mlx.outputs.model_file import find_model
from abl_mlx.support.clock import Clock
from convert.base.errors import UsageError


@dataclass(frozen=True)
class Steered:
    """A model whose edit can be switched on, off and scaled while it is loaded.

    Attributes:
        name: what the user typed.
        direction: from a file, or measured.
        editing: what is done with it.
        prompting: how it is asked: its system message and its thinking.
        conditioning: what is done, and on which prompts.
    """

    name: str
    chat: ChatModel
    writers: Sequence[Writer]
    direction: DirectionFile
    editing: Editing
    prompting: Prompting = field(default_factory=Prompting)
    tools: tuple[Tool, ...] = ()
    conditioning: Conditioning = field(default_factory=Conditioning)

    def prompt(self, text: str) -> Prompt:
        """A user's message as this model is asked it; thinking "both" is shown with it on."""
        mode = thinking.modes(self.prompting.thinking)[-1]
        system = prompts.system_message(self.prompting.system)
        return Prompt(text, system=system, thinking=mode, tools=self.tools)

    def edit(self, strength: float | None = None) -> WeightEdit:
        """The edit, with the chosen strength or another one."""
        editing = self.editing
        if strength is not None:
            editing = replace(editing, strength=strength, kind="project")
        return edit_of(self.direction, editing)

    @contextmanager
    def edited(self, strength: float | None = None) -> Iterator[None]:
        """Context manager in which the model runs as edited; at strength 0 it runs unchanged."""
        alpha = self.editing.alpha if strength is None else strength
        if alpha == 0:
            yield
            return
        if self.conditioning.steer == ADD:
            with condition_choice.added(self.chat, self.direction, alpha):
                yield
            return
        with ablation(self.writers, self.edit(strength)):
            yield

    @contextmanager
    def turned(self, strength: float) -> Iterator[None]:
        """Context manager in which the model runs at a strength from refusing to answering.

        Above 0 the direction is removed, as from weights. Below 0 the difference of the means is
        added after its layer, so that the model refuses.

        Raises:
            UserError: below 0, when the direction file has no means.
        """
        if strength < 0:
            with condition_choice.added(self.chat, self.direction, -strength):
                yield
            return
        with self.edited(strength):
            yield

    def decide(self, tokens: Sequence[int]) -> Decision | None:
        """Whether the edit is made on an encoded prompt; None if it is made on all.

        The model must run without the edit.
        """
        condition = condition_choice.when(self.direction, self.conditioning)
        if condition is None:
            return None
        return condition_choice.decide(self.chat, condition, [tokens])[0]


def load(
    text: str, options: SteerOptions, tools: tuple[Tool, ...] = (), *, shows: bool = False
) -> Steered:
    """Load a model (a folder or a GGUF), and load or measure its direction.

    Args:
        text: the model, as the user typed it.
        options: the direction and the edit.
        tools: functions that it may call.
        shows: whether the features of ``--sae`` are shown, and so go with a given direction.

    Raises:
        UserError: when the model or the direction cannot be loaded or measured.
    """
    clock, direction = Clock(), options.direction
    if direction is not None and options.finding.sae is not None and not shows:
        raise UsageError("--direction and --sae both give a direction: leave one of them out.")
    if direction is not None and options.condition is not None:
        raise UsageError(
            "--condition is found together with a direction: leave --direction out, or measure a "
            "file with `abl-mlx measure --condition`."
        )
    condition_choice.check_steer(options.conditioning.steer)
    edit_choice.check(options.editing)
    with find_model(text, options.chatting.template) as model:
        name = model.source.name
        given = None if direction is None else given_file(direction, _beside_file(options, shows))
        memory.check(model.source.title, model.size, asked=options.memory_check)
        with clock.step("load the model"):
            chat = model.load()
            writers = with_readers(chat, model.find_writers(chat), options.editing.edit)
        if tools:
            chat.encode(Prompt("Hello", tools=tools))  # refuses a model that has no place for them
        if given is not None and direction is not None:
            direction_file.check_width(given, direction, chat)
            thinking_switch.check(chat, options.prompting.thinking)
            if options.rank_parts:
                sets = prompt_choice.load(model, options.prompting, options.finding.borderline)
                set_reply_prefixes(chat, sets, options.measuring)
                given = part_ranking.with_all(chat, writers, sets, options, given, clock)
            return _steered(name, chat, writers, given, options, tools)
        sets = prompt_choice.load(model, options.prompting, options.finding.borderline)
    condition_choice.check(options.condition, sets, options.prompting)
    edit_choice.check_layers_and_parts(chat.width, writers, options.editing)
    found = find_behind_openings(chat, writers, sets, options.measuring, clock)
    found = part_ranking.with_all(chat, writers, sets, options, found, clock)
    if options.condition is not None:
        found = condition_choice.add_condition(
            chat, sets, options.prompting, options.condition, found, clock
        )
    return _steered(name, chat, writers, found, options, tools)


def _beside_file(options: SteerOptions, shows: bool) -> Finding:
    """What is asked of a measurement beside ``--direction``, which allows none of it.

    What names the features that are shown is left out.
    """
    if not shows or options.finding.sae is None:
        return options.finding
    return replace(options.finding, sae=None, feature=None, layer=None)


def _steered(
    name: str,
    chat: ChatModel,
    writers: Sequence[Writer],
    direction: DirectionFile,
    options: SteerOptions,
    tools: tuple[Tool, ...],
) -> Steered:
    if options.conditioning.steer == ADD:
        condition_choice.addition(direction, options.editing.alpha)  # refuses a file without one
    return Steered(
        name, chat, writers, direction, options.editing, options.prompting, tools,
        options.conditioning,
    )  # fmt: skip
