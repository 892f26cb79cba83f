"""`--search N`: the gentlest edit that meets a target, by trying edits on the first reply token.

Two objectives, both to be small: the refusal score of harmful validation prompts and the KL on
harmless ones. Edits are tried at runtime (`steering.ablation`), so that no weight is written. Only
what ends on the front of both is asked for replies, which are judged as in the evaluation, so that
an edit which merely changes how a refusal opens is found out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx import directions, evaluate, interrupts, selection
from abl_mlx.arrays import number, numbers, parameters
from abl_mlx.directions import DirectionFile
from abl_mlx.edits import Edit
from abl_mlx.front import front, hypervolume, still
from abl_mlx.logits import first_reply_token
from abl_mlx.models import ChatModel, progress
from abl_mlx.options import Options
from abl_mlx.prompts import PromptSets, Split
from abl_mlx.records import prompt_hashes
from abl_mlx.refusals import Verdict, classify, wilson
from abl_mlx.report import percent, say
from abl_mlx.search_space import DEFAULT, Directions, Parameters, Space
from abl_mlx.steering import ablation
from abl_mlx.writers import Writer
from convert.errors import UserError

#: Prompts of each set with which a trial begins; where these show it hopeless, it ends there.
FIRST_PROMPTS = 8

#: Harmless prompts for the KL, and harmful ones that an edit of the front is asked; where the
#: validation part has fewer the train part fills up. A search fits what it is scored on: of thirty
#: prompts, two or three would decide.
ENOUGH_PROMPTS = 64

#: Points of the front that are asked for replies at most, and the tokens of each reply.
MOST_ASKED, REPLY_TOKENS = 12, 24

#: Steps in which the weakest even strength is looked for.
HALVINGS = 4

#: Neighbours of a trial of which the one that looks best is tried.
NEIGHBOURS = 64

#: KL in nats below which an edit counts as doing nothing, and above which as breaking the model.
LEAST_KL, LARGEST_KL = 1e-6, 1.0

#: A search goes on while its front has moved in so many trials, or a third of all.
PATIENCE = 40

# The normal quantile of 80%.
_FOUR_IN_FIVE = 0.8416

_STUDY = "abl-mlx search"


# --- what an edit does ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Screened:
    """What the first reply tokens say of an edit.

    Attributes:
        refusal: mean surprisal, in nats, that a harmful prompt's reply does not open with a
            refusal, −log(1 − p): 0 where no refusal is left, the log-odds where all are.
        refused: share of harmful prompts where a refusal opening is the likeliest token, or they
            are likelier together than all others.
        kl: mean KL(model ‖ edited) on harmless prompts, nats.
        early: (refusal, kl) on the first few prompts alone.
        whole: whether all prompts were run; a hopeless trial ends after the first few.
        tokens: run through the model.
    """

    refusal: float
    refused: float
    kl: float
    early: tuple[float, float]
    whole: bool
    tokens: int


class Screen:
    """Scores edits of a loaded model by the first reply token, without generating any."""

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
    ):
        self._chat, self._writers = chat, writers
        self._harmful, self._harmless = harmful, harmless
        before = first_reply_token(chat, harmful)
        self._base = first_reply_token(chat, harmless)
        mx.eval(before, self._base)
        self.tokens = selection.refusal_tokens(before, self._base)
        if not self.tokens:
            raise UserError(
                "this model opens its replies to harmful and harmless prompts in the same way, so "
                "there is nothing for --search to score: check with `abl-mlx eval`."
            )
        self.before = number(_surprisal(before, self.tokens).mean())

    @property
    def cost(self) -> int:
        """Tokens of all prompts: what one trial costs at most."""
        return sum(map(len, self._harmful)) + sum(map(len, self._harmless))

    def score(
        self, edit: Edit, hopeless: Callable[[tuple[float, float]], bool] = lambda _: False
    ) -> Screened:
        """Run the prompts under an edit; only the first few if ``hopeless(refusal, kl)`` there."""
        first, rest = slice(0, FIRST_PROMPTS), slice(FIRST_PROMPTS, None)
        with ablation(self._writers, edit):
            refused, refusal, kl, tokens = self._run(first)
            early = float(np.mean(refusal)), float(np.mean(kl))
            whole = not hopeless(early)
            if whole and max(len(self._harmful), len(self._harmless)) > FIRST_PROMPTS:
                more = self._run(rest)
                refused, refusal, kl = refused + more[0], refusal + more[1], kl + more[2]
                tokens = self.cost
        return Screened(
            float(np.mean(refusal)),
            float(np.mean(refused)),
            float(np.mean(kl)),
            early,
            whole,
            tokens,
        )

    def _run(self, part: slice) -> tuple[list[float], list[float], list[float], int]:
        """(refused or not, surprisal) of harmful prompts, KL of harmless ones, and tokens run."""
        refused, refusal, kl, tokens = [], [], [], 0
        if harmful := self._harmful[part]:
            opened = first_reply_token(self._chat, harmful)
            likeliest = numbers(opened.argmax(axis=-1))
            scores = numbers(selection.refusal_scores(opened, self.tokens))
            refused = [
                float(score > 0 or token in self.tokens)
                for score, token in zip(scores, likeliest, strict=True)
            ]
            refusal = numbers(_surprisal(opened, self.tokens))
            tokens += sum(map(len, harmful))
        if harmless := self._harmless[part]:
            opened = first_reply_token(self._chat, harmless)
            kl = numbers(mx.maximum(selection.kl_divergence(self._base[part], opened), 0))
            tokens += sum(map(len, harmless))
        return refused, refusal, kl, tokens

    def ask(
        self, edit: Edit, prompts: Sequence[Sequence[int]], max_tokens: int = REPLY_TOKENS
    ) -> tuple[float, float, int]:
        """Greedy replies to harmful prompts: shares refused and broken, tokens generated."""
        with ablation(self._writers, edit):
            replies = evaluate.generate(self._chat, prompts, max_tokens, batch_size=64)
        verdicts = [classify(text) for text in evaluate.decode(self._chat, replies)]
        shares = [
            verdicts.count(kind) / len(verdicts) for kind in (Verdict.REFUSAL, Verdict.BROKEN)
        ]
        # The token that ends a reply was generated as well.
        return shares[0], shares[1], sum(min(len(one) + 1, max_tokens) for one in replies)


def _surprisal(log_probabilities: mx.array, tokens: Sequence[int]) -> mx.array:
    """−log(1 − p) of the refusal openings, nats: (N, V) -> (N,)."""
    return mx.logaddexp(selection.refusal_scores(log_probabilities, tokens), mx.array(0.0))


# --- trials and their journal --------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One edit that was tried: its parameters and scores."""

    parameters: dict[str, Any]
    screened: Screened

    def point(self, before: float) -> tuple[float, float]:
        """Where it is in the plane of the two objectives, both 0 to 1 and to be small.

        The refusal score as a share of the unedited model's, and the logarithm of the KL, from
        `LEAST_KL` to `LARGEST_KL`.
        """
        kl = min(max(self.screened.kl, LEAST_KL), LARGEST_KL)
        return (
            min(self.screened.refusal / max(before, 1e-9), 1.0),
            math.log(kl / LEAST_KL) / math.log(LARGEST_KL / LEAST_KL),
        )

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.parameters,
            "refusal_score": self.screened.refusal,
            "refused_first_token": self.screened.refused,
            "kl": self.screened.kl,
            **({} if self.screened.whole else {"rejected_early": True}),
        }


