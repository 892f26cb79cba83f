"""The functions for notebooks and programs, which ``abl_mlx`` itself exports.

With them one can load a model and prompts, measure and choose a direction, remove it at runtime or
write an edited model, and evaluate the result:

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

Bad input, such as a damaged file, raises `UserError`, whose message is one sentence that says what
to do. Mistakes in a program, such as a flag that does not exist, raise TypeError or ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from abl_mlx.behaviour import evaluate as replies
from abl_mlx.choices import ApplyOptions, Editing, Finding, Measuring, Prompting
from abl_mlx.commands import audit as weights
from abl_mlx.commands import evaluate_model, measure_apply, prompt_choice
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.commands.find import find_behind_openings
from abl_mlx.directions import measuring
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.methods import METHODS
from abl_mlx.edits import steering
from abl_mlx.edits.edit import Edit
from abl_mlx.eval_choices import EvalOptions
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


def load(model: str | PathLike[str], *, template: str | None = None) -> Model:
    """Load a model.

    Args:
        model: as on the command line: ``demo``, a folder of MLX or Hugging Face, a .gguf, a
            repository of Hugging Face, ``repository:Q4_K_M`` or ``ollama:NAME``.
        template: a Jinja file, ``chatml`` or ``plain``, in place of the model's own chat template.

    Raises:
        UserError: when there is no such model, or it is damaged or cannot be run.
    """
    with find_model(str(model), template) as file:
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
    keep: str | None = None,
    keep_system: str | None = None,
) -> PromptSets:
    """Harmful and harmless prompts, each split into parts to train, to validate and to test on.

    Args:
        harmful, harmless: files or datasets of Hugging Face; without them the bundled sets, or for
            the demo model its own.
        model: the model that will be asked; prompts that do not fit its context are left out.
        borderline: a file or dataset of harmless prompts that sound harmful; without it the bundled
            ones, if the other sets are bundled as well.
        seed: fixes the split.
        limit: the largest number of prompts in each part.
        keep: prompts whose refusals are to stay: a file, a dataset or ``category:NAME[,NAME]``.
        keep_system: a system message; what the model declines because of it is to stay declined.

    Raises:
        UserError: when a set cannot be read, is too small, or shares prompts with the other.
    """
    chosen = Prompting(harmful, harmless, seed, limit, keep=keep, keep_system=keep_system)
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
        model: the model.
        prompts: the prompts.
        positions: token positions, counted back from the end of the prompt in its template.
        method: one of `abl_mlx.directions.methods.METHODS`; docs/methods.md has the formulas.
        rank: the number of directions that methods of subspaces find, such as ``svd``.

    Raises:
        UserError: when ``over-refusal`` has too few borderline prompts, or states are not finite.
        ValueError: when there is no such method.
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

    This does the same as `abl-mlx measure`: the model is asked first, and the candidates are tried
    on the validation prompts (Arditi et al. 2024, arXiv 2406.11717).

    Args:
        model: the model.
        prompts: the prompts.
        flags: flags of `abl-mlx measure` by name, such as ``method="svd"``, ``layer=12``,
            ``position=-1`` or ``max_kl=0.2``.

    Raises:
        UserError: when the model shows no refusal to remove, or all candidates exceed the KL limit.
        TypeError: when there is no such flag.
    """
    how = Measuring.of(**flags)
    return find_behind_openings(model.chat, model.writers, prompts, how, Clock())


@contextmanager
def ablation(model: Model, edit: Edit | DirectionFile) -> Iterator[None]:
    """Context manager in which the model computes as if its weights were edited.

    Args:
        model: the model.
        edit: an `Edit`, or a direction file whose directions are fully removed.

    Raises:
        UserError: when the edit keeps norms, which is possible in weights only.
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
    """Write edited copies of a model without a direction, as `abl-mlx apply` does.

    Args:
        direction: the result of `choose`, or the path of a direction file.
        model: the source model; it is never changed.
        outputs: paths whose names say the formats: an MLX folder, a .gguf, an adapter.
        flags: flags of `abl-mlx apply` by name, such as ``strength=0.8`` or ``quantize="Q8_0"``.

    Raises:
        UserError: when an output exists or cannot hold the edit.
        TypeError: when there is no such flag, or no output is given.
    """
    if not outputs:
        raise TypeError("apply needs at least one output")
    options, places = ApplyOptions.of(**flags), [Path(output) for output in outputs]
    taken = direction if isinstance(direction, DirectionFile) else Path(direction)
    return measure_apply.apply(taken, str(model), places, options)


def evaluate(model: str | PathLike[str], **flags: Any) -> EvalRecord:
    """Ask a model, and count refusals, over-refusals and broken replies, as `abl-mlx eval` does.

    Args:
        model: as for `load`, or the address of a server.
        flags: flags of `abl-mlx eval` by name, such as ``baseline="demo"`` or ``limit=20``.

    Raises:
        UserError: when the model cannot be asked.
        TypeError: when there is no such flag.
    """
    return evaluate_model.evaluate_model(str(model), EvalOptions.of(**flags))


def audit(
    model: str | PathLike[str], base: str | PathLike[str] | None = None, *, ask: bool = False
) -> AuditRecord:
    """Decide whether a direction was removed from a model's weights, as `abl-mlx audit` does.

    Args:
        model: as for `load`.
        base: the base model from which it is said to come.
        ask: whether to run the model and count its refusals as well.

    Raises:
        UserError: when the weights cannot be read.
    """
    return weights.audit(str(model), base=None if base is None else str(base), ask=ask)
