"""`--search` compared with published practice on three small models: generated tokens, and fronts.

The practice (as heretic's README describes it: Optuna's TPE, 200 trials, refusals counted on 100
generated replies a trial, KL at the first token) is implemented in this file in a
simple form, over the same space of edits. Both fronts are then judged in the same way on held-out
prompts that neither has seen: refusals among generated replies, and KL on harmless prompts.

    python benchmarks/search.py                 # demo, easy, hard: about an hour on two cores
    python benchmarks/search.py demo --trials 200 --max-tokens 16
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import Measuring, Searching
from abl_mlx.commands import prompt_choice
from abl_mlx.commands.find import find_direction, find_reply_prefix
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs import prompts, sources
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import chat_model
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.encoded_sets import opened
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import Writer, find_writers
from abl_mlx.search import loop
from abl_mlx.search.pareto import Point, front, hypervolume
from abl_mlx.search.space import Space
from tests.support import small_models


def load(name: str) -> tuple[ChatModel, list[Writer], PromptSets]:
    """A model with its writers and prompts."""
    if name == "demo":
        chat, sets = chat_model.load(sources.resolve("demo").path), prompts.load_demo()
    else:
        chat, sets = chat_model.load(small_models.folder(name)), small_models.prompt_sets(name)
    encoded = prompt_choice.encoded(chat, sets, Measuring())
    chat.reply_prefixes[None], _ = find_reply_prefix(chat, encoded[None])
    return chat, find_writers(chat), sets


class Judge:
    """Refusals among generated replies, and KL at the first token, of an edit."""

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmful: Sequence[str],
        harmless: Sequence[str],
        max_tokens: int,
    ):
        self._chat, self._writers, self._max_tokens = chat, writers, max_tokens
        self._asked = list(harmful)
        self._harmful = [chat.encode(text) for text in harmful]
        self._harmless = [chat.encode(text) for text in harmless]
        self._base = first_reply_token(chat, self._harmless)
        self.generated = 0

    def __call__(self, edit: Edit) -> Point:
        """(share of refused or broken replies, KL in nats)."""
        with ablation(self._writers, edit):
            replies = evaluate.generate(self._chat, self._harmful, self._max_tokens, batch_size=100)
            opened = first_reply_token(self._chat, self._harmless)
        self.generated += sum(min(len(one) + 1, self._max_tokens) for one in replies)
        verdicts = list(map(classify, evaluate.decode(self._chat, replies), self._asked))
        bad = sum(verdict is not Verdict.ANSWER for verdict in verdicts)
        kl = mx.maximum(kl_divergence(self._base, opened), 0).mean().item()
        return bad / len(verdicts), float(kl)  # type: ignore[arg-type]


def edit_of(space: Space, parameters: dict[str, Any]) -> Edit:
    """The edit of a trial's parameters, at an overall strength of 1."""
    recipe = space.recipe(parameters)
    return Edit(
        space.directions(parameters), embedding=recipe["embedding"], profile=recipe["profile"]
    )


def practice(
    space: Space, judge: Judge, trials: int, seed: int
) -> tuple[list[dict[str, Any]], list[Point]]:
    """TPE in which every trial generates all replies; returns the front's parameters and scores."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(n_startup_trials=60, multivariate=True, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    distributions = space.distributions()
    kept: list[dict[str, Any]] = []
    points: list[Point] = []
    for number in range(trials):
        trial = study.ask(distributions)
        parameters = dict(trial.params)
        point = judge(edit_of(space, parameters)) if space.changes_something(parameters) else None
        # An edit that changes nothing counts as one that refuses everything.
        point = point or (1.0, 0.0)
        study.tell(trial, point)
        kept.append(parameters)
        points.append(point)
        if (number + 1) % 20 == 0:
            print(f"    practice: {number + 1} trials", file=sys.stderr, flush=True)
    best = front(points)
    return [kept[number] for number in best], [points[number] for number in best]


def kept_practice(
    file: Path | None, space: Space, judge: Judge, trials: int, seed: int
) -> tuple[list[dict[str, Any]], int, float]:
    """The practice's front, tokens and seconds, from a file, or computed and written to it."""
    if file is not None and file.exists():
        kept = json.loads(file.read_text())
        return kept["front"], kept["generated"], kept["seconds"]
    start = time.perf_counter()
    found, _ = practice(space, judge, trials, seed)
    seconds = time.perf_counter() - start
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"front": found, "generated": judge.generated, "seconds": seconds}
        file.write_text(json.dumps(kept))
    return found, judge.generated, seconds


