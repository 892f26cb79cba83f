"""The tokenizer files of a model folder, parsed once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.base import json_text
from convert.base.hf_config import CONFIG, GENERATION
from convert.base.schema import OBJECT, Kind
from convert.tokenizers import template_files
from convert.tokenizers.hf_files import ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG
from convert.tokenizers.sentencepiece_file import Piece, read_sentencepiece
from convert.tokenizers.tokenizer_json import is_byte_level


class FolderFiles:
    """The tokenizer files of a folder, and what its other files say of special tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: dict[str, Any] | None = _json(folder / "tokenizer.json", TOKENIZER) or None
        self.config = _json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        self.model_config = _json(folder / "config.json", CONFIG)
        nested = self.model_config.get("text_config")
        if isinstance(nested, dict):
            self.model_config = {**nested, **self.model_config}
        self.generation = _json(folder / "generation_config.json", GENERATION)
        self.special_map = _json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
        model = folder / "tokenizer.model"
        self.pieces: list[Piece] = []
        self.dummy_prefix = True
        skip = self.tokenizer is not None and is_byte_level(self.tokenizer)
        if model.is_file() and not skip:
            self.pieces, self.dummy_prefix = read_sentencepiece(model)
        self.added = self._added()
        older = _json(folder / "chat_template.json", OBJECT)
        self.chat_templates = template_files.read(folder, self.config, older)

    def _added(self) -> dict[int, dict[str, Any]]:
        added: dict[int, dict[str, Any]] = {}
        for text, token_id in _json(self.folder / "added_tokens.json", ADDED_TOKENS).items():
            added[int(token_id)] = {"content": text, "special": False}
        for token_id, token in (self.config.get("added_tokens_decoder") or {}).items():
            added[int(token_id)] = dict(token)
        for token in (self.tokenizer or {}).get("added_tokens") or []:
            added[int(token["id"])] = dict(token)
        return added

    def role_text(self, role: str) -> str | None:
        """The text of the token configured as bos, eos, unk or pad; None where there is none."""
        for source in (self.config, self.special_map):
            value = source.get(f"{role}_token")
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str) and value:
                return value
        return None


def _json(path: Path, kind: Kind) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json_text.read(path, kind, mend="download it again", infinite=True)
    return found
