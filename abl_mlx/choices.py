"""The values of flags: one frozen record for each group of flags, composed to one for each command.

A function takes the group that it needs. The records of commands are composed of groups:
`RunOptions`, `MeasureOptions`, `ApplyOptions`, `SteerOptions`; those of `eval` are in
`abl_mlx.eval_choices`. A field has the name of its flag and the command line's default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from abl_mlx.flag_values import Choices

#: The accepted values of ``--norm``: an edit keeps no norms of a weight; or the norm of each vector
#: in the stream (columns of a writer, rows of an embedding); or the norms of a writer's rows (an
#: embedding's columns).
NORMS = ("none", "columns", "rows")

#: The accepted values of ``--kind``, and the strength of a reflection, which reverses a component.
KINDS, REFLECTION = ("project", "reflect"), 2.0

#: The accepted values of ``--edit``: weights that write to the residual stream, or that read it, or
#: the biases by which routers choose experts.
PLACES = ("writers", "readers", "routers")

#: The accepted values of ``--steer``: what an edit at runtime does.
STEERS = ABLATE, ADD = "ablate", "add"


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
        thought_tokens: longest thought; with thinking on, a reply may be longer by so many tokens.
        keep: prompts whose refusals are to stay: a prompt file or dataset, or
            ``category:NAME[,NAME]`` of the harmful set.
        keep_system: a system message, or the name of a file that holds it: what a model declines
            because of this message it is to decline as before.
    """

    harmful: str | None = None
    harmless: str | None = None
    seed: int = 0
    limit: int | None = None
    quick: bool = False
    system: str | None = None
    thinking: str = "off"
    thought_tokens: int = 512
    keep: str | None = None
    keep_system: str | None = None


@dataclass(frozen=True)
class Chatting(Choices):
    """How prompts are written.

    Attributes:
        template: a Jinja file, ``chatml`` or ``plain``, in place of the model's own chat template.
    """

    template: str | None = None


@dataclass(frozen=True)
class Given(Choices):
    """A direction from a file.

    Attributes:
        direction: the file; None to measure a direction.
        tensor: the name of a tensor in the file.
    """

    direction: Path | None = None
    tensor: str | None = None


@dataclass(frozen=True)
class Finding(Choices):
    """How a direction is measured and chosen.

    Attributes:
        method: one of `directions.methods.METHODS`; None for the difference of means, and for
            subspaces if that leaves refusals.
        rank: the number of directions in a subspace; None for the method's default.
        across: ``layers`` or ``positions``, whose directions are combined in a subspace.
        per_layer: whether each layer's writers lose the direction of that layer.
        layer, position: use this candidate instead of the causal choice. A layer may be a number
            such as 2.4, between two layers; a position may be ``instruction-end``.
        borderline: prompt file or dataset for ``over-refusal``; None for the bundled set.
        protect: prompt file or dataset of concepts that directions are to leave, one for each
            category.
        max_kl: limit of the causal choice, in nats at the first reply token.
        measured_at: with thinking on, where directions are measured: ``end-of-prompt``,
            ``end-of-thought``, or None for both.
        max_thought_growth: with thinking on, the largest ratio of mean thought lengths, after to
            before.
        anyway: whether to continue if the model's own replies show no refusal to remove.
        sae: the folder or file of a sparse autoencoder whose decoder's rows are the directions.
        feature: the numbers of its features, such as ``12,345``, or ``auto`` (as None is) for a
            choice by effect.
    """

    method: str | None = None
    rank: int | None = None
    across: str | None = None
    per_layer: bool = False
    layer: float | None = None
    position: int | str | None = None
    borderline: str | None = None
    protect: str | None = None
    max_kl: float = 0.1
    measured_at: str | None = None
    max_thought_growth: float = 1.2
    anyway: bool = False
    sae: str | None = None
    feature: str | None = None

    @property
    def features(self) -> tuple[int, ...]:
        """The features that were given by number; none if they are chosen by effect.

        Raises:
            ValueError: when ``feature`` is neither numbers nor ``auto``.
        """
        if self.feature in (None, "auto"):
            return ()
        return tuple(dict.fromkeys(int(one) for one in str(self.feature).split(",")))


