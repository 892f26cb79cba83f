"""Ollama: its store of models read, Modelfiles written, `ollama create` run."""

import json
import math
import re
import shlex
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.base.errors import UserError
from convert.ollama import store as ollama_store
from convert.ollama.client import check_create, ollama_create
from convert.ollama.description import modelfile
from convert.ollama.modelfile import Modelfile
from convert.ollama.store import OllamaModel, OllamaName, contains, find, parse_name, stores
from tests.support.ollama_tools import Store, as_a_stranger, open_folder, read_modelfile

GGUF = b"GGUF and the rest of a model"
LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def store(tmp_path, monkeypatch):
    made = Store(tmp_path / "store")
    monkeypatch.setenv("OLLAMA_MODELS", str(made.path))
    return made


def refused(text):
    with pytest.raises(UserError) as caught:
        find(text)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("text", "parts", "shown", "title"),
    [
        ("llama3", (*LIBRARY.split("/"), "llama3", "latest"), "llama3:latest", "llama3"),
        ("llama3.2:3b", (*LIBRARY.split("/"), "llama3.2", "3b"), "llama3.2:3b", "llama3.2:3b"),
        ("me/x", ("registry.ollama.ai", "me", "x", "latest"), "me/x:latest", "x"),
        ("Me/X:Q4", ("registry.ollama.ai", "Me", "X", "Q4"), "Me/X:Q4", "X:Q4"),
        (
            "hf.co/bartowski/X-GGUF:Q4_K_M",
            ("hf.co", "bartowski", "X-GGUF", "Q4_K_M"),
            "hf.co/bartowski/X-GGUF:Q4_K_M",
            "X-GGUF:Q4_K_M",
        ),
        (
            "localhost:5000/a/b",
            ("localhost:5000", "a", "b", "latest"),
            "localhost:5000/a/b:latest",
            "b",
        ),
    ],
)
def test_names_have_the_parts_that_ollama_gives_them(text, parts, shown, title):
    name = parse_name(text)
    assert name.parts == parts
    assert str(name) == shown
    assert name.title == title
    assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "x:", ":x", "/", "a/", "/a", "a//b", "a b", "x:y:z", "..", "../x", "a/../b",
        "../../../etc/passwd", "x:..", "x:../y", ".x", "x:.y", "-x", "a.b/c", "h/../../x", "x\n",
        "a/b/c/d", "https://ollama.com/x/y", "x" * 81, "x:" + "y" * 81, "ü", "x\0",
    ],
)  # fmt: skip
def test_names_that_ollama_does_not_take_are_refused(store, text):
    for ask in (parse_name, find, check_create):
        with pytest.raises(UserError, match="is no name that Ollama takes"):
            ask(text)
    with pytest.raises(UserError, match="is no name that Ollama takes"):
        ollama_create(text, store.path / "Modelfile")


# --------------------------------------------------------------------------------------------------
# The store


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("llama3", f"{LIBRARY}/llama3/latest"),
        ("llama3:8b", f"{LIBRARY}/llama3/8b"),
        ("LLAMA3:8B", f"{LIBRARY}/llama3/8b"),
        ("me/mine", "registry.ollama.ai/me/mine/latest"),
        ("ME/mine:v1", "registry.ollama.ai/Me/Mine/V1"),
        ("hf.co/bartowski/X-GGUF:q4_k_m", "hf.co/bartowski/X-GGUF/Q4_K_M"),
        ("registry.ollama.ai/library/llama3", f"{LIBRARY}/llama3/latest"),
        ("localhost:5000/a/b", "localhost:5000/a/b/latest"),
    ],
)
@pytest.mark.parametrize("dash", ["-", ":"])
def test_models_are_found_where_ollama_files_them(store, text, place, dash):
    store.add(place, model=GGUF, dash=dash)
    store.add(f"{LIBRARY}/other/8b", model=b"GGUF of another")
    found = find(text)
    assert found.gguf.read_bytes() == GGUF
    assert found.gguf.parent == store.path / "blobs"
    assert "/".join(found.name.parts) == place
    assert contains(parse_name(text))


