"""Finds the condition of ``--condition``, and decides by it on which prompts an edit is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from abl_mlx.choices import STEERS, Conditioning, Prompting
from abl_mlx.directions import conditioning
from abl_mlx.directions.conditioning import Sides
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.condition import Condition
from abl_mlx.edits.steering import Intervention, adding, steering
from abl_mlx.inputs import kept, prompts, thinking
from abl_mlx.inputs.sets import PromptSets, Split
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.records.conditions import Decided
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from convert.base.errors import UsageError, UserError

#: A smaller F1 on validation prompts is warned of.
POOR = 0.8


def add_condition(
    chat: ChatModel,
    sets: PromptSets,
    prompting: Prompting,
    spec: str,
    direction: DirectionFile,
    clock: Clock,
) -> DirectionFile:
    """A direction with the condition that a prompt is one of those of ``--condition``.

    Args:
        chat: the model, without any intervention.
        sets: the prompts with which the direction was measured.
        prompting: how they are asked.
        spec: the value of ``--condition``.
        direction: the direction.
        clock: times the step.

    Raises:
        UserError: when there are no such prompts, or too few.
    """
    inside, outside = _parts(sets, prompting, spec)

    def encoded(part: str, every: Sequence[Split]) -> list[list[int]]:
        return [chat.encode(one) for each in every for one in getattr(each, part).prompts]

    with clock.step("find the condition"), ExitStack() as stack:
        tokens = {
            part: (encoded(part, [inside]), encoded(part, outside))
            for part in ("train", "validation")
        }
        counts = conditioning.counts_of(
            [one for pair in tokens.values() for s in pair for one in s]
        )
        train, validation = (
            Sides(*(stack.enter_context(conditioning.stored(chat, one, counts)) for one in pair))
            for pair in tokens.values()
        )
        condition, found = conditioning.find(train, validation, counts, spec)
    if found.f1 < POOR:
        say(
            f"warning: the best condition tells {spec} from other prompts with an F1 of only "
            f"{found.f1:.2f} on validation prompts"
        )
    return direction.conditional(condition, found)


def check(spec: str | None, sets: PromptSets, prompting: Prompting) -> None:
    """Check the prompts of ``--condition`` before the model runs.

    Raises:
        UserError: when there are no such prompts, or too few.
    """
    if spec is not None:
        _parts(sets, prompting, spec)


def _parts(sets: PromptSets, prompting: Prompting, spec: str) -> tuple[Split, list[Split]]:
    """The prompts inside a condition, and all others, asked as the direction's prompts are."""
    inside, others = kept.told_apart(sets, spec, prompting.seed)
    system = prompts.system_message(prompting.system)
    mode = thinking.modes(prompting.thinking)[-1]
    return (
        inside.asked(system=system, thinking=mode),
        [one.asked(system=system, thinking=mode) for one in others],
    )


# --- at runtime --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """Whether an edit is made on a prompt, and why.

    Attributes:
        condition: the condition.
        score: the cosine of the prompt.
        met: whether it is met.
    """

    condition: Condition
    score: float
    met: bool

    @property
    def record(self) -> Decided:
        """The decision as a part of a record."""
        return Decided(
            score=self.score, threshold=self.condition.threshold, met=self.met, told=str(self)
        )

    def __str__(self) -> str:
        side = "at or above" if self.score >= self.condition.threshold else "below"
        told = "met, so the edit is on" if self.met else "not met, so the edit is off"
        return f"condition {told}: {self.score:+.3f}, {side} {self.condition.threshold:+.3f}"


def when(direction: DirectionFile, chosen: Conditioning) -> Condition | None:
    """The condition of a direction, unless ``--unconditional`` is given."""
    return None if chosen.unconditional else direction.when


def decide(
    chat: ChatModel, condition: Condition, sequences: Sequence[Sequence[int]]
) -> list[Decision]:
    """Decisions on encoded prompts; the model must run without interventions."""
    scores = condition.scores(chat, sequences)
    return [
        Decision(condition, float(score), bool(met))
        for score, met in zip(scores, condition.met(scores), strict=True)
    ]


def addition(direction: DirectionFile, strength: float) -> Intervention:
    """The difference of the means, to be added after its layer.

    It is the intervention of ``--steer add``, and the constant of ``--induce --direction``.

    Raises:
        UserError: when the direction file does not have it.
    """
    summary = direction.metadata.get("summary", {})
    layer, position = summary.get("layer"), summary.get("position")
    if direction.candidates is None or layer is None or position is None:
        raise UserError(
            "the difference of the means after one layer is what can be added, and this direction "
            "file has none: measure one with `abl-mlx measure` and --layer N."
        )
    return adding(direction.candidates.difference(round(layer), position), round(layer), strength)


@contextmanager
def added(chat: ChatModel, direction: DirectionFile, strength: float) -> Iterator[None]:
    """Context manager in which the difference of the means is added: `addition`."""
    with steering(chat, addition(direction, strength)):
        yield


def check_steer(steer: str) -> None:
    """Check the value of ``--steer``.

    Raises:
        UsageError: when there is no such value.
    """
    if steer not in STEERS:
        raise UsageError(f"--steer {steer}: there are {' and '.join(STEERS)}.")


def warn_unconditional(direction: DirectionFile) -> None:
    """Say that an edit of weights has no condition, if the direction has one."""
    if direction.when is not None:
        found = direction.metadata["condition"]
        say(
            f"note: the direction is meant for {found['prompts']} alone, but weights, adapters and "
            "control vectors hold no condition: what is written is unconditional, for all prompts. "
            "chat and eval --direction keep the condition."
        )