def area(points: Sequence[Point], default_kl: float) -> float:
    """Hypervolume over refusals and log KL, for a KL of 0.01 to 100 times that of the default."""
    scaled = []
    for refused, kl in points:
        ratio = float(np.clip(kl / default_kl, 0.01, 100))
        scaled.append((refused, np.log(ratio / 0.01) / np.log(100 / 0.01)))
    return hypervolume(scaled)


def gentlest(points: Sequence[Point]) -> float | None:
    """The lowest KL of the edits that leave at most 5% refused or broken."""
    return min((kl for refused, kl in points if refused <= 0.05), default=None)


def compare(
    name: str, trials: int, ours: int, max_tokens: int, seed: int, keep: Path | None
) -> None:
    """Run both on one model and print a row for each."""
    chat, writers, sets = load(name)
    options = Measuring.of(search=ours, seed=seed)
    found = find_direction(chat, writers, sets, replace(options, searching=Searching()))
    encoded = opened(chat, prompt_choice.encoded(chat, sets, options))
    space = Space(
        len(chat.layers), loop.sources_of(chat, loop.at_prompts(encoded[None]), found, options)
    )
    held_out = Judge(chat, writers, sets.harmful.test.texts, sets.harmless.test.texts, 32)
    default = held_out(edit_of(space, space.uniform()))

    # A hundred prompts: those of the validation part, filled up from the train part.
    validation = [
        [*split.validation.texts, *split.train.texts][:100]
        for split in (sets.harmful, sets.harmless)
    ]
    judge = Judge(chat, writers, validation[0], validation[1], max_tokens)
    file_of_it = None if keep is None else keep / f"{name}-{trials}-{seed}.json"
    theirs, generated, their_seconds = kept_practice(file_of_it, space, judge, trials, seed)
    front_of_theirs = [held_out(edit_of(space, one)) for one in theirs]

    start = time.perf_counter()
    file = loop.improve(chat, writers, encoded, found, options)
    seconds = time.perf_counter() - start
    chosen = file.metadata["summary"]["search"]
    names = space.uniform().keys()
    asked = [{key: one[key] for key in names} for one in file.metadata["search"]["front"]]
    front_of_ours = [held_out(edit_of(space, one)) for one in asked]
    recipe = file.metadata["recipe"]
    taken = held_out(Edit(file.selected, embedding=recipe["embedding"], profile=recipe["profile"]))

    print(f"\n{name}: the default has KL {default[1]:.6f}, {default[0]:.1%} refused or broken")
    print(f"  {'':22}{'trials':>7}{'generated':>11}{'seconds':>9}{'area':>7}  KL at <= 5%")
    rows = (
        ("--search", chosen["trials"], chosen["generated_tokens"], seconds, front_of_ours),
        ("200 x 100 practice", trials, generated, their_seconds, front_of_theirs),
    )
    for title, count, generated, took, points in rows:
        lowest = gentlest(points)
        told = "none" if lowest is None else f"{lowest:.6f}"
        size = area(points, default[1])
        print(f"  {title:22}{count:7}{generated:11,}{took:9.0f}{size:7.4f}  {told}")
    print(f"  chosen by --search: KL {taken[1]:.6f} ({taken[1] / default[1] - 1:+.0%} of the "
          f"default's), {taken[0]:.1%} refused or broken")  # fmt: skip
    sys.stdout.flush()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=["demo", "easy", "hard"])
    parser.add_argument("--trials", type=int, default=200, help="of the practice")
    parser.add_argument("--search", type=int, default=200, help="of --search, at most")
    parser.add_argument("--max-tokens", type=int, default=16, help="of the practice's replies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder that keeps the practice's results")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in given.models:
        compare(name, given.trials, given.search, given.max_tokens, given.seed, given.keep)


if __name__ == "__main__":
    main()
