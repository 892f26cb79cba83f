"""The journal of a search: a file with its trials, from which a later search continues."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from abl_mlx.choices import Measuring
from abl_mlx.models import given_template
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSets
from abl_mlx.search.screening import Screened, Trial
from abl_mlx.search.space import Parameters, Space
from abl_mlx.support import ranks
from abl_mlx.support.arrays import parameters
from convert.base import atomic, locks
from convert.base.errors import UserError

_STUDY = "abl-mlx search"


class Journal:
    """The trials so far, in an Optuna journal file from which a later search continues.

    Raises:
        UserError: when the file is no journal, or the journal of another search.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, str]):
        self._optuna, self.path = optuna_quietly(), path
        if path is not None and ranks.size() > 1:
            path = self.path = _same_on_every_rank(path)
        if path is not None and path.is_dir():
            raise self._damaged
        self._held = None if path is None else _hold(path)
        try:
            self._study = self._open(identity)
        except BaseException as error:
            self.close()
            # Optuna does not check a journal that it reads, so a damaged one may raise anything.
            if isinstance(error, Exception) and not isinstance(error, UserError | OSError):
                raise self._damaged from None
            raise

    def _open(self, identity: Mapping[str, str]) -> Any:
        study = self._optuna.create_study(
            study_name=_STUDY,
            storage=self._storage(),
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        known = study.user_attrs.get("identity")
        if known is None:
            study.set_user_attr("identity", dict(identity))
        elif known != dict(identity):
            other = [name for name in identity if known.get(name) != identity[name]]
            raise UserError(
                f"{self.path} is the journal of a search with another {' and '.join(other)}: "
                "delete it, or name another file with --search-journal."
            )
        return study

    def _storage(self) -> Any:
        storages = self._optuna.storages
        if self.path is None:
            return storages.InMemoryStorage()
        if not _mend(self.path):
            raise self._damaged
        return storages.JournalStorage(storages.journal.JournalFileBackend(str(self.path)))

    @property
    def _damaged(self) -> UserError:
        return UserError(
            f"{self.path} is not a search journal: name another file with --search-journal."
        )

    def close(self) -> None:
        """Close the file and release its lock."""
        if self._held is not None:
            self._held.close()

    def trials(self, distributions: Mapping[str, Any]) -> list[tuple[Any, Trial]]:
        """All finished trials, each with Optuna's record of it.

        Args:
            distributions: the parameters' distributions, as given to `add`.

        Raises:
            UserError: when another program changed the file.
        """
        try:
            found = []
            for record in self._study.get_trials(deepcopy=False):
                if record.distributions != distributions or not record.state.is_finished():
                    raise ValueError
                found.append((record, _trial_of(record)))
                self._optuna.create_study(directions=["minimize", "minimize"]).add_trial(record)
            return found
        except Exception:
            raise self._damaged from None

    def add(self, trial: Trial, distributions: Mapping[str, Any]) -> Any:
        """Write a trial atomically, and return Optuna's record of it."""
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


def _same_on_every_rank(path: Path) -> Path:
    """Where this rank keeps its trials: rank 0 in the journal, the others in a copy of it."""
    text = path.read_text(encoding="utf-8") if ranks.rank() == 0 and path.is_file() else ""
    text = ranks.first("the search journal", text)
    if ranks.rank():
        path = atomic.there(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def _hold(path: Path) -> BinaryIO:
    """Open or create the file, and lock it against other searches.

    Raises:
        UserError: when the file cannot be written, or another search has locked it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "ab")  # noqa: SIM115 - open as long as the journal is
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        if locks.hold(stream.fileno()):
            # Optuna's own lock, a link beside the file, was left by a killed process.
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    except locks.Busy:
        stream.close()
        raise UserError(
            f"{path} is in use by another search: wait for it, or name another file with "
            "--search-journal."
        ) from None
    return stream


def _trial_of(record: Any) -> Trial:
    """The trial in an Optuna record.

    Raises:
        Exception: of any kind, when the record holds no trial.
    """
    known = record.user_attrs
    refusal, kl = map(_finite, record.values)
    refused, (early_refusal, early_kl) = _finite(known["refused"]), map(_finite, known["early"])
    whole, tokens = known["whole"], known["tokens"]
    if type(whole) is not bool or type(tokens) is not int:
        raise TypeError
    screened = Screened(refusal, refused, kl, (early_refusal, early_kl), whole, tokens)
    return Trial(dict(record.params), screened)


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError
    return value


def _mend(path: Path) -> bool:
    """Whether a file is a journal; removes a last line that a killed process left unfinished."""
    with open(path, "rb+") as stream:
        content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        first = whole.split(b"\n", 1)[0] or content
        if first and not first.startswith(b'{"op_code"'):
            return False
        if whole != content:
            stream.truncate(len(whole))
    return True


def optuna_quietly() -> Any:
    """Optuna with its own logging switched off.

    Raises:
        UserError: when it is not installed.
    """
    # Optuna keeps the errors of its optional imports. These refer to the frames from which Optuna
    # was imported, and so to the model, which could then not be released. In a new thread there are
    # no such frames.
    with ThreadPoolExecutor(1) as pool:
        try:
            optuna = pool.submit(import_module, "optuna").result()
        except ImportError:
            raise UserError("--search needs Optuna: pip install 'abl-mlx[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def identity(
    chat: ChatModel,
    sets: EncodedSets,
    space: Space,
    how: Measuring,
    starts: Sequence[Parameters] = (),
) -> dict[str, str]:
    """Hashes of everything on which trials depend: the model, the prompts, the space, the seed, and
    the parameters of edits to start from."""
    model = hashlib.sha256()
    for name, value in sorted(parameters(chat.model)):
        piece = value.reshape(-1)[:64]
        if mx.issubdtype(value.dtype, mx.floating):
            piece = piece.astype(mx.float32)
        model.update(f"{name} {value.shape} {value.dtype} {piece.tolist()}".encode())
    asked = {name: [name, space.distributions()[name]._asdict()] for name in space.distributions()}
    edited = [
        1.0,  # edits are tried at strength 1, whatever strength is written
        sorted(how.editing.layers or ()),
        how.finding.method,
        str(how.given.direction),
        how.finding.layer,
        how.finding.position,
        how.finding.max_kl,
    ]
    if chat.given_template is not None:
        edited.append(given_template.entry(chat.given_template))

    if space.profile is not None:
        edited.append(dict(space.profile))
    if how.scoring.search_for is not None:
        edited.append(how.scoring.search_for)
    if starts:
        edited.append([dict(one) for one in starts])

    def of(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]

    return {
        "model": model.hexdigest()[:16],
        "prompts": of(sets.sha256),
        "space or options": of([asked, edited]),
        "seed": str(how.prompting.seed),
    }
