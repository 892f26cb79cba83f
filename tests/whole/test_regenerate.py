"""Derived documents are what their programs write.

Those that take long are compared where their tables are tested (tests/models/test_zoo.py,
tests/models/test_batches.py, there by turns), so that nothing is computed twice.
"""

from pathlib import Path

import pytest

from tests.support.places import ROOT
from tools import regenerate
from tools.regenerate import DOCUMENTS, Document


@pytest.mark.parametrize(
    "document", [one for one in DOCUMENTS if one.seconds < 10], ids=lambda one: one.name
)
def test_it_is_what_its_program_writes(document: Document) -> None:
    assert (ROOT / document.name).read_text(encoding="utf-8") == document.text()


def test_every_page_that_says_it_is_generated_is_written() -> None:
    said = {
        f"docs/{page.name}"
        for page in (ROOT / "docs").glob("*.md")
        if "python -m tools.regenerate`" in page.read_text(encoding="utf-8")
    }
    assert said == {one.name for one in DOCUMENTS if one.name.endswith(".md")}


def test_check_tells_a_document_that_would_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Document("page.md", lambda: "new\n", 0)
    monkeypatch.setattr(regenerate, "DOCUMENTS", (page,))
    monkeypatch.setattr(regenerate, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("old\n")
    assert regenerate.main(["--check"]) == 1
    assert "page.md: would change" in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == "old\n"
    assert regenerate.main([]) == 0
    assert (tmp_path / "page.md").read_text() == "new\n"
    assert regenerate.main(["--check"]) == 0
    with pytest.raises(SystemExit):
        regenerate.main(["other.md"])
