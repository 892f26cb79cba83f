"""What of an output is published on Hugging Face, and the upload.

Only files that this project wrote are taken, and those of the model itself: never replies that were
saved beside it, and nothing else that lies in the folder of a GGUF.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from abl_mlx.outputs import staging
from convert.adapters import is_mlx
from convert.base.errors import UserError
from convert.gguf.file import GgufSource, metadata
from convert.gguf.parts import whole_name
from convert.gguf.projector import is_projector

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

#: Files of a model's folder that are published; others are named and left out.
_OF_A_FOLDER = (
    "*.safetensors", "*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "*.md",
    "LICENSE*", "NOTICE*", "report.html",
)  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """What is published of an output.

    Attributes:
        files: (path here, name in the repository), sorted by name.
        left_out: names of files in an output's folder that are not published.
    """

    files: tuple[tuple[Path, str], ...]
    left_out: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path, _ in self.files)


def check_repository(text: str) -> None:
    """Check that a text is OWNER/NAME.

    Raises:
        UserError: when it is not.
    """
    if not _REPOSITORY.fullmatch(text) or ".." in text or "--" in text:
        raise UserError(f"{text}: write OWNER/NAME, the repository on Hugging Face.")


def files_of(output: Path) -> Upload:
    """The files of an output that `run` or `apply` wrote.

    Raises:
        UserError: when there is no such output, or no card and record of an edit with it.
    """
    if output.is_dir():
        upload = _of_folder(output)
    elif output.is_file():
        upload = _of_file(output)
    else:
        raise UserError(
            f"{output} is not here: name a folder or a file that `run` or `apply` wrote."
        )
    names = {name for _, name in upload.files}
    for needed in ("README.md", "abl.json"):
        if needed not in names:
            raise UserError(
                f"{output} has no {needed} of abl-mlx with it, which says how it was edited: name "
                "an output of `run` or `apply` with the files that were written beside it."
            )
    return upload


def _of_folder(folder: Path) -> Upload:
    taken, left = [], []
    for path in sorted(folder.iterdir()):
        fits = any(path.match(pattern) for pattern in _OF_A_FOLDER)
        if path.is_file() and fits and not path.name.startswith("."):
            taken.append((path, path.name))
        else:
            left.append(path.name)
    return Upload(tuple(taken), tuple(left))


def _of_file(output: Path) -> Upload:
    if is_mlx(output) or staging.format_of(output) == staging.FOLDER:
        raise UserError(f"{output} is neither a folder nor a .gguf: name what `run` wrote.")
    with GgufSource(output) as opened:
        parts = [Path(part) for part in opened.parts]
    whole = whole_name(output)
    found = [(part, part.name) for part in parts]
    places = {**staging.companions(whole), "report": staging.report_place(whole)}
    names = {"card": "README.md", "record": "abl.json", "modelfile": "Modelfile"}
    for what, place in places.items():
        if place.is_file():
            found.append((place, names.get(what, "report.html")))
    for place in sorted(whole.parent.glob(f"mmproj*-{glob.escape(whole.stem)}.gguf")):
        if is_projector(metadata(place)):
            found.append((place, place.name))
    return Upload(tuple(sorted(found, key=lambda pair: pair[1])))


def upload(files: Sequence[tuple[Path, str]], repository: str, *, private: bool) -> str:
    """Upload files in one commit, and make the repository if it is not there.

    Args:
        files: (path here, name in the repository).
        repository: OWNER/NAME.
        private: whether a new repository can be seen by its owner alone. One that is there stays
            as it is.

    Returns:
        The address of the commit.

    Raises:
        UserError: when Hugging Face is not reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _explained(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, str(path)) for path, name in files],
            commit_message="Upload a model edited by abl-mlx",
        )
    return str(commit.commit_url)


def address(repository: str) -> str:
    """The address of a repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Context manager that turns errors of the Hugging Face client into one sentence each."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("you are not logged in to Hugging Face: run `hf auth login`.") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: unset it to upload.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"{repository}: Hugging Face does not let you write it (HTTP {status}): log in "
                "with `hf auth login`, with a token that may write."
            ) from None
        raise UserError(
            f"{repository}: Hugging Face did not take the upload (HTTP {status}): try again later."
        ) from None
    except UserError:
        raise
    except Exception as error:
        # The client raises errors of its HTTP library, of its own, and of what it makes of wrong
        # answers.
        raise UserError(
            f"{repository}: the upload to Hugging Face failed ({type(error).__name__}): check the "
            "connection and try again. What was uploaded whole is not uploaded again."
        ) from None
