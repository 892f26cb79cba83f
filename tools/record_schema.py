"""Write docs/records.schema.json, the JSON Schema of every record that a command makes.

python -m tools.record_schema > docs/records.schema.json
"""

from __future__ import annotations

import json

from abl_mlx.records.schema import schema


def text() -> str:
    """The file's text."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(), end="")
