"""abl-mlx compared with other tools on a real model: the tables of docs/real-models.md.

    python benchmarks/real_models.py FOLDER                         # prints both tables
    python benchmarks/real_models.py FOLDER --heretic VENV --write  # puts them into the document
    python benchmarks/real_models.py FOLDER --only agreement

FOLDER has qwen2.5-coder-0.5b.gguf. Side by side: `abl-mlx run` with its defaults, the same with
``--search N``, Heretic from a virtual environment of its own (``pip install heretic-llm`` and
torch), and a plain difference of means with ordinary rounding. Each becomes a GGUF whose tensors
have the types of the original. llama.cpp asks all of them the same held-out prompts, and the same
code judges the replies and measures the KL. Heretic works on the same weights as floats and on the
same training and validation prompts, and gets the CPU seconds that our default took. Only verdicts
are kept. Then `abl-mlx run` edits the same model in two other forms, each compared with its
unedited form: a GGUF in F16, asked by llama.cpp, and a folder that mlx-lm quantized to 4 bits,
asked by mlx-lm.

Agreement: tokens of 200 lines, greedy tokens and log-probabilities of 20 prompts, in MLX and in
llama.cpp, as tests/whole/test_real_models.py has them for smaller models.

With ``--work FOLDER`` all files stay there, and files that exist are not made again. Everything
takes about two hours of one core, and 12 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks"
sys.path[:0] = [str(ROOT), str(SCRIPTS)]

import heretic_run  # noqa: E402
from audit_real import float_folder  # noqa: E402
from requantize import changed_in, requantized  # noqa: E402
from watched import Cost, cost_of  # noqa: E402

from abl_mlx.behaviour import exact_kl  # noqa: E402
from abl_mlx.behaviour.refusals import (  # noqa: E402
    Tally,
    Verdict,
)
from abl_mlx.choices import Prompting  # noqa: E402
from abl_mlx.commands import conversion, evaluate_model, prompt_choice  # noqa: E402
from abl_mlx.eval_choices import EvalOptions  # noqa: E402
from abl_mlx.inputs import prompts  # noqa: E402
from abl_mlx.inputs.sets import PromptSets  # noqa: E402
from abl_mlx.outputs import gguf_outputs, staging  # noqa: E402
from abl_mlx.records.evaluations import Divergence  # noqa: E402
from convert.gguf.file import GgufSource  # noqa: E402
from tools import marked  # noqa: E402

MODEL = "qwen2.5-coder-0.5b"
PAGE = ROOT / "docs" / "real-models.md"

#: The system message that this model's chat template adds to a conversation without one.
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

#: Every program computes with one thread, so that CPU seconds can be compared.
ONE_THREAD = {
    "PYTHONPATH": str(ROOT),
    "LLAMA_ARG_THREADS": "1",
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")},
}

#: The compared edits: key -> name in the table.
RUN, SEARCH, HERETIC, PLAIN = "run", "search", "heretic", "plain"
F16, FOUR_BITS = "f16", "mlx-4-bit"
TITLES = {
    "as-it-is": "as it is",
    RUN: "`abl-mlx run`",
    SEARCH: "`abl-mlx run --search`",
    F16: "`abl-mlx run`, F16 GGUF",
    FOUR_BITS: "`abl-mlx run`, MLX 4-bit folder",
    HERETIC: "Heretic",
    PLAIN: "plain difference of means",
}
AGREEMENT = "agreement"

#: The model in other forms: key -> the name of its file or folder.
FORMS = {F16: "qwen-F16.gguf", FOUR_BITS: "qwen-4-bit"}

#: Sets of held-out prompts, in the table's order.
PARTS = ("harmful", "borderline", "harmless")


@dataclass(frozen=True)
class Bench:
    """The settings that all edits share.

    Attributes:
        model: the GGUF.
        work: where files are made.
        limit: prompts of each set and part; None for all.
        trials: of ``--search``; None leaves it out.
        heretic: its virtual environment; None leaves it out.
        heretic_seconds: CPU seconds that it has; None for what `abl-mlx run` took.
    """

    model: Path
    work: Path
    limit: int | None = None
    trials: int | None = None
    heretic: Path | None = None
    heretic_seconds: float | None = None

    @property
    def limited(self) -> list[str]:
        """The flag for `limit`."""
        return [] if self.limit is None else ["--limit", str(self.limit)]

    @property
    def sets(self) -> PromptSets:
        """The bundled prompts, split as every command splits them."""
        return prompt_choice.cut(prompts.load_sets(None, None, Prompting().seed), self.limit)


@dataclass(frozen=True)
class Made:
    """A model that is judged.

    Attributes:
        file: the GGUF or folder.
        did: how the edit was found, in words.
        cost: the cost of making it; None for the unedited model.
    """

    file: Path
    did: str
    cost: Cost | None


# --- making ------------------------------------------------------------------------------------


def ours(bench: Bench, key: str, flags: Sequence[str] = ()) -> Made:
    """`abl-mlx run`; its cost includes asking the held-out prompts before and after."""
    out = bench.work / (key if key == FOUR_BITS else f"{key}.gguf")
    model = form(bench, key) if key in FORMS else bench.model
    command = [sys.executable, "-m", "abl_mlx", "run", str(model), "-o", str(out)]
    cost = cost_of([*command, *flags, *bench.limited], bench.work / f"{key}.log", ONE_THREAD)
    chosen = record_of(out)["direction"]
    did = str(chosen["method"])
    if "forward_tokens" in chosen:
        did += f", {chosen['forward_tokens']:,} tokens run to choose"
    return Made(out, did, cost)


def record_of(out: Path) -> dict[str, Any]:
    """The record that `abl-mlx run` wrote for an output."""
    found: dict[str, Any] = json.loads(staging.companions(out)["record"].read_text())
    return found


def form(bench: Bench, key: str) -> Path:
    """The model as floats in a GGUF, or quantized by mlx-lm in a folder."""
    place, floats = bench.work / FORMS[key], bench.work / "float16"
    if place.exists():
        return place
    if not floats.exists():
        float_folder(bench.model, floats, bench.work)
    if key == F16:
        conversion.convert(str(floats), place, quantize="F16")
    else:
        from mlx_lm import convert

        convert(str(floats), str(place), quantize=True, q_group_size=64, q_bits=4)
    return place


def plain(bench: Bench) -> Made:
    """The edit of most scripts, as in plain_edit.py."""
    out = bench.work / f"{PLAIN}.gguf"
    command = [sys.executable, str(SCRIPTS / "plain_edit.py"), str(bench.model), str(out)]
    cost = cost_of([*command, *bench.limited], bench.work / f"{PLAIN}.log", ONE_THREAD)
    return Made(out, "one direction, nothing tried", cost)


def heretic(bench: Bench, seconds: float) -> Made:
    """Heretic on the float weights for its CPU seconds, requantized to the original's types."""
    assert bench.heretic is not None
    floats, edited = bench.work / "float", bench.work / HERETIC
    log, told = bench.work / f"{HERETIC}.log", bench.work / f"{HERETIC}.told.json"
    if not floats.exists():
        float_folder(bench.model, floats, bench.work, "float32")
    if not told.exists():
        command = [sys.executable, str(SCRIPTS / "heretic_run.py"), str(bench.heretic)]
        command += [str(floats), str(edited), str(_prompt_files(bench)), str(told)]
        command += ["--system", SYSTEM, "--cpu-seconds", str(round(seconds))]
        cost_of(command, log, ONE_THREAD)
    out, back = bench.work / f"{HERETIC}.gguf", bench.work / f"{HERETIC}-F32.gguf"
    conversion.convert(str(edited), back, quantize="F32")
    with GgufSource(bench.model) as source, GgufSource(back) as values:
        requantized(source, changed_in(source, values), out)
    back.unlink()
    known = json.loads(told.read_text())
    did = (
        f"{known['trials']} trials, each of them asked {known['asked']} harmful prompts for "
        f"{known['reply_tokens']} tokens; it counts {known['refused']} refusals of the one it "
        f"offers first, KL {known['kl']}"
    )
    return Made(out, did, Cost.of(log))


