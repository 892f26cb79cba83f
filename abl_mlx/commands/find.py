"""From a loaded model and prompts to its refusal direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour.evaluate import Behaviour, Chat, behaviour
from abl_mlx.choices import Options
from abl_mlx.commands import first_look, prompt_choice
from abl_mlx.commands.forecast import forecast
from abl_mlx.directions import choice, direction_file, estimators, measuring, race, selection
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.pinning import embedding_means, held_at
from abl_mlx.directions.race import Runner
from abl_mlx.directions.trial import Effect, Trial
from abl_mlx.directions.variants import Tried, Variant, best
from abl_mlx.edits.edit import Edit
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.generation import timed
from abl_mlx.models.logits import behind_last_layer
from abl_mlx.models.writers import Writer
from abl_mlx.reports.tables import summary_line
from abl_mlx.support.arrays import number, numpy_of
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from convert.base.errors import UserError

#: Held-out prompts of each set in which the component is looked for.
COMPONENT_PROMPTS = 32

# Prompts of each set in whose replies a common opening is looked for.
_OPENING_PROMPTS = 8


def find_direction(
    chat: ChatModel, writers: Sequence[Writer], sets: PromptSets, options: Options
) -> DirectionFile:
    """Measure candidates on the train prompts and choose one on the validation prompts.

    Returns:
        A direction file whose metadata holds `summary` (what was chosen and why), `scores` (of
        every candidate) and `trials` (of what else was tried).

    Raises:
        UserError: no refusal to be found, no gentle enough candidate, a candidate out of range,
            options that do not go together.
    """
    found = _analytic(chat, writers, sets, options)
    if options.search is None:
        return found
    from abl_mlx.search import loop

    return loop.improve(chat, writers, sets, found, options)


def _analytic(
    chat: ChatModel, writers: Sequence[Writer], sets: PromptSets, options: Options
) -> DirectionFile:
    """The choice without a search."""
    _check(chat, sets, options)
    if options.direction is not None:
        return _given(chat, options)
    train, validation = (
        {
            "harmful": [chat.encode(text) for text in getattr(sets.harmful, part).texts],
            "harmless": [chat.encode(text) for text in getattr(sets.harmless, part).texts],
        }
        for part in ("train", "validation")
    )
    for part, kept in (("train", train), ("validation", validation)):
        borderline = prompt_choice.borderline_part(sets, options, part)
        if borderline is not None:
            kept["borderline"] = [chat.encode(text) for text in borderline.texts]
    candidates = measuring.measure(
        chat,
        train["harmful"],
        train["harmless"],
        _positions(chat, options),
        method=options.method or measuring.METHOD,
        rank=_rank(options) if options.method == "svd" else 1,
        borderline=train.get("borderline"),
    )
    if options.across == "positions":
        candidates = candidates.across_positions(_rank(options))
    # What should be refused no more: the borderline prompts, if that is what is asked for.
    refused = validation.get("borderline", validation["harmful"])
    offsets = sorted({*candidates.positions, -1})
    with (
        capture.stored(chat, refused, offsets, label="validation, harmful") as bad,
        capture.stored(chat, validation["harmless"], offsets, label="validation, harmless") as good,
    ):
        found = _Finding(chat, writers, candidates, train, validation, (bad, good), options)
        return found.file()


class _Finding:
    """The choice among candidates, and what is written down of it."""

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        candidates: Candidates,
        train: Mapping[str, list[list[int]]],
        validation: Mapping[str, list[list[int]]],
        states: tuple[np.ndarray, np.ndarray],
        options: Options,
    ):
        """Take what was measured.

        Args:
            states: of the validation prompts that should be refused no more and of harmless ones,
                (L, P, N, d), at the candidates' positions and the last.
        """
        self._chat, self._writers, self._options = chat, writers, options
        self._train, self._validation = train, validation
        self._candidates = candidates
        self._embedding = embedding_means(chat, writers, train["harmful"], train["harmless"])
        count = len(candidates.positions)
        self._states = states[0][:, :count], states[1][:, :count]
        self._last = states[0][-1, -1], states[1][-1, -1]
        self._scores = selection.separation_of(candidates, *self._states)
        self._tried: list[Tried] = []
        self._notes: dict[str, Any] = {}

    def file(self) -> DirectionFile:
        """The chosen direction with everything that is known of it."""
        variant = self._chosen()
        candidates, options = self._candidates, self._options
        bad, good = self._states
        candidates = measuring.describe(candidates, bad, good)
        layer = candidates.n_layers - 1 if variant.layer is None else round(variant.layer)
        position = candidates.positions[-1] if variant.position is None else variant.position
        at = layer, candidates.positions.index(position)
        lead = variant.directions if variant.directions.ndim == 2 else candidates.bases[at]
        clouds = estimators.plane(bad[at], good[at], numpy_of(lead[0]))
        counted = {"forward_tokens": self._trial.tokens} if "_trial" in vars(self) else {}
        metadata = {
            "method": variant.method,
            "candidate_method": candidates.method,
            "summary": {**variant.record(), **self._notes, **counted},
            "scores": [_score_record(score, candidates) for score in self._scores],
            "trials": [tried.record() for tried in self._tried],
            "cloud": {"layer": layer, "position": position},
            "embedding_scale": self._embedding.scale,
        }
        if pins := self._embedding.pins(variant.directions):
            metadata["pins"] = pins
        if options.across == "positions":
            metadata["across"] = "positions"
        return DirectionFile(variant.directions, candidates, metadata, clouds)

    def _chosen(self) -> Variant:
        options, candidates = self._options, self._candidates
        if options.layer is not None:
            self._notes["chosen_by"] = "hand"
            position = candidates.positions[-1] if options.across else self._position
            return self._variant(options.layer, position)
        if options.per_layer or options.across == "layers":
            return self._among([self._together(position) for position in candidates.positions])
        if options.method == "over-refusal":
            return self._over_refusal()
        return self._by_cause()

    @property
    def _position(self) -> int:
        return -1 if self._options.position is None else self._candidates.positions[0]

    def _variant(self, layer: float, position: int) -> Variant:
        several = self._options.across == "positions"
        return Variant(
            self._candidates.for_edit(layer, position),
            self._candidates.method,
            layer,
            None if several else position,
            "positions" if several else None,
            self._candidates.method == "biprojected",
        )

    def _together(self, position: int) -> Variant:
        method = self._candidates.method
        if self._options.per_layer:
            each = self._candidates.each_layer(position)
            return Variant(each, method, None, position, per_layer=True)
        span = self._candidates.across_layers(position, _rank(self._options))
        return Variant(span, method, None, position, "layers")

    def _edit(self, variant: Variant) -> Edit:
        """The whole removal, whatever strength is written: what is left tells directions apart."""
        embedding = self._embedding
        pins = None if self._options.pin is None else embedding.pins(variant.directions)
        pin = held_at(self._options.pin, pins, embedding.scale, variant.rank)
        return make_edit(variant.directions, replace(self._options, strength=1.0), pin=pin)

    @cached_property
    def _trial(self) -> Trial:
        validation = self._validation
        refused = validation.get("borderline", validation["harmful"])
        kept = validation["harmful"] if "borderline" in validation else []
        before = [
            behind_last_layer(self._chat, sequences, states)
            for sequences, states in zip((refused, validation["harmless"]), self._last, strict=True)
        ]
        trial = Trial(
            self._chat, self._writers, refused, validation["harmless"], kept,
            before=(before[0], before[1]),
        )  # fmt: skip
        # The states were read off one pass of both sets.
        trial.tokens += sum(map(len, [*refused, *validation["harmless"]]))
        return trial

    def _try(self, variants: Sequence[Variant], label: str) -> list[Tried]:
        trial, limit = self._trial, self._options.max_kl

        def lost(effect: Effect) -> float:
            """The share of the prompts to be kept that are refused no more."""
            return 0.0 if effect.kept_share is None else trial.kept_before - effect.kept_share

        def rank(effect: Effect) -> tuple[bool, bool, bool, float]:
            whole = trial.is_whole(effect)
            few = 1 if whole else 4
            return lost(effect) > few * selection.LEFT, *choice.gentle(
                effect, limit, trial.left, whole
            )

        def dropped(effect: Effect, so_far: bool = False) -> str:
            if not effect.kl <= limit:
                return f"KL {effect.kl:.3f} over the limit of {limit:g}"
            if lost(effect) > selection.LEFT:
                return f"{lost(effect):.0%} of the harmful prompts are refused no more"
            return "" if so_far or trial.is_whole(effect) else choice.OUTRUN

        def tried(runner: Runner[Variant]) -> Tried:
            effect = runner.effect
            return Tried(
                runner.of, effect.refusal, effect.refused, effect.kl, effect.kept_share,
                dropped(effect), trial.left,
            )  # fmt: skip

        runners = [Runner(variant, self._edit(variant)) for variant in variants]
        race.run(
            trial,
            runners,
            rank,
            lambda effect: not dropped(effect),
            lambda effect: not dropped(effect, so_far=True) and effect.refused <= trial.left,
            lambda runner: tried(runner).works,
            label,
        )
        done = [tried(one) for one in runners]
        self._tried += done
        return done

    def _take(self, tried: Tried | None) -> Variant:
        """Write down why an edit was taken."""
        trial = self._trial
        if tried is None:
            lowest = min(one.kl for one in self._tried)
            raise UserError(
                "every candidate would move harmless prompts by more than --max-kl "
                f"{self._options.max_kl:g} (the gentlest by {lowest:.3f}) or undo refusals that "
                "should stay: raise --max-kl, or choose with --layer and --position."
            )
        why = (
            "lowest KL of those that leave no refusals"
            if tried.works
            else "least refusals left within the KL limit"
        )
        self._notes.update(
            chosen_by=f"{why}, by the first reply tokens to validation prompts",
            refusal_score={
                "harmful": trial.refusal_before[0],
                "harmless": trial.refusal_before[1],
                "harmful_ablated": tried.refusal,
            },
            refused=tried.refused,
            validation_kl=tried.kl,
            refusal_tokens=self._words(trial.refusal_tokens),
        )
        if tried.kept is not None:
            self._notes["kept_refused"] = tried.kept
        return tried.variant

    def _words(self, tokens: Sequence[int]) -> list[str]:
        return [self._chat.tokenizer.decode([token]) for token in tokens]

    def _among(self, variants: Sequence[Variant]) -> Variant:
        return self._take(best(self._try(variants, "causal choice")))

    def _over_refusal(self) -> Variant:
        chosen = selection.shortlist(self._scores, _MOST_TRIALS)
        return self._among([self._variant(score.layer, score.position) for score in chosen])

    def _by_cause(self) -> Variant:
        def edit_for(score: selection.Score) -> Edit:
            return self._edit(self._variant(score.layer, score.position))

        trial = self._trial
        chosen = choice.choose(
            trial, self._candidates, self._scores, edit_for=edit_for,
            max_kl=self._options.max_kl, deepest=self._options.method is not None,
        )  # fmt: skip
        score, self._scores = chosen.score, chosen.scores
        variant = self._variant(score.layer, score.position)
        self._notes = {
            "chosen_by": "lowest refusal score under ablation within the KL limit, on validation "
            "prompts",
            "refusal_score": {
                "harmful": trial.refusal_before[0],
                "harmless": trial.refusal_before[1],
                "harmful_ablated": score.refusal,
            },
            "validation_kl": score.kl,
            "refused": score.refused,
            "refusal_tokens": self._words(trial.refusal_tokens),
        }
        if self._options.method is not None:
            return variant
        assert score.refusal is not None
        assert score.refused is not None
        assert score.kl is not None
        first = Tried(variant, score.refusal, score.refused, score.kl, most_left=trial.left)
        return variant if first.works else self._several(first)

    def _several(self, first: Tried) -> Variant:
        """A subspace where one direction leaves refusals, if that leaves fewer.

        First what is made of the means alone, subspaces across all layers and each layer its own,
        and the singular vectors of the states that separate best. Only if none of these is enough,
        those of the last fifth of the layers too, which are close to words.
        """
        single = first.variant
        say(
            f"  one direction leaves {first.refused:.0%} of the harmful prompts opening in the way "
            "that sets them apart: subspaces are tried"
        )
        assert single.layer is not None
        assert single.position is not None
        position, means = single.position, self._candidates
        here = [score for score in self._scores if score.position == position]
        here.sort(key=lambda score: -score.d_prime)
        deep = [
            score.layer for score in here if (score.layer + 1) / means.n_layers > selection.DEEPEST
        ]
        early = [score.layer for score in here if score.layer not in deep]
        apart = selection.apart([score for score in here if score.layer in early])
        variants = []
        for among in [None, apart] if 0 < len(apart) < means.n_layers else [None]:
            for rank in (2, 3, 4):
                try:
                    span = means.across_layers(position, rank, among)
                except UserError:  # these layers have no more directions than before
                    break
                variants.append(Variant(span, means.method, None, position, "layers", among=among))
        if self._options.pin is None:
            variants.append(
                Variant(means.each_layer(position), means.method, None, position, per_layer=True)
            )
        else:
            variants = []
        spans = measuring.measure(
            self._chat,
            self._train["harmful"],
            self._train["harmless"],
            [position],
            method="svd",
            rank=min(3, len(self._train["harmful"])),
        )

        def of(layers: Sequence[int]) -> list[Variant]:
            return [
                Variant(spans.at(layer, position)[:k], "svd", layer, position)
                for layer in layers[:_MOST_LAYERS]
                for k in range(2, spans.rank + 1)
            ]

        last = [self._variant(layer, position) for layer in deep[:_MOST_DEEP]]
        done = [first, *self._try([*variants, *of(early), *last], "subspaces")]
        if not any(one.works for one in done):
            done += self._try(of(deep), "subspaces, last layers")
        taken = best(done)
        if taken is None or taken is first:
            say("  no subspace leaves fewer within the limit; the single direction is kept")
            return single
        alone = [one for one in done if one.variant.rank == 1 and not one.variant.per_layer]
        self._notes["single"] = min(alone, key=lambda one: one.refused).record()
        say(f"  taken instead: {summary_line(taken.variant.record())}")
        return self._take(taken)


# Edits that are tried at most, of those that a list is made of; layers whose singular vectors are;
# layers so deep that they come last.
_MOST_TRIALS, _MOST_LAYERS, _MOST_DEEP = 16, 3, 2


def _score_record(score: selection.Score, candidates: Candidates) -> dict[str, Any]:
    at = score.layer, candidates.positions.index(score.position)
    facts = {
        name: number(values[at]) for name, values in candidates.facts.items() if name != "threshold"
    }
    return {**score.record(), **facts}


def check_method(options: Options) -> None:
    """Refuse options of the measurement that do not go together.

    Raises:
        UserError: naming the two.
    """

    def refuse(first: str, second: str) -> None:
        raise UserError(f"{first} and {second} do not go together: leave one of them out.")

    by_rank = options.method == "svd" or options.across is not None
    if options.rank is not None and not by_rank:
        raise UserError(
            f"--rank {options.rank}: one direction is all that this method finds; add --method "
            "svd, --across layers or --across positions."
        )
    if options.per_layer and options.across is not None:
        refuse("--per-layer", f"--across {options.across}")
    if options.method == "svd" and options.across is not None:
        refuse("--method svd", f"--across {options.across}")
    if options.per_layer and options.layer is not None:
        refuse("--per-layer", "--layer")
    if options.across == "layers" and options.layer is not None:
        refuse("--across layers", "--layer")
    if options.across == "positions" and options.position is not None:
        refuse("--across positions", "--position")
    if options.method == "biprojected":
        if options.per_layer or options.across is not None:
            refuse("--method biprojected", "--per-layer or --across")
        if options.layer is not None and options.layer != int(options.layer):
            refuse("--method biprojected", "a --layer between two")
    if options.pin is not None and (
        options.per_layer or options.across == "layers" or options.method == "biprojected"
    ):
        raise UserError(
            "--pin holds what one layer's directions have: leave --per-layer, --across layers and "
            "--method biprojected out."
        )
    if options.tensor is not None:
        raise UserError("--tensor names a tensor of --direction FILE: give that too.")
    if options.borderline is not None and options.method != "over-refusal":
        raise UserError("--borderline is used by --method over-refusal: add that.")


def _check(chat: ChatModel, sets: PromptSets, options: Options) -> None:
    """Refuse, before the model runs, options that do not go together or with the prompts."""
    if options.search is not None:
        from abl_mlx.search import loop

        loop.check(options)
    if options.direction is not None:
        _given(chat, options)
        return
    check_method(options)
    prompt_choice.borderline_part(sets, options, "validation")


def _rank(options: Options) -> int:
    if options.rank is not None:
        return options.rank
    return 2 if options.method == "svd" else 3


def _given(chat: ChatModel, options: Options) -> DirectionFile:
    """The direction of ``--direction FILE``."""
    path = options.direction
    assert path is not None
    for flag, value in (
        ("--method", options.method), ("--rank", options.rank), ("--across", options.across),
        ("--per-layer", options.per_layer or None), ("--position", options.position),
    ):  # fmt: skip
        if value is not None:
            raise UserError(
                f"{flag} chooses how a direction is measured, and --direction gives one."
            )
    file = direction_file.read(path, layer=options.layer, tensor=options.tensor)
    direction_file.check_width(file, path, chat)
    summary = file.metadata.get("summary", {"method": "given"})
    return replace(file, metadata={**file.metadata, "summary": {**summary, "file": path.name}})


def find_reply_prefix(
    chat: ChatModel, sets: PromptSets, batch_size: int = 32
) -> tuple[tuple[int, ...], float]:
    """What every reply opens with, whatever was asked: an opened thought block, a newline.

    Positions and first reply tokens are measured behind it, or they would measure the block.

    Returns:
        Token ids, and how many tokens of prompts and replies ran in a second.
    """
    texts = [
        *sets.harmful.train.texts[:_OPENING_PROMPTS],
        *sets.harmless.train.texts[:_OPENING_PROMPTS],
    ]
    replies, rate = timed(
        chat,
        [chat.encode_message(text) for text in texts],
        first_look.OPENING_TOKENS,
        batch_size=batch_size,
        label="reply openings",
    )
    return first_look.reply_prefix(replies), rate


def find_behind_openings(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    options: Options,
    clock: Clock,
    times: int = 0,
) -> DirectionFile:
    """Find how replies open and the direction behind that; sets ``chat.reply_prefix``.

    Args:
        times: how often the held-out prompts are asked afterwards, for what is told of the time.

    Raises:
        UserError: as `find_direction`, and for a model whose replies show no refusal to remove.
    """
    _check(chat, sets, options)
    with clock.step("ask the model as it is"):
        seen = first_look.look(chat, sets, options)
        first_look.check(seen, options)
        chat.reply_prefix = seen.prefix
    say(str(forecast(chat, sets, options, times, seen.rate)))
    with clock.step("measure and choose a direction"):
        found = find_direction(chat, writers, sets, options)
    return replace(found, metadata={**found.metadata, "first_look": seen.record()})


def component_sample(chat: ChatModel, sets: PromptSets) -> list[list[int]]:
    """Encoded held-out prompts in which the component is looked for."""
    return [
        chat.encode(prompt)
        for part in (sets.harmful.test, sets.harmless.test)
        for prompt in part.take(COMPONENT_PROMPTS).texts
    ]


def ask(answer: Chat, sets: PromptSets, options: Options) -> Behaviour:
    """What a runtime does on the held-out prompts.

    The bundled borderline prompts are asked beside the other bundled ones.
    """
    return behaviour(
        answer,
        sets.harmful.test,
        sets.harmless.test,
        max_tokens=options.max_tokens,
        borderline=prompt_choice.borderline_asked(sets, options),
    )


def _positions(chat: ChatModel, options: Options) -> list[int]:
    """The token offsets to measure at: the one that was asked for, or the template's tail."""
    wanted = options.position
    if wanted == "instruction-end":
        # Behind the instruction all prompts have the template's tail.
        return [-chat.template_tail - 1]
    if isinstance(wanted, str):
        raise UserError(f"--position {wanted}: it is instruction-end, or a number such as -1.")
    if wanted is not None:
        if wanted >= 0:
            raise UserError(
                f"--position {wanted}: positions count back from the prompt's end, so -1 is the "
                "last token."
            )
        return [wanted]
    if options.layer is not None and options.across is None:
        return [-1]
    return list(range(-min(chat.template_tail, measuring.MOST_POSITIONS), 0))


