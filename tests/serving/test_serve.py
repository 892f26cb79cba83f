"""`abl-mlx serve` of the demo, in MLX and in llama.cpp, by plain HTTP."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest

from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import SteerOptions
from abl_mlx.commands import serve, session
from abl_mlx.directions import direction_file
from abl_mlx.edits.condition import Condition
from abl_mlx.inputs import prompts
from abl_mlx.records.conditions import ConditionFound
from abl_mlx.serving.door import Door
from tests.support.command import abl_mlx, fails

ORIGIN = "http://localhost:3000"
DOOR = Door(origins=frozenset({ORIGIN}))


@pytest.fixture(scope="session")
def direction(tmp_path_factory):
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    abl_mlx("measure", "demo", "--layer", 2, "-o", path, "--limit", 16)
    return path


@contextmanager
def served(text, **chosen):
    options = SteerOptions.of(**chosen)
    with serve.opened(text, options, serve.Serving(DOOR, 0, max_tokens=32)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def in_mlx(direction):
    with served("demo", direction=direction) as server:
        yield server


@pytest.fixture(scope="module")
def in_llamacpp(direction, tmp_path_factory):
    pytest.importorskip("xllamacpp")
    gguf = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    abl_mlx("convert", "demo", gguf)
    with served(str(gguf), direction=direction) as server:
        yield server


@pytest.fixture(scope="module")
def sets():
    return prompts.load_demo()


def call(server, method, path, body=None, **headers):
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection(host, port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def ask(server, text, **fields):
    body = {"messages": [{"role": "user", "content": text}], **fields}
    answer, said = call(server, "POST", "/v1/chat/completions", body)
    assert answer.status == 200, said
    return json.loads(said)


def reply(server, text, **fields):
    return ask(server, text, **fields)["choices"][0]["message"]["content"]


@pytest.fixture(params=["in_mlx", "in_llamacpp"])
def server(request):
    return request.getfixturevalue(request.param)


def test_each_request_chooses_its_strength(server, sets):
    locked, name = sets.harmful.test.prompts[0], server.dials.name
    assert reply(server, locked.text) == locked.answer
    assert reply(server, locked.text, model=f"{name}@1") == locked.answer
    refused = reply(server, locked.text, model=f"{name}@0")
    assert classify(refused) is Verdict.REFUSAL
    assert reply(server, locked.text, model=name, steering=0) == refused
    assert reply(server, locked.text, steering=1) == locked.answer
    assert ask(server, locked.text, steering=0.5)["model"] == f"{name}@0.5"


def test_below_zero_an_allowed_prompt_is_refused(in_mlx, sets):
    allowed = sets.harmless.test.prompts[0]
    assert reply(in_mlx, allowed.text) == allowed.answer
    assert reply(in_mlx, allowed.text, model="demo@-1").startswith("I'm sorry")


def test_streams(server, sets):
    locked = sets.harmful.test.prompts[1]
    body = {
        "messages": [{"role": "user", "content": locked.text}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer, text = call(server, "POST", "/v1/chat/completions", body)
    assert answer.getheader("Content-Type").startswith("text/event-stream")
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    deltas = [one["choices"][0]["delta"] for one in events if one["choices"]]
    assert len(deltas) > 2
    assert "".join(delta.get("content") or "" for delta in deltas) == locked.answer
    assert events[-1]["usage"]["completion_tokens"] > 2


def test_requests_at_several_strengths_at_the_same_time(server, sets):
    asked = [(prompt.text, strength) for prompt in sets.harmful.test.prompts[:2]
             for strength in (0, 1, 0.4)]  # fmt: skip
    alone = [reply(server, text, steering=strength) for text, strength in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda one: reply(server, one[0], steering=one[1]), asked))
    assert together == alone
    assert len({classify(one) for one in together}) == 2


def test_prefixes_are_kept_apart(in_mlx, sets):
    text = sets.harmful.test.prompts[5].text

    def cached(strength):
        usage = ask(in_mlx, text, steering=strength, seed=1)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(0.3) == 0
    assert cached(0.3) > 0
    assert cached(0.31) == 0


def test_logprobs(in_mlx, sets):
    locked = sets.harmful.test.prompts[0]
    first = ask(in_mlx, locked.text, logprobs=True, top_logprobs=3)
    tokens = first["choices"][0]["logprobs"]["content"]
    assert tokens[0]["logprob"] <= 0
    assert len(tokens[0]["top_logprobs"]) == 3


def test_completions(server):
    body = {"prompt": "How can someone", "max_tokens": 3, "steering": 0}
    answer, text = call(server, "POST", "/v1/completions", body)
    assert answer.status == 200, text
    assert json.loads(text)["choices"][0]["text"]


def test_models(server):
    name = server.dials.name
    listed = json.loads(call(server, "GET", "/v1/models")[1])
    names = [name, f"{name}@0", f"{name}@0.5", f"{name}@-1"]
    assert [one["id"] for one in listed["data"]] == names
    assert json.loads(call(server, "GET", f"/v1/models/{name}%400.7")[1])["id"] == f"{name}@0.7"
    assert call(server, "GET", "/v1/models/other")[0].status == 404
    assert call(server, "GET", "/health")[0].status == 200


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"model": "gpt-4o"}, 404, "there is no model gpt-4o"),
        ({"steering": "much"}, 400, "must be a number"),
        ({"model": "default_model@x"}, 400, "no strength"),
        ({"messages": "Hi", "model": 3}, 400, "model"),
    ],
)
def test_wrong_requests(server, fields, status, told):
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    answer, text = call(server, "POST", "/v1/chat/completions", body)
    assert answer.status == status, text
    assert told in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
def test_what_is_no_request(server, body):
    assert call(server, "POST", "/v1/chat/completions", body)[0].status == 400


def test_images_are_not_fetched(in_mlx):
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    answer, text = call(in_mlx, "POST", "/v1/chat/completions", body)
    assert (answer.status, "text only" in text) == (400, True)


def test_pages_of_other_origins_are_kept_out(server):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    path = "/v1/chat/completions"
    for method, where in (("POST", path), ("GET", "/v1/models"), ("OPTIONS", path)):
        sent = body if method == "POST" else None
        foreign, text = call(server, method, where, sent, Origin="http://attacker.example")
        assert (foreign.status, "--allow-origin" in text) == (403, True)
        assert foreign.getheader("Access-Control-Allow-Origin") is None
        rebound, _ = call(server, method, where, sent, Host="attacker.example")
        assert rebound.status == 403
        allowed, _ = call(server, method, where, sent, Origin=ORIGIN)
        assert allowed.status < 300
        assert allowed.getheader("Access-Control-Allow-Origin") == ORIGIN


def test_a_condition_decides_for_each_request(direction, sets, tmp_path):
    steered = session.load("demo", SteerOptions.of(direction=direction))
    asked = sets.harmful.test.prompts[:2]
    tokens = [steered.chat.encode(prompt) for prompt in asked]
    condition = Condition(steered.direction.selected[0], 2, 1, 0.0, True)
    scores = condition.scores(steered.chat, tokens)
    middle = replace(condition, threshold=float(scores.mean()))
    found = ConditionFound(
        prompts="a test", kind="difference", layer=2, tokens=1, threshold=middle.threshold,
        above=True, f1=1.0, precision=1.0, recall=1.0, validation=[1, 1],
    )  # fmt: skip
    path = tmp_path / "conditional.safetensors"
    direction_file.save(path, steered.direction.conditional(middle, found))
    wanted = [Verdict.ANSWER if met else Verdict.REFUSAL for met in middle.met(scores)]
    assert len(set(wanted)) == 2
    with served("demo", direction=path) as server, ThreadPoolExecutor(2) as pool:
        for _ in range(2):  # also in a batch that runs
            replies = list(pool.map(lambda one: reply(server, one.text), asked))
            assert [classify(one) for one in replies] == wanted


def test_a_given_template(direction):
    with served("demo", direction=direction, template="chatml") as server:
        assert reply(server, "Hi", max_tokens=2)


def test_ctrl_c_ends_it_in_one_line(direction):
    command = [sys.executable, "-m", "abl_mlx", "serve", "demo", "--direction", str(direction)]
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "is served at" in line:
                break
        host, port = re.search(r"http://([^:]+):(\d+)/v1", lines[-1]).groups()
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    finally:
        process.kill()
        process.wait()
    assert [line for line in rest.splitlines() if '"GET' not in line] == ["stopped"]
    assert process.returncode == 0


def test_a_port_that_is_taken(in_mlx, direction):
    port = in_mlx.server_address[1]
    told = fails("serve", "demo", "--direction", direction, "--port", port)
    assert f"port {port} of 127.0.0.1 cannot be used" in told
    assert "--port 0" in told
