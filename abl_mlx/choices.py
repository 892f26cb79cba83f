"""What a person may choose, one frozen record for each group of flags, one object a command.

A function takes the group that it needs. What a command was told is composed of groups:
`RunOptions`, `MeasureOptions`, `ApplyOptions`, `SteerOptions`, `EvalOptions`. Fields are called as
their flags are, and their defaults are the command line's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

#: What ``--method`` may be; docs/methods.md has the formulas.
METHODS = (
    "difference-of-means",
    "winsorized-means",
    "median-means",
    "projected",
    "biprojected",
    "svd",
    "probe",
    "over-refusal",
)

#: What ``--norm`` may keep of an edited weight: nothing, or the length of each line in the stream
#: (a column of a writer, a row of an embedding), or of each row (an embedding's column) across it.
NORMS = ("none", "columns", "rows")

Self = TypeVar("Self", bound="Choices")  # typing.Self is of Python 3.11


@dataclass(frozen=True)
class Choices:
    """Values of flags: a group of them, or groups composed."""

    @classmethod
    def of(cls: type[Self], **flags: Any) -> Self:
        """From the values of flags by name, each given to the group that has it.

        Raises:
            TypeError: for a name that no group has.
        """
        return cls().but(**flags)

    def but(self: Self, **flags: Any) -> Self:
        """The same with other values of these flags.

        Raises:
            TypeError: for a name that no group has.
        """
        if unknown := sorted(set(flags) - set(self.names())):
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}")
        values: dict[str, Any] = {}
        for field in fields(self):
            group = _group(field)
            if group is not None:
                mine = {name: flags[name] for name in group.names() if name in flags}
                values[field.name] = getattr(self, field.name).but(**mine)
            elif field.name in flags:
                values[field.name] = flags[field.name]
        return replace(self, **values)

    @classmethod
    def names(cls) -> Iterator[str]:
        """The names of all flags, group after group."""
        for field in fields(cls):
            group = _group(field)
            if group is None:
                yield field.name
            else:
                yield from group.names()

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """The types of all flags' values by the flags' names."""
        hints = get_type_hints(cls)
        found: dict[str, Any] = {}
        for field in fields(cls):
            group = _group(field)
            found |= {field.name: hints[field.name]} if group is None else group.kinds()
        return found

    @classmethod
    def of_record(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """From what `record` gives; names that no group has are left out."""
        known = {name: kind for name, kind in cls.kinds().items() if name in values}
        return cls.of(**{name: _from_json(values[name], kind) for name, kind in known.items()})

    def record(self) -> dict[str, Any]:
        """Every flag's value as a JSON value, without the groups."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Choices):
                found |= value.record()
            elif isinstance(value, frozenset):
                found[field.name] = sorted(value)
            else:
                found[field.name] = str(value) if isinstance(value, Path) else value
        return found


def _group(field: Field[Any]) -> type[Choices] | None:
    """The class of a field that holds a group of flags."""
    return type(field.default) if isinstance(field.default, Choices) else None