@dataclass(frozen=True)
class Searching(Choices):
    """How a gentler edit is searched for.

    Attributes:
        search: the largest number of edits to try; None for no such limit.
        minutes: the longest time of trials; None for no such limit. One limit makes a search.
        warm_start: the record or model card whose edit is tried early in the search.
        target_refusals: the largest share of refused and broken replies that is good enough.
        learn_strengths: the number of gradient steps by which the strengths of each layer are
            learned; None for the default's two.
        search_journal: the file that keeps the trials; None for one beside the output.
    """

    search: int | None = None
    minutes: float | None = None
    warm_start: Path | None = None
    target_refusals: float = 0.05
    learn_strengths: int | None = None
    search_journal: Path | None = None

    @property
    def searches(self) -> bool:
        return self.search is not None or self.minutes is not None

    def beside(self, output: Path) -> Searching:
        """The same with the journal beside the output, if no file was given for it."""
        if not self.searches or self.search_journal is not None:
            return self
        return replace(self, search_journal=output.with_name(f"{output.name}.search.journal"))


@dataclass(frozen=True)
class Editing(Choices):
    """How the weights are edited.

    Attributes:
        strength: α of the edit.
        layers: the layers whose writers are edited; None for all.
        embedding: whether the embedding is edited.
        norm: which norms the edited weights keep, one of `NORMS`.
        pin: the component along the direction that the stream keeps: ``harmless`` or ``harmful``
            for the mean of those prompts, or a number; None for 0.
        kind: what is done with the component, one of `KINDS`.
        edit: what is edited, one of `PLACES`.
        heads: the attention heads whose columns are edited: ``LAYER.HEAD,…``, or the number of
            heads that write most along the direction; None for all.
        experts: the same for experts, by how often harmful prompts are sent to them.
    """

    strength: float = 1.0
    layers: frozenset[int] | None = None
    embedding: bool = True
    norm: str = "none"
    pin: str | None = None
    kind: str = "project"
    edit: str = "writers"
    heads: str | None = None
    experts: str | None = None

    @property
    def by_parts(self) -> bool:
        """Whether only some heads or experts are edited."""
        return self.heads is not None or self.experts is not None

    @property
    def alpha(self) -> float:
        """α: the strength, or that of a reflection."""
        return REFLECTION if self.kind == "reflect" else self.strength

    @property
    def reaches_embedding(self) -> bool:
        """Whether the embedding is edited. A reflection leaves it (docs/architecture.md)."""
        return self.embedding and self.kind == "project"


@dataclass(frozen=True)
class Writing(Choices):
    """How an edit is written.

    Attributes:
        quantize: the file type of GGUF outputs; None for F16 from a folder, and for every tensor's
            own type from a GGUF.
        keep_types: with ``quantize``: let quantized tensors keep their type.
        imatrix: the file of an importance matrix, which weights errors in quantizing.
        max_leak: the largest share of the component that may be left in the written weights.
        mtp: whether blocks for multi-token prediction, which mlx-lm does not run, are edited.
        keep_undo: whether to write the removed components, for `abl-mlx undo`.
        tensors: for a GGUF source, a regular expression that names the tensors to edit, instead of
            the architecture's list of writers.
        grid: for a quantized source: ``own`` keeps each tensor's scales and most codes, ``fresh``
            chooses new ones, ``auto`` chooses new ones where these are clearly better.
        writer_bits: for a quantized MLX folder, the bits with which edited matrices are written, or
            ``bf16`` for plain floats; None keeps each matrix's own mode.
        plain_rounding: round every weight to its nearest level, which loses most of an edit; for
            comparison.
        ollama_create: the name under which the first GGUF output is given to Ollama.
        overwrite: whether ``-o ollama:NAME`` replaces the model that has the name.
        split_max_size: the largest size of a GGUF file in bytes: larger ones are written in parts.
        join: write one file even if the source is in parts.
    """

    quantize: str | None = None
    keep_types: bool = False
    imatrix: Path | None = None
    max_leak: float = 0.01
    mtp: bool = False
    keep_undo: bool = False
    tensors: str | None = None
    grid: str = "auto"
    writer_bits: str | None = None
    plain_rounding: bool = False
    ollama_create: str | None = None
    overwrite: bool = False
    split_max_size: int | None = None
    join: bool = False


@dataclass(frozen=True)
class Replying(Choices):
    """How replies are generated and kept.

    Attributes:
        max_tokens: the longest reply in the evaluation, in tokens.
        batch_size: how many replies are generated at the same time.
        save_replies: the file for the replies; None to save none.
        report: the file for the report; None for one in or beside each output of `run`, and none
            for other commands.
        save_completions: whether the report shows the replies.
    """

    max_tokens: int = 64
    batch_size: int = 32
    save_replies: Path | None = None
    report: Path | None = None
    save_completions: bool = False


