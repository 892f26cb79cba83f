"""Derived documents are what their programs write."""

from tests.support.places import ROOT
from tools import cli_reference


def test_the_cli_reference_is_what_help_says() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == cli_reference.document()
