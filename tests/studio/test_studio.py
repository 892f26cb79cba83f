"""`abl-mlx studio demo`: its routes by plain HTTP, and its views in a browser."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import SteerOptions
from abl_mlx.inputs import prompts
from abl_mlx.studio import launch
from abl_mlx.studio.desk import Desk
from abl_mlx.support.console import progress
from tests.support import browser
from tests.support.command import abl_mlx

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

CHROMIUM = pytest.mark.skipif(browser.path() is None, reason="needs a Chromium")

#: A prompt that would run if it were taken for HTML.
HTML = '<img src=x onerror="window.ran=1"><b>bold</b>'


@pytest.fixture(scope="module")
def direction(tmp_path_factory):
    place = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    abl_mlx("measure", "demo", "--layer", 2, "-o", place, "--limit", 16)
    return place


@contextlib.contextmanager
def started(direction):
    command = [sys.executable, "-m", "abl_mlx", "studio", "demo", "--no-open", "--limit", "16"]
    process = subprocess.Popen(
        [*command, "--direction", str(direction)], stderr=subprocess.PIPE, text=True
    )
    try:
        line = next(line for line in process.stderr if "the studio is at" in line)
        url, port, token = re.search(
            r"(http://127\.0\.0\.1:(\d+)/#/talk\?token=(\S+));", line
        ).groups()
        found = SimpleNamespace(url=url, port=int(port), token=token, process=process)
        about = json.loads(call(found, "GET", "/api/about")[1])
        assert about["ready"] or about["doing"]
        while not json.loads(call(found, "GET", "/api/about")[1])["ready"]:
            time.sleep(0.1)
        yield found
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def studio(direction):
    with started(direction) as found:
        yield found
        found.process.send_signal(signal.SIGINT)
        rest = found.process.stderr.read()
        assert rest.splitlines()[-1] == "stopped"
        assert found.process.wait() == 0


def call(studio, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=60)
    sent = {"Authorization": f"Bearer {studio.token}", **headers}
    connection.request(method, path, None if body is None else json.dumps(body), sent)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def events(studio, name, **body):
    answer, text = call(studio, "POST", f"/api/{name}", body)
    assert answer.status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def talk(studio, content, **body):
    said = events(studio, "talk", messages=[{"role": "user", "content": content}], **body)
    return "".join(one.get("text", "") for one in said), said[-1]


@pytest.fixture(scope="module")
def sets():
    return prompts.load_demo()


# --- routes --------------------------------------------------------------------------------------


def test_talk_at_strengths(studio, sets):
    locked, allowed = sets.harmful.test.prompts[0], sets.harmless.test.prompts[0]
    assert talk(studio, locked.text)[0] == locked.answer
    refused, end = talk(studio, locked.text, strength=0)
    assert classify(refused) is Verdict.REFUSAL
    assert (end["verdict"], end["done"]) == ("refusal", "stop")
    assert talk(studio, allowed.text, strength=0)[0] == allowed.answer
    assert talk(studio, allowed.text, strength=-1)[0].startswith("I'm sorry")
    assert talk(studio, locked.text, layer=1, max_tokens=2)[1]["done"] == "length"


def test_replies_grow_side_by_side(studio, sets):
    asked = [(one.text, strength) for one in sets.harmful.test.prompts[:2] for strength in (0, 1)]
    alone = [talk(studio, text, strength=strength)[0] for text, strength in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: talk(studio, one[0], strength=one[1])[0], asked))
    assert together == alone


def test_a_page_that_goes_ends_its_reply(studio, sets):
    connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=60)
    messages = [{"role": "user", "content": "a"}]
    body = {"messages": messages, "temperature": 5, "max_tokens": 100_000}
    sent = {"Authorization": f"Bearer {studio.token}"}
    connection.request("POST", "/api/talk", json.dumps(body), sent)
    connection.getresponse().readline()
    connection.close()
    locked = sets.harmful.test.prompts[0]
    assert talk(studio, locked.text)[0] == locked.answer


def test_look(studio, sets):
    (found,) = events(studio, "look", prompt=sets.harmful.test.prompts[0].text)
    count = len(found["tokens"])
    for side in ("before", "after"):
        assert [len(row) for row in found[side]] == [count] * 4
    assert max(abs(one) for row in found["after"] for one in row) < 1e-3
    assert max(found["before"][2]) > 0.1
    (partly,) = events(studio, "look", prompt=sets.harmful.test.prompts[0].text, layers=[0])
    assert max(abs(one) for row in partly["after"] for one in row) > 0.01
    (state,) = events(studio, "token", prompt=sets.harmful.test.prompts[0].text, state=2)
    assert sum(state["before"]) == pytest.approx(found["before"][2][-1], abs=2e-3)
    assert len(state["before"]) == 256
    # Behind the last layer the lens is the model itself: the first token of its reply.
    reply = talk(studio, sets.harmful.test.prompts[0].text, strength=0, max_tokens=1)[0]
    assert state["lens"][-1]["before"][0][0] == reply


def test_find(studio, sets):
    (found,) = events(studio, "find")
    assert found["record"]["direction"]["layer"] == 2
    assert all(one["series"] for one in found["charts"])
    for more, layer in (({}, 2), ({"at": 1}, 1)):
        plane = events(studio, "clouds", **more)[-1]
        assert plane["layer"] == layer
        along = {name: [one["place"][0] for one in plane["points"] if one["set"] == name]
                 for name in ("harmful", "harmless")}  # fmt: skip
        assert np.mean(along["harmful"]) > np.mean(along["harmless"])
        # 0 is the middle between the means, which are rounded.
        assert sum(map(np.mean, along.values())) == pytest.approx(0, abs=1e-3)
        categories = {one.text: one.category for one in sets.harmful.test.prompts}
        assert all(categories[one["prompt"]] == one["category"] for one in plane["points"]
                   if one["set"] == "harmful")  # fmt: skip


def test_a_search_is_left_and_goes_on_and_its_points_reply(studio, sets):
    body = json.dumps({"trials": 7})
    connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=60)
    connection.request("POST", "/api/search", body, {"Authorization": f"Bearer {studio.token}"})
    lines, made = connection.getresponse(), []
    while len(made) < 2:
        made += json.loads(lines.readline()).get("trials", [])
    locked = sets.harmful.test.prompts[0]
    assert talk(studio, locked.text, max_tokens=3)[1]["done"] == "length"  # while it runs
    connection.close()
    *rest, last = [one for one in events(studio, "search", trials=7) if "told" not in one]
    trials = [trial for one in rest for trial in one["trials"]]
    assert trials[: len(made)] == made
    assert len(rest[0]["trials"]) >= len(made)
    assert len(trials) == 7
    assert last["ended"] == "all trials made"
    assert last["chosen"] in rest[-1]["front"]
    kl = {one["number"]: one["kl"] for one in last["replies"]}
    assert kl == {number: trials[number]["kl"] for number in kl}
    assert talk(studio, locked.text, point=last["chosen"])[0] == locked.answer
    assert "pick another" in talk(studio, "a", point=7)[1]["error"]


def test_judge_and_write(studio, tmp_path):
    rows = [one for one in events(studio, "judge", limit=2, max_tokens=16) if "prompt" in one]
    assert {one["set"] for one in rows} >= {"harmful", "harmless"}
    harmful = [one for one in rows if one["set"] == "harmful"]
    assert {one["before"]["verdict"] for one in harmful} == {"refusal"}
    assert {one["after"]["verdict"] for one in harmful} == {"answer"}
    assert all("cannot" in one["before"]["marker"] for one in harmful)
    assert {one["after"]["marker"] for one in harmful} == {None}
    output = tmp_path / "edited.lora.gguf"
    (told,) = events(studio, "write", output=str(output), strength=0.5)
    assert told["command"].startswith("abl-mlx apply ")
    assert "--strength 0.5" in told["command"]
    (other,) = events(studio, "write", output=str(output), layer=1, direction="other.safetensors")
    assert "other.safetensors" in other["command"]
    folder = tmp_path / "edited"
    *_, written = events(studio, "write", output=str(folder), write=True)
    assert written["written"][0]["output"] == str(folder)
    assert (folder / "config.json").exists()
    *_, verdict = events(studio, "check", model=str(folder))
    assert verdict["verdict"] in ("edited", "not edited", "cannot tell")
    page, text = call(studio, "GET", verdict["page"], Authorization="")
    assert page.status == 200
    assert "sandbox" in page.getheader("Content-Security-Policy")
    assert verdict["verdict"] in text


def test_a_dropped_file_is_checked_once(studio, tmp_path):
    abl_mlx("convert", "demo", tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    for name, raw, status in (("x.txt", b"x", 400), ("../model.gguf", whole, 200)):
        connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=60)
        sent = {"Authorization": f"Bearer {studio.token}"}
        connection.request("POST", f"/api/drop?name={name}", raw, sent)
        answer = connection.getresponse()
        assert answer.status == status
        said = json.loads(answer.read())
        connection.close()
    *_, verdict = events(studio, "check", dropped=said["dropped"])
    assert verdict["verdict"] == "not edited"
    for number, told in ((said["dropped"], "read already"), (99, "no such file"), ("0", "no such")):
        assert told in events(studio, "check", dropped=number)[-1]["error"]


@pytest.mark.slow
def test_small_tasks_before_and_after(studio):
    found = events(studio, "capability")[-1]["capability"]
    assert {count for *_, count in found.values()} == {20}
    assert all(before == after for before, after, _ in found.values())


@pytest.mark.parametrize(
    ("name", "body", "told"),
    [
        ("talk", {}, "messages must be"),
        ("talk", {"messages": [{"role": "system", "content": "x"}]}, "role"),
        ("look", {"prompt": " "}, "not empty"),
        ("look", {"prompt": "x", "strength": "much"}, "strength must be a number"),
        ("look", {"prompt": "x", "layers": [9]}, "0 to 3"),
        ("look", {"prompt": "x", "layer": 1.5}, "whole"),
        ("check", {"model": "/nonexistent"}, "/nonexistent"),
        ("write", {}, "output"),
        ("search", {"trials": 0}, "trials must be from 1"),
        ("nothing", {}, "no such work"),
    ],
)
def test_wrong_requests(studio, name, body, told):
    last = events(studio, name, **body)[-1]
    assert told in last["error"]


def test_who_is_let_in(studio):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert call(studio, "POST", "/api/talk", body, Authorization="Bearer wrong")[0].status == 401
    assert call(studio, "GET", "/api/about", Authorization="")[0].status == 401
    for headers in ({"Origin": "http://attacker.example"}, {"Host": "attacker.example"}):
        for method, path in (("POST", "/api/talk"), ("GET", "/"), ("GET", "/api/about")):
            sent = body if method == "POST" else None
            assert call(studio, method, path, sent, **headers)[0].status == 403
    page, _ = call(studio, "GET", "/", Authorization="")
    policy = page.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert call(studio, "GET", "/../app.py")[0].status == 404
    assert call(studio, "POST", "/api/talk", [1])[0].status == 400


# --- the views -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    made = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def opened(chromium, studio, view, **more):
    """A view, and what was asked for and complained about since it was opened."""
    extra = "".join(f"&{name}={value}" for name, value in more.items())
    chromium.visit(f"http://127.0.0.1:{studio.port}/#/{view}?token={studio.token}{extra}")
    chromium.wait("document.querySelector('main > div') !== null")


def nothing_from_elsewhere(chromium, studio):
    """No request to another origin, no error in the console, and nothing of a prompt that ran."""
    assert chromium.value("window.ran") is None
    here = (f"http://127.0.0.1:{studio.port}/", f"blob:http://127.0.0.1:{studio.port}/", "data:")
    for one in chromium.events:
        asked = one.get("params", {})
        if one.get("method") == "Network.requestWillBeSent":
            assert asked["request"]["url"].startswith(here)
        assert one.get("method") not in ("Runtime.exceptionThrown", "Log.entryAdded"), asked


def ask(chromium, text):
    chromium.value(f"document.querySelector('#question').value = {json.dumps(text)}")
    chromium.value("document.querySelector('form.ask').requestSubmit()")


REPLIES = "[...document.querySelectorAll('.message.assistant')]"
ENDED = f"{REPLIES}.length === 2 && {REPLIES}.every(one => one.dataset.verdict)"


@CHROMIUM
def test_the_slider_changes_a_refusal_to_an_answer(studio, chromium, sets):
    locked = sets.harmful.test.prompts[0]
    opened(chromium, studio, "talk")
    move = "(s => {{ s.value = {}; s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change')) }})(document.querySelector('#strength'))"  # noqa: E501
    chromium.value(move.format(0))
    ask(chromium, locked.text)
    chromium.wait(ENDED)
    text = f"{REPLIES}.map(one => one.querySelector('.text').textContent)"
    before, after = chromium.value(text)
    assert classify(before) is Verdict.REFUSAL
    assert after == before
    chromium.value(move.format(1))
    chromium.wait(f"{text}[1] === {json.dumps(locked.answer)}")
    assert chromium.value(text)[0] == before
    nothing_from_elsewhere(chromium, studio)


@CHROMIUM
def test_a_prompt_with_html_stays_text(studio, chromium):
    opened(chromium, studio, "talk")
    ask(chromium, HTML)
    chromium.wait(ENDED)
    assert chromium.value("document.querySelector('.message.user .text').textContent") == HTML
    assert chromium.value("document.querySelectorAll('.message img, .message b').length") == 0
    nothing_from_elsewhere(chromium, studio)


@CHROMIUM
def test_look_by_keyboard(studio, chromium, sets):
    opened(chromium, studio, "look", prompt=sets.harmful.test.prompts[0].text.replace(" ", "%20"))
    chromium.wait("document.querySelectorAll('.heat').length === 2")
    chromium.wait("document.querySelectorAll('canvas').length === 2")
    assert "after layer 3" in chromium.value("document.querySelector('.state h3').textContent")
    chromium.value("document.querySelector('.heat td[tabindex=\"0\"]').focus()")
    for key in ("ArrowDown", "ArrowLeft", "Enter"):
        for kind in ("keyDown", "keyUp"):
            chromium("Input.dispatchKeyEvent", type=kind, key=key, code=key)
    chromium.wait("document.querySelector('.state h3').textContent.includes('after layer 2')")
    nothing_from_elsewhere(chromium, studio)


#: Roles of what can be operated or looked at, which screen readers call by its name.
NAMED = {"button", "checkbox", "combobox", "image", "link", "progressbar", "slider", "spinbutton",
         "textbox"}  # fmt: skip


def unnamed(chromium):
    """Roles and values of elements that screen readers have no name for."""
    nodes = chromium("Accessibility.getFullAXTree")["nodes"]
    return [
        (one["role"]["value"], one.get("value"))
        for one in nodes
        if not one["ignored"]
        and one["role"]["value"].lower().removesuffix("menubutton") in NAMED
        and not one.get("name", {}).get("value")
    ]


@CHROMIUM
@pytest.mark.parametrize("view", ["talk", "look", "find", "judge", "check", "write"])
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (390, True)])
def test_views_fit(studio, chromium, view, width, dark):
    url = f"http://127.0.0.1:{studio.port}/#/{view}?token={studio.token}"
    chromium.visit(url, width=width, dark=dark)
    chromium.wait("document.querySelector('main > div > *') !== null")
    assert chromium.value("document.documentElement.scrollWidth") <= width
    assert unnamed(chromium) == []
    nothing_from_elsewhere(chromium, studio)


@CHROMIUM
@pytest.mark.slow
def test_a_search_in_the_browser(studio, chromium):
    opened(chromium, studio, "find")
    chromium.wait("document.querySelectorAll('.find .hollow .mark').length > 8")
    assert "harmless: " in chromium.value("document.querySelectorAll('.find section')[1].innerText")
    chromium.value("document.querySelector('#trials').value = 1000")
    chromium.value("document.querySelector('.find form').requestSubmit()")
    chromium.wait("document.querySelectorAll('.find .mark[role=button]').length > 1")
    stop = "[...document.querySelectorAll('.find form button')][1]"
    chromium.value(f"{stop}.click()")
    chromium.wait(f"{stop}.disabled")
    assert "Resume" in chromium.value("document.querySelector('.find form').innerText")
    chromium.value("document.querySelector('.find .mark[role=button]').focus()")
    for kind in ("keyDown", "keyUp"):
        chromium("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter")
    chromium.wait("document.querySelector('.find caption + thead') !== null")
    chromium.value("[...document.querySelectorAll('button')].at(-1).click()")
    chromium.wait("document.querySelector('.talk') !== null")
    told = chromium.value("document.querySelector('.edit').innerText")
    assert "of the search" in told
    nothing_from_elsewhere(chromium, studio)


@CHROMIUM
def test_judge_in_the_browser(studio, chromium):
    opened(chromium, studio, "judge")
    chromium.value("document.querySelector('#limit').value = 1")
    chromium.value("document.querySelector('form').requestSubmit()")
    chromium.wait("document.querySelectorAll('.judge tbody td.text').length >= 2")
    assert "1 of 1" in chromium.value("document.querySelector('.judge table').textContent")
    nothing_from_elsewhere(chromium, studio)


@CHROMIUM
def test_a_wrong_token_is_told(studio, chromium):
    chromium.visit(f"http://127.0.0.1:{studio.port}/#/talk?token=wrong")
    said = chromium.wait("document.querySelector('.error')?.textContent")
    assert "The token is wrong" in said


@CHROMIUM
def test_the_page_shows_before_the_model_is_loaded(chromium):
    with (
        launch.served(Desk(), "demo", SteerOptions(), 0) as (place, *_),
        progress(8, "capture") as bar,
    ):
        bar.update(2)
        chromium.visit(place.url)
        chromium.wait("document.querySelector('.talk #question') !== null")
        told = chromium.value("document.querySelector('header').innerText")
        assert "demo is being loaded" in told
        assert "capture" in told
        assert chromium.value("document.querySelector('header progress').position") == 0.25
        chromium.value("document.querySelector('nav a:nth-child(3)').click()")
        chromium.wait("document.querySelector('.find #trials') !== null")
        chromium.visit("about:blank")


@CHROMIUM
@pytest.mark.slow
def test_two_tabs_have_conversations_of_their_own(studio, chromium, sets, tmp_path):
    asked = [sets.harmful.test.prompts[0], sets.harmful.test.prompts[1]]
    other = browser.Browser(tmp_path)
    try:
        for tab, prompt in zip((chromium, other), asked, strict=True):
            opened(tab, studio, "talk")
            ask(tab, prompt.text)
        for tab, prompt in zip((chromium, other), asked, strict=True):
            tab.wait(ENDED)
            texts = tab.value(f"{REPLIES}.map(one => one.querySelector('.text').textContent)")
            assert texts[1] == prompt.answer
            nothing_from_elsewhere(tab, studio)
    finally:
        other.close()


@CHROMIUM
@pytest.mark.slow
def test_a_server_that_is_killed_while_it_replies(direction, chromium):
    with started(direction) as studio:
        opened(chromium, studio, "talk")
        chromium.value("document.querySelector('#temperature').value = 5")
        chromium.value("document.querySelector('#longest').value = 100000")
        ask(chromium, "a")
        chromium.wait(f"{REPLIES}.length === 2 && {REPLIES}[1].textContent.length > 40")
        studio.process.kill()
        chromium.wait(f"{REPLIES}.every(one => one.querySelector('.error'))")
        assert "The server does not answer" in chromium.value(f"{REPLIES}[1].textContent")
        assert not chromium.value(f"{REPLIES}.some(one => one.hasAttribute('aria-busy'))")