def _prompt_files(bench: Bench) -> Path:
    """Write the training and validation prompts of `abl-mlx run`, one per line."""
    folder, sets = bench.work / "prompts", bench.sets
    folder.mkdir(exist_ok=True)
    for name, split in (("bad", sets.harmful), ("good", sets.harmless)):
        for part, chosen in (("train", split.train), ("evaluation", split.validation)):
            assert not any("\n" in text for text in chosen.texts)
            lines = "".join(f"{text}\n" for text in chosen.texts)
            (folder / f"{name}-{part}.txt").write_text(lines, encoding="utf-8")
    return folder


def edits(bench: Bench, only: str) -> Iterator[tuple[str, Made]]:
    """Yield the unedited model, and each edit that ``only`` matches or that exists already."""
    yield "as-it-is", Made(bench.model, "", None)
    made: dict[str, Made] = {}

    def seconds() -> float:
        if bench.heretic_seconds is not None:
            return bench.heretic_seconds
        cost = made[RUN].cost if RUN in made else None
        if cost is None:
            raise SystemExit("Heretic has the time that `run` took: make that first, or give it.")
        return cost.cpu

    makers: dict[str, Callable[[], Made]] = {
        RUN: lambda: ours(bench, RUN),
        SEARCH: lambda: ours(bench, SEARCH, ["--search", str(bench.trials)]),
        **{key: partial(ours, bench, key) for key in FORMS},
        HERETIC: lambda: heretic(bench, seconds()),
        PLAIN: lambda: plain(bench),
    }
    for key, make in makers.items():
        place = bench.work / f"{key}.made.json"
        if place.exists():
            kept = json.loads(place.read_text())
            made[key] = Made(bench.work / kept["file"], kept["did"], Cost(**kept["cost"]))
        elif re.search(only, key) and _possible(bench, key):
            say(f"{TITLES[key]}: made")
            made[key] = make()
            place.write_text(json.dumps({**asdict(made[key]), "file": made[key].file.name}))
        if key in made:
            yield key, made[key]


