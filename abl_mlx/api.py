"""What a notebook needs, in a few functions: the names that ``abl_mlx`` itself exports.

A model is loaded, prompts are chosen, a direction is measured and chosen, looked at or removed at
runtime, written into files, and judged:

>>> import abl_mlx
>>> model = abl_mlx.load("demo")
>>> prompts = abl_mlx.load_prompts(model=model)
>>> direction = abl_mlx.choose(model, prompts, layer=2)
>>> question = prompts.harmful.test.texts[0]
>>> model.reply([question])
["I'm sorry, but I can't help with that."]
>>> with abl_mlx.ablation(model, direction):
...     model.reply([question]) == [prompts.harmful.test.prompts[0].answer]
True

Mistakes in what is given, such as a file that is damaged, raise `UserError`, whose message is one
sentence with the mend. Mistakes in a program, such as the name of a flag that there is not, raise
TypeError or ValueError.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from abl_mlx.behaviour import evaluate as replies
from abl_mlx.choices import (
    METHODS,
    ApplyOptions,
    Editing,
    EvalOptions,
    Finding,
    Measuring,
    Prompting,
)
from abl_mlx.commands import audit as weights
from abl_mlx.commands import evaluate_model, measure_apply, prompt_choice
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.commands.find import find_behind_openings
from abl_mlx.directions import direction_file, measuring
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.measuring import Candidates
from abl_mlx.edits import steering
from abl_mlx.edits.edit import Edit
from abl_mlx.inputs.sets import Prompt, PromptSets
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer
from abl_mlx.outputs.model_file import ModelFile, find_model
from abl_mlx.records.edits import ApplyRecord
from abl_mlx.records.evaluations import EvalRecord
from abl_mlx.records.looks import AuditRecord
from abl_mlx.support.clock import Clock


@dataclass(frozen=True)
class Model:
    """A model in memory.

    Attributes:
        chat: the model in MLX, its tokenizer and its chat template.
        writers: the weights that write to the residual stream.
        file: the files that it came from.
    """

    chat: ChatModel
    writers: Sequence[Writer]
    file: ModelFile

    def encode(self, prompt: str | Prompt) -> list[int]:
        """The token ids of a prompt in the chat template, up to where the reply begins."""
        return self.chat.encode(prompt)

    def reply(self, prompts: Sequence[str | Prompt], max_tokens: int = 64) -> list[str]:
        """Greedy replies, one for each user message or prompt, of at most ``max_tokens`` tokens."""
        return replies.in_mlx(self.chat)(prompts, max_tokens)


def load(model: str | PathLike[str]) -> Model:
    """Load a model.

    Args:
        model: what the command line takes: ``demo``, a folder of MLX or Hugging Face, a .gguf, a
            repository of Hugging Face, ``repository:Q4_K_M`` or ``ollama:NAME``.

    Raises:
        UserError: when there is none, or it is damaged or of a kind that cannot be run.
    """
    with find_model(str(model)) as file:
        chat = file.load()
        return Model(chat, file.find_writers(chat), file)


def load_prompts(
    harmful: str | None = None,
    harmless: str | None = None,
    *,
    model: Model | None = None,
    borderline: str | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> PromptSets:
    """Harmful and harmless prompts, each split into parts to train, to validate and to test on.

    Args:
        harmful, harmless: files or datasets of Hugging Face; without them the bundled sets, or for
            the demo model its own.
        model: what will be asked: prompts that do not fit its context are left out.
        borderline: a file or dataset of harmless prompts that look harmful; without it the bundled
            ones, beside the bundled sets.
        seed: fixes the split.
        limit: at most so many prompts of each part.

    Raises:
        UserError: when a set cannot be read, is too small, or shares prompts with the other.
    """
    chosen = Prompting(harmful, harmless, seed, limit)
    return prompt_choice.load(model.file if model is not None else None, chosen, borderline)


def measure(
    model: Model,
    prompts: PromptSets,
    *,
    positions: Sequence[int] = (-1,),
    method: str = measuring.METHOD,
    rank: int = 1,
) -> Candidates:
    """Candidate directions after every layer, from the prompts' train parts.

    >>> import abl_mlx
    >>> model = abl_mlx.load("demo")
    >>> candidates = abl_mlx.measure(model, abl_mlx.load_prompts(model=model))
    >>> candidates.harmful_mean.shape  # layers, positions, dimensions of the residual stream
    (4, 1, 256)

    Args:
        positions: token positions, counted back from the end of the prompt in its template.
        method: one of `abl_mlx.choices.METHODS`; docs/methods.md has the formulas.
        rank: how many directions ``svd`` finds.

    Raises:
        UserError: for ``over-refusal`` without enough borderline prompts, and for weights whose
            states are not finite.
        ValueError: for a method that there is not.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: there are {', '.join(METHODS)}")
    borderline = prompt_choice.borderline_part(
        prompts, Prompting(), Finding(method=method), "train"
    )
    harmful, harmless = (
        [model.encode(one) for one in part.train.prompts]
        for part in (prompts.harmful, prompts.harmless)
    )
    between = None if borderline is None else [model.encode(one) for one in borderline.prompts]
    return measuring.measure(
        model.chat, harmful, harmless, list(positions), method=method, rank=rank,
        borderline=between,
    )  # fmt: skip