def test_stores_are_searched_in_order(tmp_path, monkeypatch):
    home, service, packaged, named = (
        Store(tmp_path / name) for name in ("home/.ollama/models", "service", "packaged", "named")
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ollama_store, "SERVICE_STORES", (service.path, packaged.path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    assert stores() == [home.path, service.path, packaged.path]
    message = refused("x")
    assert "no models of Ollama at" in message
    assert "OLLAMA_MODELS" in message
    assert str(service.path) in message
    for one in (packaged, service, home):
        one.add(f"{LIBRARY}/x/latest", model=b"GGUF " + one.path.name.encode())
        assert find("x").gguf.read_bytes() == b"GGUF " + one.path.name.encode()
    service.add(f"{LIBRARY}/only-there/latest", model=GGUF)
    assert find("only-there").gguf.parent.parent == service.path
    # OLLAMA_MODELS means that one alone; Ollama forgives quotes around it.
    monkeypatch.setenv("OLLAMA_MODELS", f' "{named.path}" ')
    assert stores() == [named.path]
    assert str(named.path) in refused("x")
    named.add(f"{LIBRARY}/x/latest", model=b"GGUF named")
    assert find("x").gguf.read_bytes() == b"GGUF named"


def test_everything_beside_the_weights_is_kept(store):
    params = {"stop": ["<|im_end|>", '"'], "temperature": 0.6, "num_ctx": 4096, "use_mmap": False}
    store.add(
        f"{LIBRARY}/full/latest",
        config={"renderer": "qwen3-coder", "parser": "qwen3-coder", "requires": "0.14.0"},
        model=GGUF,
        projector=(b"GGUF sees", b"GGUF hears"),
        draft=b"GGUF guesses",
        template="{{ .System }}{{ .Prompt }}",
        params=params,
        system="Be kind.\nÜber alles: 你好",
        license=("MIT", "Use policy\n" * 3),
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
    )
    found = find("full")
    assert found == OllamaModel(
        name=OllamaName("registry.ollama.ai", "library", "full", "latest"),
        gguf=found.gguf,
        template="{{ .System }}{{ .Prompt }}",
        params=params,
        system="Be kind.\nÜber alles: 你好",
        licenses=("MIT", "Use policy\n" * 3),
        messages=(("user", "Hi"), ("assistant", "Yes?")),
        renderer="qwen3-coder",
        parser="qwen3-coder",
        requires="0.14.0",
        projectors=found.projectors,
        draft=found.draft,
    )
    assert found.gguf.read_bytes() == GGUF
    assert [path.read_bytes() for path in found.projectors] == [b"GGUF sees", b"GGUF hears"]
    assert found.draft.read_bytes() == b"GGUF guesses"


def test_a_model_may_have_nothing_beside_the_weights(store):
    manifest = store.add(f"{LIBRARY}/bare/latest", model=GGUF)
    assert find("bare") == OllamaModel(find("bare").name, find("bare").gguf)
    # Nor a config; and null for an empty list, as Go writes it.
    content = json.loads(manifest.read_text())
    del content["config"]
    content["layers"].append(store.layer("messages", "null"))
    manifest.write_text(json.dumps(content))
    assert find("bare").messages == ()


def test_of_several_templates_the_last_counts_and_licences_add_up(store):
    store.add(
        f"{LIBRARY}/x/latest",
        model=GGUF, prompt="old", template=("one", "two"), system=("a", "b"), license=("1", "2"),
        params=({"top_k": 1, "seed": 3}, {"top_k": 2}),
        messages=([{"role": "user", "content": "1"}], [{"role": "user", "content": "2"}]),
    )  # fmt: skip
    found = find("x")
    assert (found.template, found.system, found.licenses) == ("two", "b", ("1", "2"))
    assert found.params == {"top_k": 2, "seed": 3}
    assert found.messages == (("user", "2"),)
    # As the template's layer was once called.
    store.add(f"{LIBRARY}/old/latest", model=GGUF, prompt="{{ .Prompt }}")
    assert find("old").template == "{{ .Prompt }}"


def test_a_licence_that_is_no_utf_8_still_comes(store):
    store.add(f"{LIBRARY}/x/latest", model=GGUF, license="Préface".encode("latin-1"))
    assert find("x").licenses == ("Pr�face",)


@pytest.mark.parametrize(
    ("layers", "config", "words"),
    [
        ({"model": GGUF, "adapter": b"GGUF"}, {}, "a model with an adapter, which the edited"),
        ({"tensor": (b"1", b"2"), "json": "{}"}, {}, r"as single tensors \(safetensors, for MLX"),
        ({"model": (GGUF, b"GGUF 2")}, {}, "has 2 files of weights"),
        ({"license": "MIT"}, {}, "has no weights in Ollama's manifest"),
        ({}, {"remote_host": "https://ollama.com:443"}, "runs on https://ollama.com:443, and"),
        (
            {"model": b"\x80\x02 pickle"},
            {"model_format": "safetensors"},
            "as safetensors, not as a",
        ),
        ({"model": b""}, {}, "begins with b''"),
    ],
)
def test_models_whose_edit_would_lose_something_are_refused(store, layers, config, words):
    store.add(f"{LIBRARY}/odd/latest", config=config, **layers)
    message = refused("odd")
    assert re.search(words, message)
    assert message.startswith("odd:latest ")


def _change(store, change):
    """A sound model's manifest with one thing changed in its model layer, or replaced."""
    path = store.add(f"{LIBRARY}/x/latest", model=GGUF, template="t")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("digest", "sha256:../../../../etc/passwd", "is no sha256 digest"),
        ("digest", "sha256-" + "0" * 63 + "/", "is no sha256 digest"),
        ("digest", "md5:" + "0" * 32, "is no sha256 digest"),
        ("digest", "sha256:" + "0" * 64 + "\n", "is no sha256 digest"),
        ("digest", "sha256:" + "0" * 64, "its model layer, is not there"),
        ("digest", None, "a layer lacks mediaType or digest"),
        ("mediaType", 3, "a layer lacks mediaType or digest"),
        ("size", 3, f"has {len(GGUF)} bytes instead of 3"),
        ("size", -1, "the size of layer .* is -1"),
        ("size", "28", "the size of layer .* is '28'"),
        ("size", True, "the size of layer .* is True"),
    ],
)
def test_a_layer_that_cannot_be_believed_is_named(store, key, value, words):
    path = _change(store, lambda content: content["layers"][0].__setitem__(key, value))
    message = refused("x")
    assert re.search(words, message)
    assert message.startswith(f"Ollama's manifest {path} cannot be used: ")
    assert message.endswith("Pull or create the model again.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no JSON object"),
        ("{}", "its layers are no list"),
        ('{"layers": {}}', "its layers are no list"),
        ('{"layers": ["x"]}', "a layer is no JSON object"),
        ('{"layers": [], "config": []}', "has no weights"),
        ('{"layers": [], "config": "x"}', "a layer is no JSON object"),
    ],
)
def test_a_manifest_that_is_none_is_named(store, text, words):
    path = store.file(f"{LIBRARY}/x/latest", text)
    message = refused("x")
    assert words in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"params": "[]"}, "is no JSON object"),
        ({"params": "{"}, "is no JSON"),
        ({"params": {"a\nFROM b": 1}}, "malformed"),
        ({"params": {"": 1}}, "malformed"),
        ({"params": {"stop": {"a": 1}}}, "the parameter 'stop' in .* is malformed"),
        ({"params": {"stop": [["a"]]}}, "the parameter 'stop' in .* is malformed"),
        ({"messages": "{}"}, "is no JSON list"),
        ({"messages": ["x"]}, "lacks role or content"),
        ({"messages": [{"content": "x"}]}, "lacks role or content"),
        ({"messages": [{"role": "user", "content": [1]}]}, "lacks role or content"),
        ({"template": "x" * (ollama_store._MAX_TEXT + 1)}, "is too long for a text"),
        ({"config": {"renderer": "a\nFROM b"}}, "its renderer is"),
        ({"config": {"parser": ["a"]}}, "its parser is"),
    ],
)
def test_a_layer_of_nonsense_is_named(store, layers, words):
    path = store.add(f"{LIBRARY}/x/latest", model=GGUF, **layers)
    message = refused("x")
    assert re.search(words, message)
    assert str(path) in message