@dataclass(frozen=True)
class Scoring(Choices):
    """Behaviours other than refusal: which are asked for, and what a search makes of them.

    Attributes:
        scorer: the scorers, ``NAME[:FILE]`` each, separated by commas. A search chooses an edit
            that does not raise their figures.
        max_rise: by how much an edit that a search chooses may raise a figure, in its unit.
        search_for: the scorer whose figure a search lowers, in the place of refusals.
        target_figure: the largest figure of it that is good enough; None for half of the unedited
            model's.
    """

    scorer: str | None = None
    max_rise: float = 0.0
    search_for: str | None = None
    target_figure: float | None = None


@dataclass(frozen=True)
class Conditioning(Choices):
    """On which prompts an edit at runtime is made, and what is done on them.

    Attributes:
        steer: ``ablate`` removes the direction, ``add`` adds the difference of the means after its
            layer, in its own length times the strength.
        unconditional: whether the condition of a direction file is ignored.
    """

    steer: str = ABLATE
    unconditional: bool = False


# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measuring(Choices):
    """How a direction is found: the choices that `run`, `measure`, `chat` and `show` share.

    Attributes:
        editing: the edit with which candidates are tried.
        batch_size: how many replies are generated at the same time.
        max_tokens: the longest reply to a validation prompt, in tokens.
    """

    prompting: Prompting = Prompting()
    given: Given = Given()
    finding: Finding = Finding()
    searching: Searching = Searching()
    editing: Editing = Editing()
    batch_size: int = 32
    chatting: Chatting = Chatting()
    max_tokens: int = 64
    scoring: Scoring = Scoring()

    @property
    def by_hand(self) -> bool:
        """Whether the user chose the direction: ``--layer``, ``--feature`` or ``--direction``."""
        finding = self.finding
        chosen = finding.layer is not None and finding.sae is None
        return chosen or bool(finding.features) or self.given.direction is not None


@dataclass(frozen=True)
class RunOptions(Choices):
    """The choices of `run`.

    Attributes:
        gguf: a GGUF of the same model, which is edited instead of the model that is measured.
        recognition: ask whether prompts are harmful, before and after.
        memory_check: stream or refuse a model that is larger than the machine's memory.
        stream: read the model layer by layer whenever it runs.
    """

    prompting: Prompting = Prompting()
    given: Given = Given()
    finding: Finding = Finding()
    searching: Searching = Searching()
    editing: Editing = Editing()
    writing: Writing = Writing()
    replying: Replying = Replying()
    chatting: Chatting = Chatting()
    scoring: Scoring = Scoring()
    gguf: str | None = None
    recognition: bool = False
    memory_check: bool = True
    stream: bool = False

    @property
    def measuring(self) -> Measuring:
        """How the direction is found."""
        return Measuring(
            self.prompting, self.given, self.finding, self.searching, self.editing,
            self.replying.batch_size, self.chatting, self.replying.max_tokens, self.scoring,
        )  # fmt: skip


@dataclass(frozen=True)
class MeasureOptions(Choices):
    """The choices of `measure`.

    Attributes:
        condition: the prompts on which an edit at runtime is to be made, as for ``keep``; None for
            all prompts.
        explain: whether to tell what the direction is made of.
        refusal_cliff: whether to tell where in its thoughts a model gives up refusals.
        rank_parts: rank attention heads and experts too.
        memory_check: stream or refuse a model that is larger than the machine's memory.
        stream: read the model layer by layer whenever it runs.
    """

    prompting: Prompting = Prompting()
    finding: Finding = Finding()
    searching: Searching = Searching()
    chatting: Chatting = Chatting()
    scoring: Scoring = Scoring()
    condition: str | None = None
    explain: bool = False
    refusal_cliff: bool = False
    rank_parts: bool = False
    memory_check: bool = True
    stream: bool = False

    @property
    def measuring(self) -> Measuring:
        """How the direction is found."""
        return Measuring(
            self.prompting, finding=self.finding, searching=self.searching,
            chatting=self.chatting, scoring=self.scoring,
        )  # fmt: skip


@dataclass(frozen=True)
class ApplyOptions(Choices):
    """The choices of `apply`.

    Attributes:
        lazy: edit file to file, with only one tensor in memory at a time.
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
        condition: as for `measure`; None for the condition of the direction file, if it has one.
        rank_parts: rank attention heads and experts too; without it, what the file says of them.
        memory_check: refuse a model that is larger than the machine's memory.
    """

    direction: Path | None = None
    prompting: Prompting = Prompting()
    finding: Finding = Finding()
    editing: Editing = Editing()
    chatting: Chatting = Chatting()
    conditioning: Conditioning = Conditioning()
    condition: str | None = None
    rank_parts: bool = False
    memory_check: bool = True

    @property
    def measuring(self) -> Measuring:
        """How the direction is found if no file is given."""
        return Measuring(
            self.prompting, finding=self.finding, editing=self.editing, chatting=self.chatting
        )
