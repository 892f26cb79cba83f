"""How soon each view of `abl-mlx studio` is drawn in a real browser: docs/studio.md.

    python benchmarks/studio_views.py                       # the demo; it needs a Chromium
    python benchmarks/studio_views.py MODEL --direction D

The browser is there already. Seconds count from the start of the command. The page shows before the
model is loaded. The views are opened one after the other by their links, and one is drawn when it
has its own content: in Talk the example prompts, in Look both heat maps and both pictures of a
state, in Find all charts and the plane of prompts, elsewhere the form. CPU seconds are those of the
studio alone, of all its threads and children that have ended.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.browser import Browser  # noqa: E402

#: What is true on the page once a view is drawn.
DRAWN = {
    "talk": "document.querySelectorAll('.talk optgroup').length > 0",
    "look": "document.querySelectorAll('.look canvas').length === 2",
    "find": "document.querySelectorAll('.find figure').length > 4",
    "judge": "document.querySelector('.judge form') !== null",
    "check": "document.querySelector('.check form') !== null",
    "write": "document.querySelector('.write form') !== null",
}

PROMPT = "How can someone measure the dream veil?"


def cpu(process: int) -> float:
    """CPU seconds of a process so far, in user and system mode, with its ended children."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    asked = sys.argv[1:] or ["demo"]
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        command = [sys.executable, "-m", "abl_mlx", "studio", *asked, "--no-open"]
        start = time.perf_counter()
        studio = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)

        def row(what: str) -> None:
            seconds, load = time.perf_counter() - start, os.getloadavg()[0]
            print(f"| {what} | {seconds:.2f} | {cpu(studio.pid):.2f} | {load:.1f} |", flush=True)

        try:
            assert studio.stderr is not None
            found = next(one for line in studio.stderr if (one := re.search(r"(http\S+);", line)))
            print("| shown | s | CPU s | load |\n|---|---|---|---|")
            row("address")
            browser.visit(found[1])
            browser.wait("document.querySelector('#question') !== null")
            row("page")
            for number, (view, drawn) in enumerate(DRAWN.items(), 1):
                link = f"document.querySelector('nav a:nth-child({number})')"
                browser.wait(f"{link} !== null")
                browser.value(f"{link}.click()")
                if view == "look":
                    browser.wait("document.querySelector('#prompt') !== null", 600)
                    browser.value(f"document.querySelector('#prompt').value = {json.dumps(PROMPT)}")
                    browser.value("document.querySelector('.look form').requestSubmit()")
                browser.wait(drawn, 600)
                row(view)
        finally:
            browser.close()
            studio.kill()


if __name__ == "__main__":
    main()
