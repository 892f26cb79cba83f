"""The audit of a file that is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from abl_mlx.commands import audit
from abl_mlx.commands.session import Steered
from abl_mlx.reports.page_audit import audit_page
from abl_mlx.reports.replay import command_line
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event
from convert.base.errors import UserError


def audited(_: Steered, body: Mapping[str, Any], keep: Callable[[str], str]) -> Iterator[Event]:
    """Yield the verdict on a model's weights, and the address of a page with its evidence.

    Args:
        body: a request with ``model``, named as on the command line.
        keep: takes a page and gives its address.
    """
    model = asked.text(body, "model").strip()
    if not model:
        raise UserError("name a model: a folder, a .gguf file or a Hugging Face id.")
    yield {"told": "reading the weights"}
    record = audit.audit(model)
    command = command_line(["audit", model], {}, {})
    yield {
        "verdict": record.verdict,
        "table": audit.table(record),
        "command": command,
        "page": keep(audit_page(record, command)),
    }
