"""`abl-mlx eval --direction`: a model in MLX that is asked with an edit at runtime.

Where the direction has a condition, every prompt is first run as the model is, which decides. The
prompts on which it is met are then asked with the edit, the others without, each in batches of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from abl_mlx.behaviour.target import Group, Groups, Target
from abl_mlx.behaviour.whole_reply import WholeReply
from abl_mlx.choices import ADD, Editing
from abl_mlx.commands import condition_choice
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.condition import Condition
from abl_mlx.edits.steering import ablation
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.eval_choices import EvalOptions, Steering
from abl_mlx.inputs.sets import PromptSet, Question, prompt_of
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.records.conditions import ConditionFound, MetOn, SteeredBy
from abl_mlx.support.flags import first_given
from convert.base.errors import UsageError, UserError


@dataclass(frozen=True)
class SteeredModel:
    """A model in MLX with an edit at runtime.

    Attributes:
        name: of the direction file.
        steering: what is done.
        condition: on which prompts; None for all.
        decided: a prompt's identity -> whether the edit is made on it.
    """

    chat: ChatModel
    writers: Sequence[Writer]
    name: str
    direction: DirectionFile
    steering: Steering
    condition: Condition | None
    decided: dict[str, bool] = field(default_factory=dict)

    def target(self, target: Target) -> Target:
        """The target of `eval` that is asked with the edit."""
        wholes = target.wholes
        assert wholes is not None
        identity = {
            "direction": self.direction.sha256, "steer": self.steering.conditioning.steer,
            "strength": self.steering.strength, "conditional": self.condition is not None,
        }  # fmt: skip

        def whole(prompts: Sequence[Question], max_tokens: int) -> Iterator[tuple[int, WholeReply]]:
            for indices, context in self.grouped(prompts):
                with context():
                    for number, reply in wholes([prompts[i] for i in indices], max_tokens):
                        yield indices[number], reply

        def ask(prompts: Sequence[Question], max_tokens: int) -> Iterator[tuple[int, str]]:
            for number, reply in whole(prompts, max_tokens):
                yield number, reply.text

        return replace(
            target, ask=ask, wholes=whole, grouped=self.grouped,
            identity=target.identity | {"steered": identity},
        )  # fmt: skip

    @property
    def grouped(self) -> Groups:
        """Prompts in two groups: those asked without, and those asked with the edit."""

        def groups(prompts: Sequence[Question]) -> list[Group]:
            met = self.met(prompts)
            off = [index for index, one in enumerate(met) if not one]
            on = [index for index, one in enumerate(met) if one]
            return [pair for pair in ((off, nullcontext), (on, self._on)) if pair[0]]

        return groups

    def met(self, prompts: Sequence[Question]) -> list[bool]:
        """On which prompts the edit is made."""
        if self.condition is None:
            return [True] * len(prompts)
        asked = [prompt_of(one) for one in prompts]
        new = {one.identity: one for one in asked if one.identity not in self.decided}
        if new:
            encoded = [self.chat.encode(one) for one in new.values()]
            found = condition_choice.decide(self.chat, self.condition, encoded)
            self.decided.update(zip(new, (one.met for one in found), strict=True))
        return [self.decided[one.identity] for one in asked]

    def record(self, parts: Mapping[str, PromptSet]) -> SteeredBy:
        """The edit, and on how many prompts of each set and category it was made."""
        met: dict[str, MetOn] | None = None
        if self.condition is not None:
            met = {}
            for name, part in parts.items():
                decisions = self.met(part.prompts)
                met[name] = MetOn(n=len(part), met=sum(decisions))
                for category in sorted({one.category for one in part.prompts} - {""}):
                    mine = [
                        one for one, prompt in zip(decisions, part.prompts, strict=True)
                        if prompt.category == category
                    ]  # fmt: skip
                    met[f"{name}/{category}"] = MetOn(n=len(mine), met=sum(mine))
        known = None if self.condition is None else self.direction.metadata["condition"]
        return SteeredBy(
            direction=self.name,
            sha256=self.direction.sha256,
            steer=self.steering.conditioning.steer,
            strength=self.steering.strength,
            condition=None if known is None else ConditionFound.of(known),
            met=met,
        )

    def _on(self) -> AbstractContextManager[None]:
        strength = self.steering.strength
        if self.steering.conditioning.steer == ADD:
            return condition_choice.added(self.chat, self.direction, strength)
        return ablation(self.writers, self._edit)

    @property
    def _edit(self) -> WeightEdit:
        return edit_of(self.direction, Editing(strength=self.steering.strength))


def check(options: EvalOptions, runtime: str | None) -> None:
    """Check, before a model is loaded, that flags go with ``--direction``.

    Args:
        options: the chosen options.
        runtime: of the target; None for a server.

    Raises:
        UsageError: when they do not.
        UserError: when the model does not run in MLX.
    """
    steering, metrics = options.steering, options.metrics
    condition_choice.check_steer(steering.conditioning.steer)
    if steering.direction is None:
        if steering != Steering():
            raise UsageError(
                "--strength, --steer and --unconditional are of an edit at runtime: add "
                "--direction FILE."
            )
        return
    if runtime != "mlx-lm":
        raise UserError(
            f"--direction {steering.direction}: an edit at runtime needs the model in MLX: add "
            "--runtime mlx-lm, or give its folder."
        )
    flag = first_given((
        ("--perplexity", metrics.perplexity), ("--recognition", metrics.recognition),
        ("--lm-eval", metrics.lm_eval),
    ))  # fmt: skip
    if flag is not None:
        raise UsageError(
            f"{flag} and --direction do not go together: leave one of them out, or write the "
            "edited model and evaluate that."
        )


def steered(target: Target, file: ModelFile | None, options: EvalOptions) -> SteeredModel | None:
    """The target with the edit of ``--direction``; None without one.

    Raises:
        UserError: when the direction cannot be read, or does not fit the model.
    """
    steering = options.steering
    if steering.direction is None:
        return None
    assert file is not None  # `check` has checked both
    assert target.chat is not None
    direction = direction_file.read(steering.direction)
    direction_file.check_width(direction, steering.direction, target.chat)
    if steering.conditioning.steer == ADD:
        condition_choice.addition(direction, steering.strength)
    condition = condition_choice.when(direction, steering.conditioning)
    writers = file.find_writers(target.chat)
    return SteeredModel(
        target.chat, writers, steering.direction.name, direction, steering, condition
    )