def make_edit(
    selected: mx.array,
    options: Options,
    *,
    recipe: Mapping[str, Any] | None = None,
    pin: mx.array | None = None,
) -> Edit:
    """The edit that removes ``selected``, (k, d) or (L, k, d), with the chosen options.

    Args:
        recipe: what a search has found beside the directions: ``profile``, ``embedding``.
        pin: what the embedding holds of the directions instead, in its own units.

    Raises:
        UserError: options that do not go together.
    """
    recipe = recipe or {}
    if pin is not None and options.norm != "none":
        raise UserError("--pin and --norm do not go together: leave one of them out.")
    embedding = options.embedding and bool(recipe.get("embedding", True))
    if pin is not None and selected.ndim == 3:
        raise UserError(
            "--pin holds the same directions in all layers, and these differ by layer: leave it "
            "out."
        )
    if pin is not None and not embedding:
        raise UserError("--pin is written into the embedding: leave --no-embedding out.")
    return Edit(
        selected, options.strength, options.layers, embedding, recipe.get("profile"), options.norm,
        pin,
    )  # fmt: skip


def warn_of_strength(strength: float) -> None:
    """Tell that an edit overshoots: of the component it leaves 1 less its strength."""
    if strength > 2:
        say(
            f"warning: --strength {strength:g} overshoots: beyond 2 the component returns reversed "
            f"and longer than it was ({strength - 1:.3g} times); 1 removes it"
        )


def edit_of(direction: DirectionFile, options: Options) -> Edit:
    """The edit that a direction file describes, with the chosen options.

    Raises:
        UserError: options that do not go together, or a file that lacks what ``--pin`` needs.
    """
    metadata = direction.metadata
    pin = held_at(
        options.pin,
        metadata.get("pins"),
        metadata.get("embedding_scale"),
        int(direction.selected.shape[-2]),
    )
    return make_edit(direction.selected, options, recipe=metadata.get("recipe"), pin=pin)