def _possible(bench: Bench, key: str) -> bool:
    """Whether an edit can be made; prints the reason if not."""
    venv = bench.heretic
    if key == HERETIC and (venv is None or not heretic_run.command_in(venv).exists()):
        say("Heretic is left out: --heretic names no virtual environment that has it")
        return False
    return key != SEARCH or bench.trials is not None


# --- judging -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """How a model replies.

    Attributes:
        tallies: verdicts on the replies to the held-out prompts of each of `PARTS`.
        k1, k32: KL from the model as it is on harmless prompts.
        before: the verdicts on the unedited model in the same form, where that differs.
    """

    tallies: dict[str, Tally]
    k1: float
    k32: float
    before: dict[str, Tally] | None = None

    @classmethod
    def read(cls, place: Path) -> Judged:
        """What `judged` wrote."""
        record = json.loads(place.read_text())

        def tallies(name: str) -> dict[str, Tally]:
            return {part: Tally(**counts) for part, counts in record[name].items()}

        before = tallies("before") if record.get("before") else None
        return cls(tallies("tallies"), record["k1"], record["k32"], before)


def tallies_of(record: dict[str, Any]) -> dict[str, Tally]:
    """The verdicts by set, as a record of `eval` or `run` has them by category."""
    found = {}
    for part in PARTS:
        groups = record["categories"][part].values()
        n, refused, broken = (sum(one[key] for one in groups) for key in ("n", "refused", "broken"))
        found[part] = Tally(refused, n - refused - broken, broken)
    return found


def asked(bench: Bench, file: Path) -> dict[str, Tally]:
    """Verdicts on llama.cpp's replies to the held-out prompts; the replies are not kept."""
    options = EvalOptions.of(limit=bench.limit, runtime="llama.cpp")
    return tallies_of(evaluate_model.evaluate_model(str(file), options).json)


@contextlib.contextmanager
def divergence(bench: Bench) -> Iterator[Callable[[Path], Divergence]]:
    """A function that measures KL from the unedited model, exactly, in MLX, on held-out prompts."""
    with contextlib.ExitStack() as stack:
        base: list[exact_kl.Baseline] = []

        def kl(file: Path) -> Divergence:
            if not base:  # only where something is to be measured
                texts = bench.sets.harmless.test.take(exact_kl.PROMPTS).texts
                with gguf_outputs.opened(bench.model) as chat:
                    base.append(stack.enter_context(exact_kl.baseline(chat, texts)))
            with gguf_outputs.opened(file) as chat:
                return exact_kl.kl(chat, base[0])

        yield kl


def judged(bench: Bench, only: str) -> Iterator[tuple[str, Made, Judged]]:
    """Every edit with its figures."""
    with divergence(bench) as kl:
        for key, made in edits(bench, only):
            place = bench.work / f"{key}.judged.json"
            if not place.exists():
                say(f"{TITLES[key]}: asked")
                if key in (RUN, SEARCH, *FORMS):  # `run` has asked the written file in the same way
                    record = record_of(made.file)
                    before = tallies_of(record["before"]) if key in FORMS else None
                    k1, k32 = record["kl"]["k1"], record["kl"]["k32"]
                    found = Judged(tallies_of(record["after"]), k1, k32, before)
                elif made.cost is None:
                    found = Judged(asked(bench, made.file), 0, 0)
                else:
                    away = kl(made.file)
                    found = Judged(asked(bench, made.file), away.k1, away.k32)
                place.write_text(json.dumps(asdict(found)))
            yield key, made, Judged.read(place)


# --- tables ------------------------------------------------------------------------------------