def _from_json(value: Any, kind: Any) -> Any:
    """A flag's value, of a type that may be a union."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return frozenset(value) if isinstance(value, list) else value


# --- groups of flags -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompting(Choices):
    """Which prompts, and how they are asked.

    Attributes:
        harmful, harmless: prompt files or Hugging Face datasets; None for the bundled sets.
        seed: fixes the split into train, validation and test.
        limit: at most so many prompts of each set and part.
        quick: fewer prompts still, for a first look: `prompt_choice.QUICK`.
        system: the system message before every prompt that has none of its own, or the name of a
            file that holds it.
        thinking: off, on, both, or an amount that the model's template knows, such as low.
    """

    harmful: str | None = None
    harmless: str | None = None
    seed: int = 0
    limit: int | None = None
    quick: bool = False
    system: str | None = None
    thinking: str = "off"


@dataclass(frozen=True)
class Chatting(Choices):
    """How a model is talked to.

    Attributes:
        template: a Jinja file, ``chatml`` or ``plain``, in place of the model's own chat template.
    """

    template: str | None = None


@dataclass(frozen=True)
class Given(Choices):
    """A direction from elsewhere.

    Attributes:
        direction: a file with the direction, instead of measuring one.
        tensor: which tensor of it.
    """

    direction: Path | None = None
    tensor: str | None = None


@dataclass(frozen=True)
class Finding(Choices):
    """Which direction.

    Attributes:
        method: how candidates are found, of `METHODS`; None for the difference of means,
            and subspaces where that is not enough.
        rank: how many directions a subspace has; None for what suits the method.
        across: ``layers`` or ``positions``, whose directions are taken together as a subspace.
        per_layer: each layer's writers lose that layer's own direction.
        layer, position: take this candidate instead of the causal choice; a layer may lie between
            two, and a position be ``instruction-end``.
        borderline: prompt file or dataset that ``over-refusal`` is about; None for the bundled set.
        max_kl: limit of the causal choice, nats at the first reply token.
        anyway: go on where the model's own replies show no refusal to remove.
    """

    method: str | None = None
    rank: int | None = None
    across: str | None = None
    per_layer: bool = False
    layer: float | None = None
    position: int | str | None = None
    borderline: str | None = None
    max_kl: float = 0.1
    anyway: bool = False


@dataclass(frozen=True)
class Searching(Choices):
    """How a gentler edit is searched for.

    Attributes:
        search: at most so many edits are tried; None for no search.
        target_refusals: the share of refused and broken replies that a search aims at.
        search_journal: the file that keeps what was tried; beside the output without it.
    """

    search: int | None = None
    target_refusals: float = 0.05
    search_journal: Path | None = None

    def beside(self, output: Path) -> Searching:
        """The same with a place for the journal: beside the output, if none was given."""
        if self.search is None or self.search_journal is not None:
            return self
        return replace(self, search_journal=output.with_name(f"{output.name}.search.journal"))


@dataclass(frozen=True)
class Editing(Choices):
    """What is done to the weights.

    Attributes:
        strength: α of the edit.
        layers: layers whose writers are edited; None for all.
        embedding: whether the embedding is edited.
        norm: what lengths the edited weights keep: ``none``, ``columns`` or ``rows``.
        pin: what the stream holds of the direction instead of nothing: ``harmless`` or ``harmful``
            for the mean of those prompts, or a number.
    """

    strength: float = 1.0
    layers: frozenset[int] | None = None
    embedding: bool = True
    norm: str = "none"
    pin: str | None = None


@dataclass(frozen=True)
class Writing(Choices):
    """How an edit is written.

    Attributes:
        quantize: type of GGUF outputs.
        max_leak: largest share of the component that may be left in the written weights.
        mtp: edit the blocks of multi-token prediction too, which mlx-lm does not run.
        keep_undo: keep what the edit takes out, for `abl-mlx undo`.
        tensors: of a GGUF source, a regular expression for the tensors to edit, in place of what
            is known of the architecture.
        strict_types: refuse a GGUF tensor whose type has no scalar grid, instead of writing it in
            a finer type.
        grid: of a quantized source, ``own`` keeps each tensor's scales and most codes, ``fresh``
            encodes the edited weights anew, ``auto`` takes a fresh grid where it is clearly better.
        writer_bits: of a quantized MLX folder, what the edited matrices are promoted to: bits, or
            ``bf16`` for plain floats; None keeps each one's own mode.
        plain_rounding: round every weight to its nearest level, which loses most of an edit; to
            show the difference.
        ollama_create: the name under which the first GGUF output is handed to Ollama.
    """

    quantize: str = "F16"
    max_leak: float = 0.01
    mtp: bool = False
    keep_undo: bool = False
    tensors: str | None = None
    strict_types: bool = False
    grid: str = "auto"
    writer_bits: str | None = None
    plain_rounding: bool = False
    ollama_create: str | None = None


@dataclass(frozen=True)
class Replying(Choices):
    """How replies are generated and kept.

    Attributes:
        max_tokens: longest reply in the evaluation.
        batch_size: replies generated side by side.
        save_replies: where the replies go, if they are wanted.
        report: where the page to read goes; of `run`, beside or inside each output without it.
        save_completions: whether the replies are on that page.
    """

    max_tokens: int = 64
    batch_size: int = 32
    save_replies: Path | None = None
    report: Path | None = None
    save_completions: bool = False


@dataclass(frozen=True)
class Targeting(Choices):
    """What `eval` asks.

    Attributes:
        model: the model's name on a server.
        baseline: another model, asked the same prompts to compare with.
        baseline_model: its name, where that is on a server.
        runtime: what runs a model of this machine; None for what suits it.
        resume: the journal of what was answered; None for one in the cache.
    """

    model: str | None = None
    baseline: str | None = None
    baseline_model: str | None = None
    runtime: str | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class Asking(Choices):
    """How a server is asked.

    Attributes:
        concurrency: requests under way at the same time.
        timeout: seconds from connecting to the last byte of a reply.
        retries: further tries of a request that failed in a way that may pass.
        backoff: seconds before the second try; each later one waits twice as long.
    """

    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 0.5


@dataclass(frozen=True)
class Judging(Choices):
    """Who judges replies.

    Attributes:
        judge: the model or server that judges replies in place of the markers.
        judge_model: its name on a server.
        judge_tokens: longest answer of the judge.
    """

    judge: str | None = None
    judge_model: str | None = None
    judge_tokens: int = 16


@dataclass(frozen=True)
class Metrics(Choices):
    """What else `eval` measures.

    Attributes:
        perplexity: measure perplexity on the bundled text.
        capability: ask the small capability check.
        lm_eval: tasks for lm-evaluation-harness, with commas.
    """

    perplexity: bool = False
    capability: bool = False
    lm_eval: str | None = None


@dataclass(frozen=True)
class Limits(Choices):
    """What is asked of a model; None asks nothing.

    Attributes:
        min_refusal: least share of harmful prompts that it refuses.
        max_over_refusal: largest share of the harmless, and of the borderline prompts, that it
            refuses.
        max_broken: largest share of replies that are empty or loop; asked with every other limit,
            since a broken model refuses nothing.
        max_kl: largest mean KL(baseline ‖ model), nats a token.
        max_drop_from: the record of an earlier `eval --json`.
        max_drop: by how much the refusal rate on harmful prompts may have fallen from there.
    """

    min_refusal: float | None = None
    max_over_refusal: float | None = None
    max_broken: float = 0.1
    max_kl: float | None = None
    max_drop_from: Path | None = None
    max_drop: float = 0.05

    @property
    def given(self) -> bool:
        """Whether anything is asked."""
        asked = (self.min_refusal, self.max_over_refusal, self.max_kl, self.max_drop_from)
        return any(limit is not None for limit in asked)


# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measuring(Choices):
    """How a direction is found: what `run`, `measure`, `chat` and `show` have in common.

    Attributes:
        editing: what candidates are tried with.
        batch_size: replies generated side by side.
    """

    prompting: Prompting = Prompting()
    given: Given = Given()
    finding: Finding = Finding()
    searching: Searching = Searching()
    editing: Editing = Editing()
    batch_size: int = 32
    chatting: Chatting = Chatting()

    @property
    def by_hand(self) -> bool:
        """Whether a person chose what is removed, by ``--layer`` or ``--direction``."""
        return self.finding.layer is not None or self.given.direction is not None


@dataclass(frozen=True)
class RunOptions(Choices):
    """The choices of `run`.

    Attributes:
        gguf: a GGUF of the model that is measured, to be edited in its stead.
        memory_check: refuse a model that is larger than the machine's memory.
    """

    prompting: Prompting = Prompting()
    given: Given = Given()
    finding: Finding = Finding()
    searching: Searching = Searching()
    editing: Editing = Editing()
    writing: Writing = Writing()
    replying: Replying = Replying()
    chatting: Chatting = Chatting()
    gguf: str | None = None
    memory_check: bool = True

    @property
    def measuring(self) -> Measuring:
        """How the direction is found."""
        return Measuring(
            self.prompting, self.given, self.finding, self.searching, self.editing,
            self.replying.batch_size, self.chatting,
        )  # fmt: skip


@dataclass(frozen=True)
class MeasureOptions(Choices):
    """The choices of `measure`.

    Attributes:
        memory_check: refuse a model that is larger than the machine's memory.
    """

    prompting: Prompting = Prompting()
    finding: Finding = Finding()
    searching: Searching = Searching()
    chatting: Chatting = Chatting()
    memory_check: bool = True

    @property
    def measuring(self) -> Measuring:
        """How the direction is found."""
        return Measuring(
            self.prompting, finding=self.finding, searching=self.searching, chatting=self.chatting
        )


@dataclass(frozen=True)
class ApplyOptions(Choices):
    """The choices of `apply`.

    Attributes:
        lazy: edit file to file, without ever holding the model.
        memory_check: refuse a model that is larger than the machine's memory.
    """

    editing: Editing = Editing()
    writing: Writing = Writing()
    lazy: bool = False
    memory_check: bool = True


@dataclass(frozen=True)
class SteerOptions(Choices):
    """The choices of `chat` and `show`, which edit at runtime.

    Attributes:
        direction: a direction file; None to measure one.
        memory_check: refuse a model that is larger than the machine's memory.
    """

    direction: Path | None = None
    prompting: Prompting = Prompting()
    finding: Finding = Finding()
    editing: Editing = Editing()
    chatting: Chatting = Chatting()
    memory_check: bool = True

    @property
    def measuring(self) -> Measuring:
        """How the direction is found, where no file has it."""
        return Measuring(
            self.prompting, finding=self.finding, editing=self.editing, chatting=self.chatting
        )


@dataclass(frozen=True)
class EvalOptions(Choices):
    """The choices of `eval`.

    Attributes:
        junit: where a JUnit report goes.
        memory_check: refuse a model that is larger than the machine's memory.
    """

    targeting: Targeting = Targeting()
    asking: Asking = Asking()
    judging: Judging = Judging()
    metrics: Metrics = Metrics()
    limits: Limits = Limits()
    junit: Path | None = None
    prompting: Prompting = Prompting()
    replying: Replying = Replying()
    chatting: Chatting = Chatting()
    memory_check: bool = True