def choose(model: Model, prompts: PromptSets, **flags: Any) -> DirectionFile:
    """Measure candidate directions, and choose the one whose removal ends refusals.

    As `abl-mlx measure` does: the model is asked first, and the candidates are tried on the
    validation prompts (Arditi et al. 2024, arXiv 2406.11717).

    Args:
        flags: of `abl-mlx measure` by name, such as ``method="svd"``, ``layer=12``, ``position=-1``
            or ``max_kl=0.2``.

    Raises:
        UserError: when the model shows no refusal to remove, or no candidate is gentle enough.
        TypeError: for a flag that there is not.
    """
    how = Measuring.of(**flags)
    return find_behind_openings(model.chat, model.writers, prompts, how, Clock())


@contextmanager
def ablation(model: Model, edit: Edit | DirectionFile) -> Iterator[None]:
    """Within the block the model computes as if the edit was in its weights.

    Args:
        edit: an `Edit`, or a direction, which is removed whole.

    Raises:
        UserError: for an edit that keeps norms, which only weights can have.
    """
    removed = edit_of(edit, Editing()) if isinstance(edit, DirectionFile) else edit
    with steering.ablation(model.writers, removed):
        yield


def apply(
    direction: DirectionFile | str | PathLike[str],
    model: str | PathLike[str],
    *outputs: str | PathLike[str],
    **flags: Any,
) -> ApplyRecord:
    """Write the removal of a direction into files, as `abl-mlx apply` does.

    Args:
        direction: what `choose` has found, or a direction file.
        model: of which the edited copies are made; it is never changed.
        outputs: a folder for MLX, a .gguf, or an adapter: the name says which.
        flags: of `abl-mlx apply` by name, such as ``strength=0.8`` or ``quantize="Q8_0"``.

    Raises:
        UserError: when an output exists or cannot hold the edit.
        TypeError: for a flag that there is not, or without an output.
    """
    if not outputs:
        raise TypeError("apply needs at least one output")
    options, places = ApplyOptions.of(**flags), [Path(output) for output in outputs]
    if not isinstance(direction, DirectionFile):
        return measure_apply.apply(Path(direction), str(model), places, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "direction.safetensors"
        direction_file.save(path, direction)
        return measure_apply.apply(path, str(model), places, options)


def evaluate(model: str | PathLike[str], **flags: Any) -> EvalRecord:
    """Ask a model, and count refusals, over-refusals and broken replies, as `abl-mlx eval` does.

    Args:
        model: as for `load`, or the address of a server.
        flags: of `abl-mlx eval` by name, such as ``baseline="demo"`` or ``limit=20``.

    Raises:
        UserError: when the model cannot be asked.
        TypeError: for a flag that there is not.
    """
    return evaluate_model.evaluate_model(str(model), EvalOptions.of(**flags))


def audit(
    model: str | PathLike[str], base: str | PathLike[str] | None = None, *, ask: bool = False
) -> AuditRecord:
    """Whether a direction was taken out of a model's weights, as `abl-mlx audit` says.

    Args:
        model: as for `load`.
        base: the model that it is said to come from.
        ask: whether the model is run and its refusals are counted.

    Raises:
        UserError: when the weights cannot be read.
    """
    return weights.audit(str(model), base=None if base is None else str(base), ask=ask)