HEAD = [
    "| | harmful refused | borderline refused | harmless refused | broken | KL, 1st token "
    "| KL, 32 tokens | CPU minutes | minutes | memory |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def side_by_side(bench: Bench, only: str) -> str:
    """The table, with notes on its rows."""
    rows: list[str] = []
    notes: list[str] = []
    loads: list[float] = []
    for key, made, seen in judged(bench, only):
        if seen.before is not None:
            what = TITLES[key].partition(", ")[2]
            rows.append(f"| {what} as it is | {' | '.join([*_verdicts(seen.before), *[''] * 5])} |")
        cells = _verdicts(seen.tallies)
        if made.cost is None:
            cells += [""] * 5
        else:
            cost = made.cost
            cells += [f"{seen.k1:.4f}", f"{seen.k32:.4f}", f"{cost.cpu / 60:.1f}"]
            cells += [f"{cost.seconds / 60:.1f}", f"{cost.memory / 1e9:.2f} GB"]
            notes.append(f"- {TITLES[key]}: {made.did}.")
            loads += cost.load
        rows.append(f"| {TITLES[key]} | {' | '.join(cells)} |")
        counts = [f"{seen.tallies[part].total} {part}" for part in PARTS]
    told = [
        f"{', '.join(counts)} prompts; in parentheses 95% intervals; broken replies of each set.",
        *notes,
    ]
    if loads:
        told.append(
            f"- One thread each, on {os.cpu_count()} cores that were shared: the run queue held "
            f"{min(loads):.1f} to {max(loads):.1f} on average before and after each row, so "
            "CPU minutes compare and minutes do not."
        )
    return "\n".join([*HEAD, *rows, "", *told[:1], "", *told[1:]]).strip()


def _verdicts(tallies: dict[str, Tally]) -> list[str]:
    """The cells of refusals and of broken replies."""
    each = [tallies[part] for part in PARTS]
    cells = [f"{one.rate(Verdict.REFUSAL):.0%} {_interval(one)}" for one in each]
    return [*cells, " / ".join(f"{one.rate(Verdict.BROKEN):.0%}" for one in each)]


def _interval(tally: Tally) -> str:
    low, high = tally.interval(Verdict.REFUSAL)
    return f"({low:.0%} to {high:.0%})"


def agreement(bench: Bench) -> tuple[str, bool]:
    """How MLX and llama.cpp agree on the unedited file, and whether they agree well enough."""
    from tests.whole import test_real_models as real

    say("agreement with llama.cpp")
    with tempfile.TemporaryDirectory() as folder:
        unlike = real.tokenized_otherwise(bench.model, Path(folder))
    short, apart = real.agreement(bench.model)
    rows = [
        "| | |",
        "|---|---|",
        f"| lines with the same tokens | {len(real.LINES) - len(unlike)} of {len(real.LINES)} |",
        f"| llama.cpp's greedy tokens, less likely in MLX than its likeliest by | "
        f"{max(short):.3f} nats at most |",
        f"| its five likeliest tokens, log-probabilities apart by | "
        f"{statistics.median(apart):.3f} nats in the median, {max(apart):.3f} at most |",
    ]
    text = f"{len(real.PROMPTS)} prompts, the next four tokens of each:\n\n" + "\n".join(rows)
    return text, not unlike and real.near_enough(short, apart)


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Print the tables, or put them into docs/real-models.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help=f"where {MODEL}.gguf is")
    parser.add_argument(
        "--only", default="", help=f"{', '.join(TITLES)} or {AGREEMENT}: a regular expression"
    )
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name}")
    parser.add_argument("--work", type=Path, help="keep what is made here, and go on from it")
    parser.add_argument("--limit", type=int, help="prompts of each set, for a quick look")
    parser.add_argument("--search", type=int, help="trials of a search, compared as well")
    parser.add_argument("--heretic", type=Path, help="virtual environment that has Heretic")
    parser.add_argument(
        "--heretic-seconds", type=float, help="CPU seconds for it, instead of what `run` took"
    )
    given = parser.parse_args()
    os.environ.update(ONE_THREAD)
    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="real-")))
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            given.folder / f"{MODEL}.gguf",
            work.resolve(),
            given.limit,
            given.search,
            given.heretic,
            given.heretic_seconds,
        )
        tables: dict[str, str] = {}
        good = True
        if re.search(given.only, AGREEMENT):
            tables[AGREEMENT], good = agreement(bench)
        if any(re.search(given.only, key) for key in TITLES):
            tables["side by side"] = side_by_side(bench, given.only)
    for name, text in tables.items():
        if given.write:
            marked.write(PAGE, name, text)
        else:
            print(f"{text}\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
