"""Pictures of every view of `abl-mlx studio demo` for docs/images: light, dark and as on a phone.

    python -m tools.screenshots docs/images

They need a Chromium. Whoever makes them looks at each: no text overlaps, no label is cut, and the
legends can be read.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from abl_mlx.inputs import prompts
from tests.support.browser import Browser

#: Name -> the width of the window and whether it is dark.
KINDS = {"light": (1000, False), "dark": (1000, True), "phone": (390, False)}

_REPLIES = "[...document.querySelectorAll('.message.assistant')]"


def _asked(browser: Browser, prompt: str) -> None:
    browser.wait("document.querySelector('#question') !== null")
    browser.value(f"document.querySelector('#question').value = {json.dumps(prompt)}")
    browser.value("document.querySelector('form.ask').requestSubmit()")
    browser.wait(f"{_REPLIES}.length === 2 && {_REPLIES}.every(one => one.dataset.verdict)")


def _submitted(browser: Browser, field: str, value: str, done: str) -> None:
    browser.wait(f"document.querySelector('{field}') !== null")
    browser.value(f"document.querySelector('{field}').value = {json.dumps(value)}")
    browser.value("document.querySelector('form').requestSubmit()")
    browser.wait(done)


def show(browser: Browser, url: str, view: str, kind: str, prompt: str) -> None:
    """Open a view and do in it what it is for."""
    width, dark = KINDS[kind]
    more = f"&prompt={quote(prompt)}" if view == "look" else ""
    browser.visit(url.replace("#/talk", f"#/{view}") + more, width=width, dark=dark)
    if view == "talk":
        _asked(browser, prompt)
    elif view == "look":
        browser.wait("document.querySelectorAll('canvas').length === 2")
    elif view == "find":
        browser.wait("document.querySelectorAll('.find figure').length > 4")
        _submitted(
            browser, "#trials", "40", "document.querySelectorAll('.find .mark[role]').length"
        )
        browser.wait("document.querySelector('.find progress').hidden", 600)
    elif view == "judge":
        _submitted(browser, "#limit", "2", "document.querySelector('progress').hidden === false")
        browser.wait("document.querySelector('progress').hidden")
    elif view == "check":
        _submitted(browser, "#model", "demo", "document.querySelector('iframe') !== null")
    else:
        browser.wait("document.querySelector('#output') !== null")
        browser.value("document.querySelector('#output').value = 'edited.gguf'")
        browser.value("document.querySelector('form button').click()")
        browser.wait("document.querySelector('pre') !== null")
    # In a window as high as the page, the report inside is drawn as well. It is of another origin,
    # so this page cannot see when.
    height = browser.value("document.documentElement.scrollHeight")
    browser.size(width, max(900, height))
    time.sleep(3 if view == "check" else 0.5)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    prompt = prompts.load_demo().harmful.test.prompts[0].text
    command = [sys.executable, "-m", "abl_mlx", "studio", "demo", "--no-open"]
    with (
        tempfile.TemporaryDirectory() as profile,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as studio,
    ):
        assert studio.stderr is not None
        found = next(one for line in studio.stderr if (one := re.search(r"(http\S+);", line)))
        browser = Browser(Path(profile))
        try:
            browser.visit(found[1])
            browser.wait("document.querySelector('.talk') !== null", 600)  # the model is loaded
            for kind in KINDS:
                for view in ("talk", "look", "find", "judge", "check", "write"):
                    show(browser, found[1], view, kind, prompt)
                    browser.picture(folder / f"studio-{view}-{kind}.webp")
        finally:
            browser.close()
            studio.kill()


if __name__ == "__main__":
    main()
