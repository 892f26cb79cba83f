"""What a scorer is, and how one is found by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol, runtime_checkable

from abl_mlx.behaviour.scorers.language import LanguageDrift
from abl_mlx.behaviour.scorers.slop import Slop
from abl_mlx.behaviour.scorers.sycophancy import Sycophancy
from abl_mlx.choices import Scoring
from convert.base.errors import UserError

#: The group of entry points in which other packages name their scorers.
GROUP = "abl_mlx.scorers"


@runtime_checkable
class Scorer(Protocol):
    """A figure of a behaviour, from a model's replies to some prompts; lower is better.

    Attributes:
        name: of the behaviour, for tables.
        unit: of the figure, in words that follow it.
        prompts: the messages to ask.
        max_tokens: the longest reply, in tokens.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str: ...

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def max_tokens(self) -> int: ...

    def figure(self, replies: Sequence[str]) -> float:
        """The figure of the replies, one to each prompt in order, without thoughts."""
        ...


class MakesScorer(Protocol):
    """What an entry point names: a function, or a class, that makes a scorer."""

    def __call__(self, path: Path | None) -> Scorer:
        """The scorer.

        Args:
            path: a file with the scorer's own data; None for what it ships.

        Raises:
            UserError: when the file cannot be used.
        """
        ...


SHIPPED: Mapping[str, MakesScorer] = {
    "slop": Slop.of_file, "sycophancy": Sycophancy.of_file, "language": LanguageDrift.of_file,
}  # fmt: skip


def named(wanted: str, flag: str = "--scorer") -> list[Scorer]:
    """The scorers of a flag.

    Args:
        wanted: ``NAME`` or ``NAME:FILE``, and more of these after commas.
        flag: the flag, for messages.

    Raises:
        UserError: when there is no such scorer, or its file or package cannot be used.
    """
    found: dict[str, Scorer] = {}
    for part in wanted.split(","):
        name, _, file = part.strip().partition(":")
        made = _maker(name, flag)(Path(file).expanduser() if file else None)
        if not isinstance(made, Scorer) or not made.prompts:
            raise UserError(f"{flag} {name}: what its package makes is no scorer with prompts.")
        if name in found:
            raise UserError(f"{flag} names {name} twice: give it once.")
        found[name] = made
    return list(found.values())


def wanted(scoring: Scoring) -> list[Scorer]:
    """The scorers of ``--scorer``, and that of ``--search-for`` if it is not among them.

    Raises:
        UserError: when there is no such scorer, or its file or package cannot be used.
    """
    found = [] if scoring.scorer is None else named(scoring.scorer)
    aim = aim_of(scoring)
    known = {one.name for one in found}
    return found if aim is None or aim.name in known else [*found, aim]


def aim_of(scoring: Scoring) -> Scorer | None:
    """The scorer of ``--search-for``; None without it.

    Raises:
        UserError: when several are named, or it cannot be used.
    """
    if scoring.search_for is None:
        return None
    if len(found := named(scoring.search_for, "--search-for")) > 1:
        raise UserError("--search-for lowers one figure: name one scorer, and others by --scorer.")
    return found[0]


def _maker(name: str, flag: str) -> MakesScorer:
    if name in SHIPPED:
        return SHIPPED[name]
    others = {one.name: one for one in metadata.entry_points(group=GROUP)}
    if name not in others:
        known = ", ".join([*SHIPPED, *sorted(others)])
        shown = name if re.fullmatch(r"[\w.-]{1,60}", name) else repr(name[:60])
        raise UserError(f"{flag} {shown} is not known; there are {known}.")
    try:
        maker: MakesScorer = others[name].load()
    except Exception as error:
        raise UserError(
            f"{flag} {name}: its package cannot be loaded ({type(error).__name__}: {error})."
        ) from None
    return maker
