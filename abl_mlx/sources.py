"""What the user typed -> where the model is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from convert.errors import UserError

# What a text model needs; a repository may hold much else (PyTorch copies, pictures).
_PATTERNS = [
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model",
    "*.txt", "*.jsonl", "*.jinja", "LICENSE*", "README.md",
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        name: what the user typed: ``demo``, a Hugging Face id or a path.
        path: the folder with config.json and the safetensors files, or the GGUF file. Never
            written to.
        is_demo: whether it is the bundled demo model, which brings its own prompts.
        is_repository: whether ``name`` is a Hugging Face id.
    """

    name: str
    path: Path
    is_demo: bool = False
    is_repository: bool = False

    @property
    def title(self) -> str:
        """The model's name without owner or path, for a card or a GGUF's ``general.name``."""
        if self.is_demo:
            return self.name
        return (Path(self.name).name or self.path.resolve().name).removesuffix(".gguf")


def resolve_gguf(text: str) -> Source:
    """The GGUF file that ``text`` names; of a split model any part.

    Raises:
        UserError: when there is no such file.
    """
    path = Path(text).expanduser()
    if not path.is_file():
        raise UserError(f"{text} is not a file: give the path of a .gguf file.")
    return Source(text, path)


def resolve(text: str) -> Source:
    """Find the model that ``text`` names: ``demo``, a folder, or a Hugging Face id.

    A folder on disk goes before a Hugging Face id of the same name. A Hugging Face model is
    downloaded to (or found in) the usual Hugging Face cache.

    Raises:
        UserError: when there is no such model, or when it is of a kind not supported yet.
    """
    if text == "demo":
        from abl_mlx.demo import MODEL_PATH

        return Source("demo", MODEL_PATH, is_demo=True)
    path = Path(text).expanduser()
    if path.suffix == ".gguf" or text.startswith(("ollama:", "hf:")):
        raise UserError(
            f"{text}: a GGUF cannot be measured yet, only edited (`abl-mlx apply`) and evaluated "
            "(`abl-mlx eval`): name the MLX or Hugging Face folder (or id) that it was made from."
        )
    if path.is_dir():
        return Source(text, path)
    if path.exists():
        raise UserError(f"{text} is a file: name the folder of an MLX or Hugging Face model.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        return Source(text, _download(text), is_repository=True)
    raise UserError(
        f"{text} is not a folder here, and not a Hugging Face id such as "
        "mlx-community/SomeModel: check the spelling."
    )


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS))
    except GatedRepoError:
        raise UserError(
            f"{repository} asks for a licence to be accepted: do so on its Hugging Face page and "
            "log in with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repository} is neither a folder here nor a model on Hugging Face: check the "
            "spelling, or log in with `hf auth login` if it is private."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{repository} is not a folder here, and Hugging Face could not be reached "
            f"({type(error).__name__}): check the path or the connection."
        ) from None
    except Exception as error:  # httpx and requests errors, by the hub client's version
        if "onnect" in type(error).__name__ or "imeout" in type(error).__name__:
            raise UserError(
                f"{repository} is not a folder here, and Hugging Face could not be reached: "
                "check the path or the connection."
            ) from None
        raise