def test_a_folder_in_the_place_of_a_file_is_no_model(store):
    (store.path / "manifests" / LIBRARY / "x/latest/deeper").mkdir(parents=True)
    assert "Ollama has no model x:latest" in refused("x")
    store.add(f"{LIBRARY}/y/latest", model=GGUF)
    find("y").gguf.unlink()
    digest = json.loads((store.path / "manifests" / LIBRARY / "y/latest").read_text())["layers"][0]
    (store.path / "blobs" / digest["digest"].replace(":", "-")).mkdir()
    assert "cannot be" in refused("y")


def test_a_missing_model_names_those_that_are_near(store):
    for place in ("llama3.2/1b", "llama3.2/3b", "mistral/latest", "qwen3/8b"):
        store.add(f"{LIBRARY}/{place}", model=GGUF)
    store.add("hf.co/bartowski/Phi-GGUF/Q4_K_M", model=GGUF)
    (store.path / "manifests/.DS_Store").write_text("")
    (store.path / f"manifests/{LIBRARY}/mistral/.DS_Store").write_text("")
    message = refused("llama3.2")
    assert message == (
        f"Ollama has no model llama3.2:latest in {store.path}, but llama3.2:1b, llama3.2:3b: check "
        "`ollama list`, or get it with `ollama pull llama3.2`."
    )
    assert "but mistral:latest:" in refused("mistal")
    assert "but hf.co/bartowski/Phi-GGUF:Q4_K_M:" in refused("hf.co/bartowski/Phi-GGUF:Q8_0")
    # Nothing near: some that are there.
    far = refused("zzz")
    assert "but hf.co/bartowski/Phi-GGUF:Q4_K_M, llama3.2:1b, llama3.2:3b, mistral:latest" in far
    assert "DS_Store" not in far


