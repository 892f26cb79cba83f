"""Errors of the Hugging Face client, each in one sentence that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from convert.base.errors import UserError


def is_connection(error: Exception) -> bool:
    """Whether the hub client had no connection, by its own errors, or httpx's or requests'."""
    name, module = type(error).__name__, type(error).__module__
    return "onnect" in name or "imeout" in name or module.startswith("huggingface_hub")


_UNREACHED = (
    "{repository} is not a folder here, and Hugging Face could not be reached ({{}}): check the "
    "path or the connection."
)


def gated(name: str) -> UserError:
    """The error for a repository whose licence this user has not accepted."""
    return UserError(
        f"{name} asks for a licence to be accepted: do so on its Hugging Face page and "
        "log in with `hf auth login`."
    )


def no_access(name: str, status: int) -> UserError:
    """The error for a repository that this user may not read."""
    return UserError(
        f"{name}: Hugging Face does not let you have it (HTTP {status}): log in with "
        "`hf auth login`, with a token that may read it."
    )


def too_often(name: str, seconds: float | None = None) -> UserError:
    """The error for a server that wants fewer requests.

    Args:
        name: the repository.
        seconds: how long the server asks to wait, if it says so.
    """
    time = "a while" if seconds is None else f"{seconds:.0f} seconds"
    return UserError(
        f"{name}: Hugging Face got too many requests (HTTP 429) and asks to wait {time}: give the "
        "same command again then; what was read is kept. With a token (`hf auth login`) the limit "
        "is higher."
    )


def _not_had(repository: str, unreached: str, status: int | None) -> UserError:
    """The error for a repository that could not be downloaded.

    Args:
        repository: its id.
        unreached: a message with a place for the reason, for other reasons than a refused access.
        status: the HTTP status, if there was one.
    """
    from huggingface_hub import constants

    if status in (401, 403):
        return no_access(repository, status)
    if status == 429:
        return too_often(repository)
    if status is not None:
        return UserError(unreached.format(f"HTTP {status}"))
    offline = "HF_HUB_OFFLINE is set; " if constants.HF_HUB_OFFLINE else ""
    return UserError(unreached.format(f"{offline}it is not all in the cache"))


@contextmanager
def explained(repository: str, revision: str | None) -> Iterator[None]:
    """Context manager that turns errors of the Hugging Face client into one sentence each.

    Args:
        repository: OWNER/NAME.
        revision: a branch, a tag or a commit of it; None for its main branch.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = repository if revision is None else f"{repository}@{revision}"
    unreached = _UNREACHED.format(repository=name)
    try:
        yield
    except UserError:
        raise
    except HFValidationError:
        raise UserError(
            f"{name} is not a folder here, and no id that Hugging Face takes: check the spelling."
        ) from None
    except GatedRepoError:
        raise gated(name) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a folder here nor a model on Hugging Face: check the "
            "spelling, or log in with `hf auth login` if it is private."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{repository} on Hugging Face has no branch, tag or commit "
            f"{revision}: check the spelling, or leave out @{revision} for its "
            "main branch."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        # If the cache did not have it either, the hub's answer is the cause of the error.
        said = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        status = getattr(getattr(said, "response", None), "status_code", None)
        raise _not_had(name, unreached, status) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{name} could not be stored in the Hugging Face cache ({error.strerror}): "
                "make room or name another place in the environment variable HF_HOME."
            ) from None
        raise UserError(unreached.format(type(error).__name__)) from None
    except Exception as error:
        if is_connection(error):
            raise UserError(unreached.format(type(error).__name__)) from None
        # The client does not check answers, so a wrong one may raise anything.
        raise UserError(
            f"{name}: what {constants.ENDPOINT} answered is not what a hub of models answers "
            f"({type(error).__name__}): check for a proxy or a sign-in page between, or try again "
            "later."
        ) from None