class Journal:
    """The trials so far, in an Optuna journal file that a later search goes on from.

    Raises:
        UserError: a file that is no journal, or of another search.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, str]):
        optuna = _optuna()
        self._optuna, self.path = optuna, path
        if path is None:
            storage: Any = optuna.storages.InMemoryStorage()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            damaged = f"{path} is not a search journal: name another file with --search-journal."
            if path.is_dir():
                raise UserError(damaged)
            if path.exists() and not _mend(path):
                raise UserError(damaged)
            try:
                storage = optuna.storages.JournalStorage(
                    optuna.storages.journal.JournalFileBackend(str(path))
                )
            except (ValueError, KeyError, TypeError, AssertionError):
                raise UserError(damaged) from None
        self._study = optuna.create_study(
            study_name=_STUDY,
            storage=storage,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        known = self._study.user_attrs.get("identity")
        if known is None:
            self._study.set_user_attr("identity", dict(identity))
        elif known != dict(identity):
            other = [name for name in identity if known.get(name) != identity[name]]
            raise UserError(
                f"{path} is the journal of a search with another {' and '.join(other)}: delete it, "
                "or name another file with --search-journal."
            )

    def trials(self) -> list[Any]:
        """Optuna's records of all finished trials."""
        return self._study.get_trials(deepcopy=False)

    def add(self, trial: Trial, distributions: Mapping[str, Any]) -> Any:
        """Write a trial down, whole or not at all; returns Optuna's record of it."""
        screened = trial.screened
        record = self._optuna.trial.create_trial(
            params=trial.parameters,
            distributions=dict(distributions),
            values=[screened.refusal, screened.kl],
            user_attrs={
                "refused": screened.refused,
                "early": list(screened.early),
                "whole": screened.whole,
                "tokens": screened.tokens,
            },
        )
        self._study.add_trial(record)
        return record