def test_an_empty_store_is_told(store):
    (store.path / "manifests").mkdir()
    assert f"Ollama has no model x:latest in {store.path}, but none at all:" in refused("x")


@pytest.mark.parametrize("closed", ["manifests", f"manifests/{LIBRARY}/x/latest", "blobs", "blob"])
def test_a_store_of_another_user_says_how_to_open_it(monkeypatch, closed):
    with open_folder() as folder:
        store = Store(folder / "ollama home/.ollama/models")
        monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
        store.add(f"{LIBRARY}/x/latest", model=GGUF)
        path = find("x").gguf if closed == "blob" else store.path / closed
        mode = path.stat().st_mode
        path.chmod(0)
        with as_a_stranger():
            message = refused("x")
            missing = refused("nosuch")
        path.chmod(stat.S_IMODE(mode))
        assert "may not be read by you, because Ollama runs as another user" in message
        assert str(path) in message
        command = message.split("`")[1]
        assert shlex.split(command) == [
            "sudo", "chmod", "a+x", f"{folder}/ollama home", f"{folder}/ollama home/.ollama",
            "&&", "sudo", "chmod", "-R", "a+rX", str(store.path),
        ]  # fmt: skip
        # What is not there is only said where one can see that.
        assert ("may not be read" in missing) == (closed == "manifests")
        with as_a_stranger():
            assert find("x").gguf.read_bytes() == GGUF


# --------------------------------------------------------------------------------------------------
# The Modelfile


def model(**kept):
    kept.setdefault("renderer", "none")
    return OllamaModel(parse_name("kept:1b"), Path("/nosuch/blob"), **kept)


def said(kept, name="edited.gguf"):
    return read_modelfile(modelfile(Path("/nosuch/staged"), None, name, kept=kept))


def test_what_was_kept_is_what_the_modelfile_says(store):
    store.add(
        f"{LIBRARY}/full/latest",
        config={"renderer": "r-1.0", "parser": "p", "requires": "0.14.0"},
        model=GGUF,
        template='{{ if .System }}<|s|>\n{{ .System }}{{ end }}\n"{{ .Prompt }}"',
        params={
            "stop": ["<|im_end|>", '"', "", "\n\nUser:", ' "x" ', '""""', "a\tb", "#"],
            "temperature": 0.6,
            "top_p": 1.0,
            "min_p": 1e-05,
            "num_ctx": 4096,
            "seed": -1,
            "use_mmap": True,
        },
        system='Say "yes".\n# no comment\n\n  FROM nowhere ',
        license=("MIT\n", '"quoted"'),
        messages=[{"role": "user", "content": "Hi: there"}, {"role": "assistant", "content": ""}],
    )
    text = modelfile(Path("/nosuch/staged.gguf"), None, "edited.gguf", kept=find("full"))
    assert text.startswith("FROM ./edited.gguf\n")
    assert read_modelfile(text) == [
        ("FROM", "./edited.gguf"),
        ("RENDERER", "r-1.0"),
        ("PARSER", "p"),
        ("REQUIRES", "0.14.0"),
        ("TEMPLATE", '{{ if .System }}<|s|>\n{{ .System }}{{ end }}\n"{{ .Prompt }}"'),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", '"'),
        ("PARAMETER stop", ""),
        ("PARAMETER stop", "\n\nUser:"),
        ("PARAMETER stop", ' "x" '),
        ("PARAMETER stop", '""""'),
        ("PARAMETER stop", "a\tb"),
        ("PARAMETER stop", "#"),
        ("PARAMETER temperature", "0.6"),
        ("PARAMETER top_p", "1"),
        ("PARAMETER min_p", "1e-05"),
        ("PARAMETER num_ctx", "4096"),
        ("PARAMETER seed", "-1"),
        ("PARAMETER use_mmap", "true"),
        ("SYSTEM", 'Say "yes".\n# no comment\n\n  FROM nowhere '),
        ("MESSAGE user", "Hi: there"),
        ("MESSAGE assistant", ""),
        ("LICENSE", "MIT\n"),
        ("LICENSE", '"quoted"'),
    ]


