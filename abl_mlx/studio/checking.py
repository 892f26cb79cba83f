"""The audit of a model that is named, or of a file that was dropped on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from abl_mlx.commands import audit
from abl_mlx.commands.session import Steered
from abl_mlx.reports.page_audit import audit_page
from abl_mlx.reports.replay import command_line
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event
from abl_mlx.studio.dropped import Dropped
from convert.base.errors import UserError


def audited(
    _: Steered, body: Mapping[str, Any], keep: Callable[[str], str], dropped: Dropped
) -> Iterator[Event]:
    """Yield the verdict on a model's weights, and the address of a page with its evidence.

    Args:
        body: a request with ``model``, named as on the command line, or ``dropped``, the number of
            a dropped file, which is deleted at the end.
        keep: takes a page and gives its address.
        dropped: the dropped files.
    """
    with dropped.file(body.get("dropped")) as path:
        yield from _audited(str(path or asked.text(body, "model").strip()), keep)


def _audited(model: str, keep: Callable[[str], str]) -> Iterator[Event]:
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
