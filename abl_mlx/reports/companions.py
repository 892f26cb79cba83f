"""Files beside an output: its record, its card and, for Ollama, its Modelfile."""

from __future__ import annotations

from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.outputs.provenance import without_home
from abl_mlx.outputs.staging import ADAPTERS, GGUF, Output, companions
from abl_mlx.records.edits import ApplyRecord, EvaluatedEdit, RunRecord, WrittenEdit
from abl_mlx.reports import induce_tables
from abl_mlx.reports.tables import card
from abl_mlx.support.strict_json import to_json
from convert.ollama.description import Beside, modelfile


def write_companions(
    output: Output,
    model: ModelFile,
    record: RunRecord | ApplyRecord,
    described: WrittenEdit,
) -> None:
    """Write the record, the card and, for a GGUF that is not split, the Modelfile of an output.

    A GGUF also gets copies of its source's projectors and draft model beside it.

    Args:
        model: the source model.
        described: the record's entry about this output.
    """
    record_name = companions(output.path)["record"].name
    places = companions(output.staged)
    places["record"].write_text(to_json(without_home(record)) + "\n", encoding="utf-8")
    if isinstance(record, RunRecord) and record.induced and isinstance(described, EvaluatedEdit):
        text = induce_tables.card(record, described, model.source.title, record_name)
    else:
        adapter = output.format in ADAPTERS
        text = card(record, described, model.source.title, record_name, adapter=adapter)
    places["card"].write_text(text, encoding="utf-8")
    beside = Beside()
    if output.format == GGUF:
        beside = model.further.copy(output.path, output.staged.parent)
    # A Modelfile names one file; older versions of Ollama accept only one.
    if "modelfile" in places and output.staged.is_file():
        text = modelfile(
            output.staged, model.folder, output.path.name, kept=model.source.ollama, beside=beside
        )
        places["modelfile"].write_text(text, encoding="utf-8")