def test_what_is_left_out_is_a_comment():
    kept = model(
        renderer=None,
        params={"num_gqa": 8, "top_k": 3},
        messages=(("tool", "42"), ("user", "x")),
        capabilities=("tools",),
    )
    text = modelfile(Path("/nosuch/staged.gguf"), kept=kept)
    assert read_modelfile(text) == [
        ("FROM", "./staged.gguf"),
        ("PARAMETER top_k", "3"),
        ("MESSAGE user", "x"),
    ]
    for comment in (
        "# The other lines are those of kept:1b in Ollama.",
        "# In Ollama, kept:1b also names capabilities, for which a Modelfile has no line: tools.",
        "# It has no template of its own: Ollama goes by the GGUF's.",
        "# Ollama has no PARAMETER num_gqa any more; it was 8",
        "# A message is left out: a Modelfile has none of its role.",
    ):
        assert comment in text.splitlines()


# Text whose lines do not end in three quotes, which is all that a Modelfile cannot say of it.
pieces = st.sampled_from(['"', '""', '"""', " ", "\t", "\n", "\r", "#", "FROM x", "{{", "}}", "\\"])
printing = (
    st.lists(pieces | st.characters(exclude_categories=["C", "Z"]), max_size=12)
    .map("".join)
    .filter(lambda text: not re.search(r'"""[ \t]*[\r\n]', text))
)


@settings(max_examples=300, deadline=None)
@given(st.lists(printing, min_size=5, max_size=5))
def test_any_text_that_prints_comes_back_from_a_modelfile(texts):
    template, stop, system, content, licence = texts
    kept = model(
        template=template, params={"stop": [stop]}, system=system,
        messages=(("user", content),), licenses=(licence,),
    )  # fmt: skip
    got = said(kept)
    expected = [("TEMPLATE", template), ("PARAMETER stop", stop)]
    expected += [("SYSTEM", system)] if system else []
    expected += [("MESSAGE user", content), ("LICENSE", licence)]
    assert got == [("FROM", "./edited.gguf"), ("RENDERER", "none"), *expected]


def _executed(template):
    """A Go template's text with the values of its literal actions."""
    return re.sub(r'\{\{ ("[^"]*") \}\}', lambda found: json.loads(found[1]), template)


def test_a_template_says_with_actions_what_a_modelfile_cannot():
    plain = 'a"""\nb"""  \t\n\u00a0c\u200b"""\u200b\n{{ .X }}\u2028"""'
    ((_, text),) = [line for line in said(model(template=plain)) if line[0] == "TEMPLATE"]
    assert text != plain
    assert _executed(text) == plain
    # Inside of an action there is no such way, and a comment says so.
    inside = '{{ "\u00a0" }}{{/* """\n */}}{{ `}}"""\n` }}'
    written = modelfile(Path("x"), None, "x", kept=model(template=inside))
    assert ("TEMPLATE", "{{ \" \" }}{{/* '''\n */}}{{ `}}'''\n` }}") in read_modelfile(written)
    assert "# The TEMPLATE below lost characters that do not print: Ollama drops" in written
    assert "# The TEMPLATE below had \"\"\" where it has '''" in written


def test_what_a_modelfile_cannot_say_is_changed_and_told():
    kept = model(
        system='A\u00a0B\u200bC\n"""\nD', licenses=("L\f\u00a0M",), messages=(("user", "\u200d"),)
    )
    written = modelfile(Path("x"), None, "x", kept=kept)
    assert read_modelfile(written)[2:] == [
        ("SYSTEM", "A BC\n'''\nD"), ("MESSAGE user", ""), ("LICENSE", "L M"),
    ]  # fmt: skip
    for word in ("SYSTEM", "MESSAGE"):
        assert f"# The {word} below lost characters that do not print: Ollama drops" in written
    assert "# The SYSTEM below had \"\"\" where it has '''" in written
    # Form feeds in a licence are nobody's loss.
    assert "The LICENSE" not in written
    assert (
        "# The" not in modelfile(Path("x"), None, "x", kept=model(system='"""')).split("\n", 2)[2]
    )


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300, 0.1, -0.0, 2**40])
def test_numbers_are_written_as_go_reads_them(value):
    (line,) = [line for line in said(model(params={"top_p": value})) if "top_p" in line[0]]
    assert float(line[1]) == value
    assert "_" not in line[1]


