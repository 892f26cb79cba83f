"""The README's example runs, and it is short. Its commands and links: test_docs.py."""

import contextlib
import io
import re

from tests.support.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_library_example_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    before, after, verdict = printed.getvalue().strip().splitlines()
    assert before.count("I'm sorry") == 3
    assert "I'm sorry" not in after
    assert verdict == "edited"
    assert (tmp_path / "demo-by-hand" / "config.json").is_file()


def test_it_is_short():
    assert len(README.splitlines()) <= 160
    (commands,) = [block for block in blocks("sh") if "abl-mlx show" in block]
    assert len(commands.strip().splitlines()) == 10