def _trial(record: Any) -> Trial:
    known = record.user_attrs
    screened = Screened(
        record.values[0],
        known["refused"],
        record.values[1],
        tuple(known["early"]),
        known["whole"],
        known["tokens"],
    )
    return Trial(dict(record.params), screened)


def _mend(path: Path) -> bool:
    """Whether a file is a journal; a last line that a kill left unfinished is cut off."""
    with open(path, "rb+") as stream:
        content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        first = whole.split(b"\n", 1)[0] or content
        if first and not first.startswith(b'{"op_code"'):
            return False
        if whole != content:
            stream.truncate(len(whole))
    return True


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("--search needs Optuna: pip install 'abl-mlx[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def identity(chat: ChatModel, sets: PromptSets, space: Space, options: Options) -> dict[str, str]:
    """Hashes of what a journal's trials depend on: the model, the prompts, the space, the seed."""
    model = hashlib.sha256()
    for name, value in sorted(parameters(chat.model)):
        piece = value.reshape(-1)[:64]
        if mx.issubdtype(value.dtype, mx.floating):
            piece = piece.astype(mx.float32)
        model.update(f"{name} {value.shape} {value.dtype} {piece.tolist()}".encode())
    asked = {name: [name, space.distributions()[name]._asdict()] for name in space.distributions()}
    edited = [
        options.strength,
        sorted(options.layers or ()),
        options.method,
        str(options.direction),
        options.layer,
        options.position,
        options.max_kl,
    ]

    def of(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]

    return {
        "model": model.hexdigest()[:16],
        "prompts": of(prompt_hashes(sets)),
        "space or options": of([asked, edited]),
        "seed": str(options.seed),
    }


# --- the search ----------------------------------------------------------------------------------


@dataclass
class Search:
    """A search that goes on trial by trial; the next trial depends on those before it alone.

    Attributes:
        screen: scores edits.
        space: what may change.
        edit_for: the edit of some parameters.
        journal: where trials are written down.
        enough: whether so small a share of first tokens that are refusals is good enough.
        seed: fixes what is tried.
        trials: so far.
        volumes: of the front, after each of them.
        ended: why it ended.
    """

    screen: Screen
    space: Space
    edit_for: Callable[[Parameters], Edit]
    journal: Journal
    enough: Callable[[float], bool]
    max_kl: float = 0.1
    seed: int = 0
    trials: list[Trial] = field(default_factory=list)
    volumes: list[float] = field(default_factory=list)
    ended: str = ""

    def __post_init__(self) -> None:
        optuna = _optuna()
        self._memory = optuna.create_study(directions=["minimize", "minimize"])
        for record in self.journal.trials():
            self._memory.add_trial(record)
            self._count(_trial(record))

    def run(self, most: int) -> None:
        """Try edits until there are ``most`` trials, or the front has stopped moving.

        Ctrl-C ends the search, not the command: what was found so far is used.
        """
        patience = max(PATIENCE, most // 3)
        distributions = self.space.distributions()
        with progress(most, "search", "trial") as bar:
            bar.update(min(most, len(self.trials)))
            try:
                while len(self.trials) < most and not still(self.volumes, patience):
                    interrupts.check()
                    trial = self._try(self._next())
                    record = self.journal.add(trial, distributions)
                    self._memory.add_trial(record)
                    self._count(trial)
                    bar.update()
                    bar.set_postfix_str(f"front {len(self.front())}", refresh=False)
            except KeyboardInterrupt:
                if not any(trial.screened.whole for trial in self.trials):
                    raise
                interrupts.forget()
                self.ended = "stopped by hand"
                kept = f"; {self.journal.path} keeps its trials" if self.journal.path else ""
                say(f"  search stopped: the front so far is used{kept}. Ctrl-C again ends all.")
                return
        self.ended = "all trials made" if len(self.trials) >= most else "the front stopped moving"

    def front(self) -> list[Trial]:
        """The trials that no other beats, by rising KL; none that was rejected early."""
        whole = [trial for trial in self.trials if trial.screened.whole]
        points = [(trial.screened.kl, trial.screened.refusal) for trial in whole]
        return [whole[number] for number in front(points)]

    def _count(self, trial: Trial) -> None:
        self.trials.append(trial)
        points = [one.point(self.screen.before) for one in self.front()]
        self.volumes.append(hypervolume(points))

    def _next(self) -> dict[str, Any]:
        """What is tried next: analytic edits first, then neighbours of the front and TPE's."""
        done = len(self.trials)
        if done < 2:
            return (self.space.uniform(), self.space.even(1.0))[done]
        # The weakest even edit, by halving; where even the full one leaves refusals, that.
        low, high = 0.0, 1.0
        for trial in self.trials[2 : 2 + HALVINGS]:
            middle = (low + high) / 2
            low, high = (low, middle) if self.enough(trial.screened.refused) else (middle, high)
        if done < 2 + HALVINGS:
            return self.space.even((low + high) / 2)
        analytic = self.space.analytic(high)
        if done < 2 + HALVINGS + len(analytic):
            return analytic[done - 2 - HALVINGS]
        random = np.random.default_rng([self.seed, done])
        # One in eight is a look around, one starts anywhere on the front; the others start from
        # what is already good.
        if done % 8 == 0:
            parameters = self._sampled(done)
        elif done % 8 == 4:
            whole = self.front()
            parameters = self._expected(whole[int(random.integers(len(whole)))], random)
        else:
            promising = self._promising()
            place = int(len(promising) * random.random() ** 2)
            parameters = self._expected(promising[place], random)
        return parameters if self.space.changes_something(parameters) else self.space.uniform()

    def _expected(self, parent: Trial, random: np.random.Generator) -> dict[str, Any]:
        """Of some neighbours of a trial the one that is expected to be the gentlest.

        That is the lowest KL at no higher refusal score than the parent's, both predicted from the
        trials of the same kind by their strengths.
        """
        neighbours = [self.space.neighbour(parent.parameters, random) for _ in range(NEIGHBOURS)]
        first = neighbours[0]
        kind = self.space.kind(first)
        known = [trial for trial in self.trials if self.space.kind(trial.parameters) == kind]
        neighbours = [one for one in neighbours if self.space.kind(one) == kind]
        if len(known) < 6:
            return first
        places = np.array([self.space.place(trial.parameters) for trial in known])
        values = np.log([
            [max(trial.screened.kl, LEAST_KL), max(trial.screened.refusal, 1e-4)]
            for trial in known
        ])  # fmt: skip
        asked = np.array([self.space.place(one) for one in neighbours])
        # Where little is known there is something to find: a standard deviation in favour of all.
        expected, doubt = predicted(places, values, asked)
        kl, refusal = (expected - doubt).T
        allowed = math.log(max(parent.screened.refusal, 1e-4))
        # A refusal score a little too high costs as much as a KL far too high.
        return neighbours[int(np.argmin(kl + 5 * np.maximum(refusal - allowed, 0)))]

    def _promising(self) -> list[Trial]:
        """Of the front, what opens hardly a reply with a refusal, the gentlest first."""
        found = self.front()
        for enough in (self.enough, lambda share: share <= 0.1, lambda share: share <= 0.5):
            few = [one for one in found if enough(one.screened.refused)]
            if few and few[0].screened.kl <= self.max_kl:
                return few
        return found[::-1]

    def _sampled(self, done: int) -> dict[str, Any]:
        optuna = _optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate is marked experimental
            # A sampler of its own for each trial: a resumed search goes on as one that was not
            # stopped.
            self._memory.sampler = optuna.samplers.TPESampler(
                seed=int(np.random.default_rng([self.seed, done]).integers(2**31)),
                multivariate=True,
                n_startup_trials=0,
            )
            sampled = self._memory.ask(self.space.distributions())
            self._memory.tell(sampled, state=optuna.trial.TrialState.FAIL)
        return dict(sampled.params)

    def _try(self, parameters: dict[str, Any]) -> Trial:
        ahead = self.front()

        def hopeless(early: tuple[float, float]) -> bool:
            refusal, kl = early
            return any(
                refusal > 1.5 * one.screened.early[0] + 0.1 and kl > 2 * one.screened.early[1]
                for one in ahead
            )

        return Trial(parameters, self.screen.score(self.edit_for(parameters), hopeless))


def predicted(
    places: np.ndarray, values: np.ndarray, asked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values expected at other places, by kernel ridge regression on top of a linear fit.

    Args:
        places: (n, f) where values are known.
        values: (n, m).
        asked: (a, f).

    Returns:
        The values and their standard deviations, (a, m) each.
    """
    middle = places.mean(axis=0)
    left, right = places - middle, asked - middle
    # A line through all of it, held back where few trials tell little.
    ridge = 1e-2 * np.eye(left.shape[1])
    mean = values.mean(axis=0)
    slope = np.linalg.solve(left.T @ left + ridge, left.T @ (values - mean))
    rest = values - mean - left @ slope

    def squares(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return ((one[:, None] - other[None]) ** 2).sum(axis=-1)

    between = squares(left, left)
    scale = float(np.median(between[between > 0])) if (between > 0).any() else 1.0
    inner = np.exp(-between / scale) + 1e-3 * np.eye(len(left))
    outer = np.exp(-squares(right, left) / scale)
    share = 1 - (outer * np.linalg.solve(inner, outer.T).T).sum(axis=1)
    doubt = np.sqrt(np.maximum(share, 0))[:, None] * rest.std(axis=0)
    return mean + right @ slope + outer @ np.linalg.solve(inner, rest), doubt


# --- the choice ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A trial of the front whose edit was asked for replies.

    Attributes:
        refused, broken: shares of the harmful prompts that were asked.
        meets: whether both together meet the target.
    """

    trial: Trial
    refused: float
    broken: float
    meets: bool

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.trial.record(), "refusal_rate": self.refused, "broken_rate": self.broken}


def meets(share: float, prompts: int, target: float) -> bool:
    """Whether a share of refused and broken replies is good enough, for other prompts as well.

    It is where the upper end of its Wilson interval is that holds four times in five on its side;
    of few prompts, none at all.
    """
    count = round(share * prompts)
    return count == 0 or wilson(count, prompts, _FOUR_IN_FIVE)[1] <= target


def ask_survivors(
    trials: Sequence[Trial], ask: Callable[[Trial], Asked], most: int = MOST_ASKED
) -> list[Asked]:
    """Ask trials of a front for replies; few, but the gentlest that meets the target among them.

    Half of them are spread over the front, others close in on where the target is first met, and
    what is left goes into the widest gaps.

    Args:
        trials: by rising KL.
    """
    found: dict[int, Asked] = {}
    count = len(trials)
    spread = {round(place) for place in np.linspace(0, count - 1, min(count, max(2, most // 2)))}
    with progress(min(most, count), "replies of the front", "edit") as bar:
        for place in sorted(spread):
            found[place] = ask(trials[place])
            bar.update()
        while len(found) < min(most, count):
            passing = [place for place in sorted(found) if found[place].meets]
            top = passing[0] if passing else count
            below = [place for place in found if place < top]
            bottom = max(below, default=-1)
            left = list(range(bottom + 1, top))
            if not left:  # the border is found; then the widest gap of the front
                ends = sorted(found)
                low, high = max(itertools.pairwise(ends), key=lambda pair: pair[1] - pair[0])
                left = list(range(low + 1, high))
            place = left[len(left) // 2]
            found[place] = ask(trials[place])
            bar.update()
    return [found[place] for place in sorted(found)]


def choose(asked: Sequence[Asked]) -> Asked:
    """The lowest KL that meets the target; where none does, the fewest refused and broken."""
    passing = [one for one in asked if one.meets]
    if passing:
        return min(passing, key=lambda one: one.trial.screened.kl)
    return min(asked, key=lambda one: (one.refused + one.broken, one.trial.screened.kl))


# --- as a part of run and measure ----------------------------------------------------------------


def improve(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    found: DirectionFile,
    options: Options,
) -> DirectionFile:
    """The direction file with the edit that a search of ``options.search`` trials has found.

    Args:
        found: the analytic choice, which is the first trial.

    Raises:
        UserError: options that do not go together; a journal of another search.
    """
    assert options.search is not None
    check(options)
    harmful = [chat.encode(text) for text in sets.harmful.validation.texts]
    harmless = [chat.encode(text) for text in _filled_up(sets.harmless)]
    space = Space(
        len(chat.layers), sources_of(chat, sets, found, options), embedding=options.embedding
    )
    screen = Screen(chat, writers, harmful, harmless)

    def edit_for(given: Parameters) -> Edit:
        recipe = space.recipe(given)
        # Norms are kept in weights only; what that changes is seen in the evaluation.
        return Edit(
            space.directions(given),
            options.strength,
            options.layers,
            recipe["embedding"],
            recipe["profile"],
        )

    journal = Journal(options.search_journal, identity(chat, sets, space, options))
    questions = [chat.encode(text) for text in _filled_up(sets.harmful)]
    count = len(questions)
    target = options.target_refusals
    search = Search(
        screen,
        space,
        edit_for,
        journal,
        lambda share: meets(share, len(harmful), target),
        options.max_kl,
        options.seed,
    )
    resumed = len(search.trials)
    more = max(0, options.search - resumed)
    say(
        f"  search: at most {more} trials, {more * screen.cost:,} forward tokens, then at most "
        f"{min(MOST_ASKED, options.search) * count * REPLY_TOKENS:,} generated ones"
        + (f"; {resumed} trials are in {journal.path}" if resumed else "")
    )
    search.run(options.search)
    generated = [0]

    def ask(trial: Trial) -> Asked:
        refused, broken, tokens = screen.ask(edit_for(trial.parameters), questions)
        generated[0] += tokens
        return Asked(trial, refused, broken, meets(refused + broken, count, target))

    whole = search.front()
    asked = ask_survivors([one for one in whole if one.screened.refused < 0.95] or whole[-1:], ask)
    chosen = choose(asked)
    say(table(asked, chosen, space))
    if not chosen.meets:
        say(
            f"  no edit of the front meets --target-refusals {target:g}: the one that refuses "
            "least is taken; more trials may find a better one"
        )
    return _file(found, search, space, asked, chosen, generated[0], target)


def _filled_up(split: Split) -> list[str]:
    """The validation prompts, and train prompts behind them where these are few."""
    texts = [*split.validation.texts, *split.train.texts]
    return texts[: max(ENOUGH_PROMPTS, len(split.validation))]


def check(options: Options) -> None:
    """Refuse options that do not go with a search, and a missing Optuna, before any long work.

    Raises:
        UserError: naming them.
    """
    _optuna()
    if options.pin is not None:
        raise UserError("--search and --pin do not go together: leave one of them out.")
    if options.layer is not None:
        raise UserError("--search looks for the layer itself: leave --layer out.")


def sources_of(
    chat: ChatModel, sets: PromptSets, found: DirectionFile, options: Options
) -> dict[str, Directions]:
    """Where a search may take directions from: the analytic choice, its method, and others.

    Singular vectors are measured anew, which costs one pass over the train prompts.
    """

    def fixed(chosen: mx.array) -> Directions:
        return lambda index, per_layer: chosen

    made: dict[str, Directions] = {DEFAULT: fixed(found.selected)}
    candidates = found.candidates
    position = found.metadata.get("summary", {}).get("position", -1)
    if candidates is None or options.direction is not None:
        return made
    if position not in candidates.positions:
        position = candidates.positions[-1]
    layers = candidates.n_layers

    def of(these: directions.Candidates, where: int) -> Directions:
        def make(index: float, per_layer: bool) -> mx.array:
            return these.each_layer(where) if per_layer else these.at(index, where)

        return make

    made[candidates.method] = of(candidates, position)
    if options.method is None:
        for rank in (2, 3):
            if rank <= layers:
                made[f"layers-rank-{rank}"] = fixed(candidates.across_layers(position, rank))
        train = [
            [chat.encode(text) for text in split.train.texts]
            for split in (sets.harmful, sets.harmless)
        ]
        spans = directions.measure(
            chat, train[0], train[1], [position], method="svd", rank=min(2, len(train[0]))
        )
        made["svd"] = of(spans, position)
    return made


def _file(
    found: DirectionFile,
    search: Search,
    space: Space,
    asked: Sequence[Asked],
    chosen: Asked,
    generated: int,
    target: float,
) -> DirectionFile:
    parameters, screened = chosen.trial.parameters, chosen.trial.screened
    selected = space.directions(parameters)
    default = next(trial for trial in search.trials if trial.screened.whole)
    before = found.metadata.get("summary", {})
    summary: dict[str, Any] = {"method": before.get("method", "given")}
    if parameters["method"] == DEFAULT:
        summary = dict(before)
    else:
        name = parameters["method"]
        summary["method"] = directions.METHOD if name.startswith("layers-rank") else name
        if selected.shape[-2] > 1:
            summary["rank"] = int(selected.shape[-2])
        if "position" in before:
            summary["position"] = before["position"]
        if name.startswith("layers-rank"):
            summary["across"] = "layers"
        elif parameters["per_layer"]:
            summary["per_layer"] = True
        else:
            summary["layer"] = round(parameters["index"], 3)
    summary |= {
        "chosen_by": "search: lowest KL of those whose replies meet the target"
        if chosen.meets
        else "search: fewest refusals among the replies",
        "search": {
            "trials": len(search.trials),
            "ended": search.ended,
            "target_refusals": target,
            "refusal_rate": chosen.refused,
            "broken_rate": chosen.broken,
            "refusal_score": screened.refusal,
            "kl": screened.kl,
            "kl_default": default.screened.kl,
            "refusal_score_default": default.screened.refusal,
            "hypervolume": search.volumes[-1],
            "forward_tokens": sum(trial.screened.tokens for trial in search.trials),
            "generated_tokens": generated,
        },
    }
    metadata = {key: value for key, value in found.metadata.items() if key != "pins"}
    metadata |= {
        "method": summary["method"],
        "summary": summary,
        "recipe": space.recipe(parameters),
        "search": {
            "front": [one.record() for one in asked],
            "trials": [trial.record() for trial in search.trials],
        },
    }
    return replace(found, selected=selected, metadata=metadata)


# --- what a person reads -------------------------------------------------------------------------


def table(asked: Sequence[Asked], chosen: Asked, space: Space) -> str:
    """The front, a line for each edit that was asked, by rising KL."""
    rows: list[tuple[str, ...]] = [
        ("", "KL", "score", "refused", "broken", "directions", "attention", "MLP", "embedding")
    ]
    for one in asked:
        given, screened = one.trial.parameters, one.trial.screened
        recipe = space.recipe(given)
        name = str(given["method"])
        if name != DEFAULT and not name.startswith("layers-rank"):
            name += ", per layer" if given["per_layer"] else f" {given['index']:.1f}"
        rows.append(
            (
                "→" if one is chosen else "",
                f"{screened.kl:.6f}",
                f"{screened.refusal:.3f}",
                percent(one.refused),
                percent(one.broken),
                name,
                *(_strengths(recipe["profile"][part]) for part in ("attention", "mlp")),
                "yes" if recipe["embedding"] else "no",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _strengths(values: Sequence[float]) -> str:
    """Strengths by layer, in so few numbers as fit a table."""
    if len(set(values)) == 1:
        return f"{values[0]:.2f}"
    if len(values) <= 6:
        return " ".join(f"{value:.2f}".removeprefix("0") if value else "0" for value in values)
    peak = int(np.argmax(values))
    return f"{min(values):.2f} to {values[peak]:.2f} at {peak}"