@pytest.mark.parametrize("name", ["a b.gguf", " a.gguf ", 'a".gguf', '"a".gguf', "#a.gguf"])
def test_the_files_name_may_hold_blanks_and_quotes(name):
    assert said(model(), name)[0] == ("FROM", f"./{name}")


# --------------------------------------------------------------------------------------------------
# ollama create


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program `ollama` that notes how it was called, does what is asked of it and ends."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "ollama"

    def write(script="exit 0"):
        path.write_text(
            "#!/bin/sh\n"
            f'printf "%s\\n" "$PWD" "$@" > {shlex.quote(str(tmp_path / "called"))}\n'
            '[ -f "$4" ] || { echo "Error: no Modelfile" >&2; exit 9; }\n' + script
        )
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    return write


def test_create_is_called_beside_the_modelfile(tmp_path, program, capfd, monkeypatch):
    program("echo gathering model components; echo success >&2")
    folder = tmp_path / "some where"
    folder.mkdir()
    (folder / "x.Modelfile").write_text("FROM ./x.gguf\n")
    check_create("me/edited:v1")
    monkeypatch.chdir(tmp_path)
    ollama_create("me/edited:v1", Path("some where/x.Modelfile"))
    assert (tmp_path / "called").read_text().splitlines() == [
        str(folder), "create", "me/edited:v1", "-f", str(folder / "x.Modelfile")
    ]  # fmt: skip
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "gathering model components\nsuccess\n"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            'printf "\\033[?25lgathering \\033[K\\n" >&2; '
            'printf "\\033[?25hError: could not connect to the server.\\n\\n" >&2; exit 1',
            "could not connect to the server",
        ),
        ("exit 7", "exit status 7"),
        ("kill -9 $$", "exit status -9"),
    ],
)
def test_a_create_that_fails_says_what_to_repeat(tmp_path, program, script, why):
    program(script)
    file = tmp_path / "it's.Modelfile"
    file.write_text("FROM ./x.gguf\n")
    with pytest.raises(UserError) as caught:
        ollama_create("edited", file)
    command = shlex.join(["ollama", "create", "edited", "-f", str(file)])
    assert (
        str(caught.value) == f"ollama could not make edited ({why}): mend that and run `{command}`."
    )


def test_without_a_modelfile_nothing_is_called(tmp_path, program):
    program()
    with pytest.raises(UserError, match=r"there is no .*/Modelfile to make edited of"):
        ollama_create("edited", tmp_path / "Modelfile")
    assert not (tmp_path / "called").exists()


def test_without_the_program_the_command_is_told(tmp_path, program):
    (tmp_path / "Modelfile").write_text("FROM ./x.gguf\n")
    with pytest.raises(UserError, match="ollama_create edited: there is no program `ollama`"):
        check_create("edited")
    with pytest.raises(
        UserError, match=f"run `ollama create edited -f {tmp_path}/Modelfile` where"
    ):
        ollama_create("edited", tmp_path / "Modelfile")
    # Neither is one that cannot be started.
    program().write_text("#!/nosuch/interpreter\n")
    check_create("edited")
    with pytest.raises(UserError, match=r"could not be started \(No such file.*`ollama create"):
        ollama_create("edited", tmp_path / "Modelfile")


def test_a_model_that_ollama_has_is_not_replaced(tmp_path, program):
    program()
    store = Store(tmp_path / "store")
    check_create("mine")
    store.add(f"{LIBRARY}/mine/latest", model=GGUF)
    check_create("mine:v2")
    for name in ("mine", "MINE:latest"):
        with pytest.raises(UserError, match=f"Ollama has a model .* already.*`ollama rm {name}`"):
            check_create(name)


def test_a_models_own_template_is_quoted_by_the_same_rules(tmp_path):
    # Of a GGUF without Ollama's layers; the templates themselves are in test_mlx_to_gguf.py.
    lines = Modelfile("x.gguf")
    lines.template('{{ .Prompt }}\u00a0"""\n')
    assert _executed(read_modelfile(str(lines))[1][1]) == '{{ .Prompt }}\u00a0"""\n'
