"""``python -m attacks``: runs mutated inputs of every kind and prints a table of outcomes."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from attacks import ground, network, pool
from attacks.verdict import GOOD, KINDS, Verdict

#: Modules of this package that are programs of their own.
PROGRAMS = ("killer", "full_disk")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[KIND...]", nargs=-1)
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="Minutes to run.  [default: 1]"
)
@click.option(
    "--cases",
    type=click.IntRange(1),
    help="Cases of each kind, in place of --minutes.",
)
@click.option("--first", type=click.IntRange(0), default=0, help="Number of the first case.")
@click.option("--seed", default="0", help="Seed; a case follows from it, its kind and its number.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep inputs of faults here.")
@click.option("--tell", is_flag=True, help="Print the outcome of each case when it ends.")
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one per core]")
def main(
    names: tuple[str, ...], minutes: float | None, cases: int | None, first: int, seed: str,
    keep: Path | None, tell: bool, jobs: int | None,
) -> None:  # fmt: skip
    """Attack abl-mlx with damaged and hostile input, and print the outcomes.

    KIND is one or several of: gguf, safetensors, config, tokenizer, tokenizer_config, template,
    index, direction, prompts, adapter, undo, journal, ollama, hub, server; without KIND
    all of them are run. killer and full_disk are separate programs, which run only when named.

    Exit code 1 when there was a fault: a traceback, a hang, a crash, control characters in what is
    printed, more memory than twice the input and 200 MB, a partial output, a failure without a
    sentence.
    """
    faults = 0
    for name in [name for name in PROGRAMS if name in names]:
        faults += _program(name, minutes)
    kinds = [name for name in names if name not in PROGRAMS]
    if kinds or not names:
        jobs = jobs or os.cpu_count() or 1
        faults += _mutations(kinds, minutes, cases, first, seed, keep, tell, jobs)
    sys.exit(1 if faults else 0)


def _program(name: str, minutes: float | None) -> int:
    """Run another program of this package; 1 if it found a fault."""
    if importlib.util.find_spec(f"attacks.{name}") is None:
        raise click.UsageError(f"there is no attacks/{name}.py.")
    more = [] if minutes is None else ["--minutes", str(minutes)]
    return int(subprocess.run([sys.executable, "-m", f"attacks.{name}", *more]).returncode != 0)


def _mutations(
    kinds: list[str], minutes: float | None, cases: int | None, first: int, seed: str,
    keep: Path | None, tell: bool, jobs: int,
) -> int:  # fmt: skip
    """Run the cases and print the table; the number of faults."""
    with _hostile_server() as (root, serve):
        base = root / "base"
        ground.build(base)
        serve(base / "llama")
        ground.warm()
        from attacks.base import digest
        from attacks.kinds import KINDS as ATTACKS

        unknown = sorted(set(kinds) - set(ATTACKS))
        if unknown:
            raise click.UsageError(f"{unknown[0]} is none of {', '.join(ATTACKS)}.")
        before, start = digest(base), time.monotonic()
        end = start + 60 * (minutes or 1)
        chosen = kinds or list(ATTACKS)

        def tasks() -> Iterator[pool.Task]:
            numbers = range(first, first + cases) if cases else itertools.count(first)
            for number in numbers:
                for kind in chosen:
                    if cases is None and time.monotonic() > end:
                        return
                    yield kind, number, None

        found = _collect(pool.run(base, seed, tasks(), jobs), tell)
        seconds = time.monotonic() - start
        faults = _report(found, chosen, seconds, seed)
        if keep is not None and faults:
            again = [task for task, verdict in found if verdict.is_fault]
            kept = ((kind, number, str(keep / f"{kind}-{number}")) for kind, number, _ in again)
            for _ in pool.run(base, seed, iter(list(kept)), jobs):
                pass
            # Further files that the commands read.
            shutil.copytree(base, keep / "base", dirs_exist_ok=True)
        if digest(base) != before:
            click.echo("A sound input was changed by a command that read it.")
            faults += 1
        return faults


def _collect(
    results: Iterator[tuple[pool.Task, Verdict]], tell: bool
) -> list[tuple[pool.Task, Verdict]]:
    """The verdicts on all cases, or on those before an interrupt; a terminal shows their number."""
    found = []
    with contextlib.suppress(KeyboardInterrupt):
        for result in results:
            found.append(result)
            if tell:
                (kind, number, _), verdict = result
                click.echo(f"{kind} {number}: {verdict.kind} {verdict.detail!a}")
            elif sys.stderr.isatty() and len(found) % 50 == 0:
                print(f"\r{len(found)} cases", end="", file=sys.stderr)
    return found


def _report(
    found: list[tuple[pool.Task, Verdict]], kinds: list[str], seconds: float, seed: str
) -> int:
    counts = Counter((task[0], verdict.kind) for task, verdict in found)
    click.echo(f"{'':<17}" + "".join(f"{name:>10}" for name in KINDS))
    for kind in [*kinds, "all"]:
        row = [
            sum(
                count
                for (one, what), count in counts.items()
                if what == name and kind in (one, "all")
            )
            for name in KINDS
        ]
        click.echo(f"{kind:<17}" + "".join(f"{count:>10,}" for count in row))
    click.echo(f"{len(found):,} cases in {seconds:.0f} s, seed {seed}")
    faults = [(task, verdict) for task, verdict in found if verdict.kind not in GOOD]
    alike = Counter((verdict.kind, verdict.detail) for _, verdict in faults)
    for (what, detail), count in alike.most_common():
        kind, number, _ = next(
            task for task, verdict in faults if (verdict.kind, verdict.detail) == (what, detail)
        )
        click.echo(f"{count:>5} × {what}: {detail}  ({kind} {number})")
    return len(faults)


@contextlib.contextmanager
def _hostile_server() -> Iterator[tuple[Path, object]]:
    """A temporary folder, and a function that starts the server and tells libraries its address."""
    with tempfile.TemporaryDirectory(prefix="attacks-") as name, contextlib.ExitStack() as stack:
        root = Path(name)
        os.environ["HF_HOME"] = str(root / "hub")
        os.environ["TMPDIR"] = tempfile.tempdir = name

        def serve(folder: Path) -> None:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "attacks.hostile_server", str(folder)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            stack.callback(process.stdin.close)
            address = f"http://127.0.0.1:{int(process.stdout.readline())}"
            os.environ[network.ADDRESS] = address
            os.environ["HF_ENDPOINT"] = address

        yield root, serve


if __name__ == "__main__":
    main()
