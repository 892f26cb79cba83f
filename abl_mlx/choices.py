"""What a person may choose about a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Asking:
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
class Limits:
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


@dataclass(frozen=True)
class Options:
    """The choices of `run`, `measure`, `apply` and `eval`; defaults are the command line's.

    Attributes:
        harmful, harmless: prompt files or Hugging Face datasets; None for the bundled sets.
        seed: fixes the split into train, validation and test.
        limit: at most so many prompts of each set and part.
        quick: fewer prompts still, for a first look: `prompt_choice.QUICK`.
        layer, position: take this candidate instead of the causal choice; a layer may lie between
            two, and a position be ``instruction-end``.
        method: how candidates are found, of `METHODS`; None for the difference of means,
            and subspaces where that is not enough.
        rank: how many directions a subspace has; None for what suits the method.
        across: ``layers`` or ``positions``, whose directions are taken together as a subspace.
        per_layer: each layer's writers lose that layer's own direction.
        direction: a file with the direction, instead of measuring one.
        tensor: which tensor of it.
        borderline: prompt file or dataset that ``over-refusal`` is about; None for the bundled set.
        max_kl: limit of the causal choice, nats at the first reply token.
        anyway: go on where the model's own replies show no refusal to remove.
        search: at most so many edits are tried for a gentler one; None for no search.
        search_journal: the file that keeps what was tried; beside the output without it.
        target_refusals: the share of refused and broken replies that a search aims at.
        strength: α of the edit.
        layers: layers whose writers are edited; None for all.
        embedding: whether the embedding is edited.
        norm: what lengths the edited weights keep: ``none``, ``columns`` or ``rows``.
        pin: what the stream holds of the direction instead of nothing: ``harmless`` or ``harmful``
            for the mean of those prompts, or a number.
        quantize: type of GGUF outputs.
        max_leak: largest share of the component that may be left in the written weights.
        max_tokens: longest reply in the evaluation.
        batch_size: replies generated side by side.
        save_replies: where the replies go, if they are wanted.
        report: where the page to read goes; of `run`, beside or inside each output without it.
        save_completions: whether the replies are on that page.
        tensors: of a GGUF source, a regular expression for the tensors to edit, in place of what
            is known of the architecture.
        strict_types: refuse a GGUF tensor whose type has no scalar grid, instead of writing it in
            a finer type.
        grid: of a quantized source, ``own`` keeps each tensor's scales and most codes, ``fresh``
            encodes the edited weights anew, ``auto`` takes a fresh grid where it is clearly better.
        plain_rounding: round every weight to its nearest level, which loses most of an edit; to
            show the difference.
        writer_bits: of a quantized MLX folder, what the edited matrices are promoted to: bits, or
            ``bf16`` for plain floats; None keeps each one's own mode.
        mtp: edit the blocks of multi-token prediction too, which mlx-lm does not run.
        keep_undo: keep what the edit takes out, for `abl-mlx undo`.
        lazy: edit file to file, without ever holding the model.
        memory_check: refuse a model that is larger than the machine's memory.
        gguf: a GGUF of the model that is measured, to be edited in its stead.
        ollama_create: the name under which the first GGUF output is handed to Ollama.
    """

    harmful: str | None = None
    harmless: str | None = None
    seed: int = 0
    limit: int | None = None
    quick: bool = False
    layer: float | None = None
    position: int | str | None = None
    method: str | None = None
    rank: int | None = None
    across: str | None = None
    per_layer: bool = False
    direction: Path | None = None
    tensor: str | None = None
    borderline: str | None = None
    max_kl: float = 0.1
    anyway: bool = False
    search: int | None = None
    search_journal: Path | None = None
    target_refusals: float = 0.05
    strength: float = 1.0
    layers: frozenset[int] | None = None
    embedding: bool = True
    norm: str = "none"
    pin: str | None = None
    quantize: str = "F16"
    max_leak: float = 0.01
    max_tokens: int = 64
    batch_size: int = 32
    save_replies: Path | None = None
    report: Path | None = None
    save_completions: bool = False
    tensors: str | None = None
    strict_types: bool = False
    grid: str = "auto"
    plain_rounding: bool = False
    writer_bits: str | None = None
    mtp: bool = False
    keep_undo: bool = False
    lazy: bool = False
    memory_check: bool = True
    gguf: str | None = None
    ollama_create: str | None = None

    def with_journal(self, output: Path) -> Options:
        """The same with a place for the journal of a search: beside the output, if not given."""
        if self.search is None or self.search_journal is not None:
            return self
        return replace(self, search_journal=output.with_name(f"{output.name}.search.journal"))

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        values = dict(vars(self))
        values["layers"] = None if self.layers is None else sorted(self.layers)
        values["direction"] = None if self.direction is None else str(self.direction)
        values["search_journal"] = None if self.search_journal is None else str(self.search_journal)
        values["save_replies"] = None if self.save_replies is None else str(self.save_replies)
        values["report"] = None if self.report is None else str(self.report)
        return values


@dataclass(frozen=True)
class EvalOptions(Options):
    """The choices of `eval` that no other command has.

    Attributes:
        server_model: the model's name on a server.
        runtime: what runs a model of this machine; None for what suits it.
        baseline: another model, asked the same prompts to compare with.
        baseline_model: its name, where that is on a server.
        concurrency, timeout, retries: how a server is asked, as in `endpoint.Asking`.
        resume: the journal of what was answered; None for one in the cache.
        min_refusal, max_over_refusal, max_broken, kl_limit, max_drop_from, max_drop: limits, as in
            `gate.Limits`.
        junit: where a JUnit report goes.
        judge: the model or server that judges replies in place of the markers.
        judge_model: its name on a server.
        judge_tokens: longest answer of the judge.
        perplexity: measure perplexity on the bundled text.
        capability: ask the small capability check.
        lm_eval: tasks for lm-evaluation-harness, with commas.
    """

    server_model: str | None = None
    runtime: str | None = None
    baseline: str | None = None
    baseline_model: str | None = None
    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 4
    resume: Path | None = None
    min_refusal: float | None = None
    max_over_refusal: float | None = None
    max_broken: float = 0.1
    kl_limit: float | None = None
    max_drop_from: Path | None = None
    max_drop: float = 0.05
    junit: Path | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_tokens: int = 16
    perplexity: bool = False
    capability: bool = False
    lm_eval: str | None = None

    @property
    def asking(self) -> Asking:
        """How a server is asked."""
        return Asking(self.concurrency, self.timeout, self.retries)

    @property
    def limits(self) -> Limits:
        """What is asked of the model."""
        return Limits(
            self.min_refusal,
            self.max_over_refusal,
            self.max_broken,
            self.kl_limit,
            self.max_drop_from,
            self.max_drop,
        )
