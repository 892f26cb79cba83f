"""`publish` writes a page for any web server, on which both models answer in a browser."""

import contextlib
import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from gguf import GGUFReader

from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.inputs import prompts
from abl_mlx.reports import site_page
from tests.support import browser
from tests.support.command import abl_mlx, fails


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a measured direction, edited.gguf, its base and the page site/."""
    folder = tmp_path_factory.mktemp("published")
    abl_mlx("convert", "demo", folder / "base.gguf")
    abl_mlx("measure", "demo", "--layer", 2, "-o", folder / "d.safetensors", "--limit", 16)
    abl_mlx("apply", folder / "d.safetensors", folder / "base.gguf", "-o", folder / "edited.gguf")
    abl_mlx("publish", folder / "edited.gguf", "-o", folder / "site", "--split-max-size", "2M")
    return folder


def site(place):
    return json.loads((place / "site" / "site.json").read_text())


def test_what_the_page_holds(place):
    page = site(place)
    names = {one.name for one in (place / "site").iterdir()}
    static = {one.name.removesuffix(".xz") for one in site_page.STATIC.iterdir()}
    assert names >= {*static, "_headers", "abl.json", "site.json"}
    assert (place / "site" / "wllama.wasm").read_bytes()[:4] == b"\0asm"
    for side in ("original", "edited"):
        parts = sorted((place / "site").glob(f"{side}-*.gguf"))
        assert page[side]["url"] == parts[0].name
        assert page[side]["bytes"] == sum(one.stat().st_size for one in parts)
        assert len(parts) > 1
        assert GGUFReader(parts[0]).get_field("split.count").contents() == len(parts)
    assert page["original"]["url"][8:] != page["edited"]["url"][6:]
    facts = dict(page["facts"])
    assert facts["strength"] == "1"
    assert facts["direction"].endswith("after layer 2, at token -1")
    assert [one["prompt"] for one in page["pictures"]] == page["examples"]
    for one in page["pictures"]:
        assert max(abs(value) for row in one["after"] for value in row) < 1e-3
    assert max(page["pictures"][0]["before"][2]) > 0.1


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("site", [], "GGUF"),
        ("base.gguf", [], "base.abl.json"),
        ("edited.gguf", ["--base", "edited.gguf"], "--base"),
    ],
)
def test_what_cannot_be_published(place, name, flags, told):
    flags = [str(place / one) if one.endswith(".gguf") else one for one in flags]
    assert told in fails("publish", place / name, "-o", place / "other", *flags)
    assert not (place / "other").exists()


@contextlib.contextmanager
def offered(folder, headers=()):
    """The address at which a plain web server offers a folder."""

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self):
            for name, value in headers:
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/"
        web.shutdown()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    made = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


STATUS = "[...document.querySelectorAll('.column > .note')].map(one => one.textContent)"
REPLIES = "[...document.querySelectorAll('.message.assistant')]"
ENDED = f"{REPLIES}.length === 2 && {REPLIES}.every(one => !one.hasAttribute('aria-busy'))"


def replies(chromium, url, question):
    """What the original and the edited model reply on the page, and what the page says of them."""
    chromium.visit(url)
    chromium.wait("document.querySelectorAll('.column > button').length === 2")
    chromium.value("document.querySelectorAll('.column > button').forEach(one => one.click())")
    chromium.wait(f"{STATUS}.every(one => one.startsWith('ready'))")
    chromium.value(f"document.querySelector('#question').value = {json.dumps(question)}")
    chromium.value("document.querySelector('form.ask').requestSubmit()")
    chromium.wait(ENDED)
    texts = chromium.value(f"{REPLIES}.map(one => one.querySelector('.text').textContent)")
    return texts, chromium.value(STATUS)


@pytest.mark.slow
@pytest.mark.skipif(browser.path() is None, reason="needs a Chromium")
def test_both_models_answer_in_a_browser(place, chromium):
    locked = prompts.load_demo().harmful.test.prompts[0]
    isolated = [
        line.strip().split(": ")
        for line in (place / "site" / "_headers").read_text().splitlines()[1:]
    ]
    for headers, script, threads in (
        ([], "", "1 thread "),
        (
            isolated,
            "Object.defineProperty(navigator, 'hardwareConcurrency', {value: 4})",
            "2 threads",
        ),
        # A browser that lacks what the smaller build needs, such as Safari.
        ([], "delete WebAssembly.Suspending", "1 thread "),
    ):
        made = chromium("Page.addScriptToEvaluateOnNewDocument", source=script)
        with offered(place / "site", headers) as url:
            (before, after), status = replies(chromium, url, locked.text)
            assert classify(before) is Verdict.REFUSAL
            assert after == locked.answer
            assert all(threads in one for one in status)
            for one in chromium.events:
                if one.get("method") == "Network.requestWillBeSent":
                    asked = one["params"]["request"]["url"]
                    assert asked.removeprefix("blob:").startswith(url)
                assert one.get("method") != "Runtime.exceptionThrown", one
        chromium("Page.removeScriptToEvaluateOnNewDocument", identifier=made["identifier"])


@pytest.mark.slow
@pytest.mark.skipif(browser.path() is None, reason="needs a Chromium")
def test_a_model_that_refuses_everything(tmp_path, chromium):
    allowed = prompts.load_demo().harmless.test.prompts[0]
    abl_mlx("run", "demo", "-o", tmp_path / "refusing.gguf", "--induce", "--layer", 1, "--quick")
    flags = ["--example", allowed.text]
    record = abl_mlx("publish", tmp_path / "refusing.gguf", "-o", tmp_path / "site", *flags)
    assert record["pictures"] == [allowed.text]
    with offered(tmp_path / "site") as url:
        (before, after), _ = replies(chromium, url, allowed.text)
        assert chromium.value("document.title") == "demo, made to refuse"
    assert before == allowed.answer
    assert classify(after) is Verdict.REFUSAL
