"""The kinds of input that are attacked, by their names on the command line."""

from __future__ import annotations

from attacks import files, models, network
from attacks.case import Attack

KINDS: dict[str, Attack] = {
    "gguf": models.gguf,
    "safetensors": models.safetensors,
    "config": models.config,
    "tokenizer": models.tokenizer,
    "tokenizer_config": models.tokenizer_config,
    "template": models.template,
    "index": models.index,
    "direction": files.direction,
    "prompts": files.prompts,
    "adapter": files.adapter,
    "undo": files.undo,
    "journal": files.journal,
    "ollama": files.ollama,
    # Kinds that are read over a connection.
    "hub": network.hub,
    "server": network.server,
}
