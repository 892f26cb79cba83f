"""What a person types for a model -> the model, with a small Hugging Face on this machine."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import endpoint
from abl_mlx.cli.main import cli
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs import hub
from abl_mlx.inputs.sources import Source, at_revision, resolve, resolve_gguf
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from tests.models.test_writers import random_direction
from tests.support import hub_server
from tests.support.hub_environment import hub_environment
from tests.support.hub_server import COMMIT
from tests.support.ollama_tools import Store, as_a_stranger, open_folder, write_gguf

# A repository as bartowski, unsloth and others lay theirs out.
GGUFS = [
    "README.md",
    "config.json",
    "X-IQ4_K_M.gguf",
    "X-Q4_K_M.gguf",
    "X-Q4_K_M_L.gguf",
    "X-Q8_0-00001-of-00002.gguf",
    "X-Q8_0-00002-of-00002.gguf",
    "X-F16-00001-of-00002.gguf",
    "UD-Q5_K_XL/X-UD-Q5_K_XL-00001-of-00002.gguf",
    "UD-Q5_K_XL/X-UD-Q5_K_XL-00002-of-00002.gguf",
    "BF16/X.gguf",
    "mmproj-BF16.gguf",
    "X.imatrix.gguf",
    "x.q3_k_s.gguf",
    "X-Q6_K-v2.gguf",
    "X-IQ3_M.gguf",
    "X-Q2_K_L.gguf",
    "X-UD-Q2_K_L.gguf",
    "X_Q4_1.gguf",
    "odd [1]-Q2_K.gguf",
    "odd 1-Q2_K_S.gguf",
    "a/X-Q5_0.gguf",
    "b/X-Q5_0.gguf",
]


@pytest.fixture(scope="module")
def server():
    repositories = {
        "someone/X-GGUF": GGUFS,
        "someone/floats": ["config.json", "model.safetensors", "X-Q4_K_M.gguf"],
        "someone/unnamed": ["one.gguf", "two.gguf"],
        "someone/nothing": ["README.md", "config.json"],
        "someone/gated": ["config.json", "model.safetensors", "X-Q4_K_M.gguf"],
    }
    with hub_server.serve(hub_server.Hub(repositories)) as state:
        yield state


ASK = """
import json, sys
from abl_mlx.inputs import sources
from convert.base.errors import UserError
for ask in json.loads(sys.argv[1]):
    how, text = ask
    try:
        source = getattr(sources, how)(text)
    except UserError as error:
        print(json.dumps({"error": str(error)}))
        continue
    print(json.dumps({
        "name": source.name, "path": str(source.path), "title": source.title,
        "is_gguf": source.is_gguf, "is_repository": source.is_repository,
        "repository": source.repository,
        "files": sorted(p.name for p in source.path.parent.rglob("*.gguf")),
        "content": source.path.read_text() if source.path.is_file() else None,
    }))
"""


@pytest.fixture
def ask(server, tmp_path):
    """Resolve texts in a new Python, where huggingface_hub takes this server for the Hub."""

    def run(*texts, how="resolve", **variables):
        server.fetched.clear()
        environment = hub_environment(server.url, tmp_path, **variables)
        asked = json.dumps([(how, text) for text in texts])
        result = subprocess.run(
            [sys.executable, "-c", ASK, asked],
            capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        answers = [json.loads(line) for line in result.stdout.splitlines()]
        assert len(answers) == len(texts)
        return answers

    return run


# --------------------------------------------------------------------------------------------------
# On this machine


def test_a_gguf_is_known_by_its_ending_or_its_first_bytes(tmp_path):
    named = write_gguf(tmp_path / "Some-Model-Q4_K_M.gguf")
    bare = write_gguf(tmp_path / f"sha256-{'0f' * 32}")
    part = tmp_path / "Big-00002-of-00003.gguf"
    part.write_bytes(b"GGUF")
    upper = tmp_path / "UPPER.GGUF"
    upper.write_bytes(b"")
    for path, title in (
        (named, "Some-Model-Q4_K_M"), (bare, "model"), (part, "Big"), (upper, "UPPER")
    ):  # fmt: skip
        for how in (resolve, resolve_gguf):
            source = how(str(path))
            assert source == Source(str(path), path)
            assert source.is_gguf
            assert source.title == title
    (tmp_path / "notes").write_text("GGU")
    with pytest.raises(UserError, match="notes is a file, and no GGUF"):
        resolve(str(tmp_path / "notes"))
    assert not resolve(str(tmp_path)).is_gguf
    assert not resolve("demo").is_gguf


def test_resolve_gguf_refuses_what_is_none(tmp_path):
    for text in ("demo", str(tmp_path)):
        with pytest.raises(UserError, match=r"is not a file: give the path of a \.gguf"):
            resolve_gguf(text)
    for how in (resolve, resolve_gguf):
        with pytest.raises(UserError, match=r"models/x\.gguf is not a file here.*hf:OWNER/REPO"):
            how("models/x.gguf")
        with pytest.raises(UserError, match="check the spelling"):
            how("nosuch")
        with pytest.raises(UserError, match="check the spelling"):
            how("x" * 5000)


def test_what_is_here_goes_before_what_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    (tmp_path / "hf:someone").mkdir()
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone/folder").mkdir()
    for text in ("ollama:llama3", "someone/X-GGUF:Q4_K_M", "hf:someone/x.gguf", "dir:tag"):
        path = write_gguf(tmp_path / text)
        for how in (resolve, resolve_gguf):
            assert how(text) == Source(text, Path(text))
            assert how(text).path.samefile(path)
    assert resolve("someone/folder") == Source("someone/folder", Path("someone/folder"))


def test_ollama_names_its_models_by_name(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    real = write_gguf(tmp_path / "real.gguf").read_bytes()
    store.add("registry.ollama.ai/library/llama3.2/3b", model=real, template="{{ .Prompt }}")
    store.add("hf.co/someone/X-GGUF/latest", model=real)
    monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
    for how in (resolve, resolve_gguf):
        source = how("ollama:Llama3.2:3b")
        assert source.is_gguf
        assert source.title == "llama3.2:3b"
        assert source.name == "ollama:Llama3.2:3b"
        assert source.ollama.template == "{{ .Prompt }}"
        assert source.path == source.ollama.gguf
        assert how("ollama:hf.co/someone/x-gguf").title == "X-GGUF"
    with GgufSource(source.path) as gguf:
        assert gguf.architecture == "llama"
        assert gguf.parts == [source.path]
    with pytest.raises(UserError, match="ollama pull llama9"):
        resolve("ollama:llama9")


def test_a_reference_is_read_by_its_form():
    for text, reference in {
        "a/b": hub.Reference("a/b"),
        "hf:a/b": hub.Reference("a/b"),
        "a-1/B.c_2:UD-Q4_K_XL": hub.Reference("a-1/B.c_2", tag="UD-Q4_K_XL"),
        "hf:a/b:q8_0": hub.Reference("a/b", tag="q8_0"),
        "hf:a/b/c d/e.GGUF": hub.Reference("a/b", file="c d/e.GGUF"),
        "a": None,
        "a/b/c.gguf": None,
        "./a/b": None,
        "../b": None,
        "a/b:": None,
        "/a/b": None,
        "a/b:c:d": None,
        "a/b@v1.0": hub.Reference("a/b", revision="v1.0"),
        "a/b@refs/pr/1:Q4_0": hub.Reference("a/b", tag="Q4_0", revision="refs/pr/1"),
        "hf:a/b@main/c d/e.GGUF": hub.Reference("a/b", file="c d/e.GGUF", revision="main"),
        "a/b@": None,
        "https://huggingface.co/a/b": hub.Reference("a/b"),
        "HTTP://www.HuggingFace.co/a/b/": hub.Reference("a/b"),
        "huggingface.co/a/b?library=mlx#usage": hub.Reference("a/b"),
        "https://hf.co/a/b:Q4_K_M": hub.Reference("a/b", tag="Q4_K_M"),
        "hf.co/a/b": hub.Reference("a/b"),
        "https://huggingface.co/a/b/tree/main": hub.Reference("a/b"),
        "https://huggingface.co/a/b/tree/v2": hub.Reference("a/b", revision="v2"),
        "https://huggingface.co/a/b/tree/refs%2Fpr%2F1": hub.Reference("a/b", revision="refs/pr/1"),
        "https://huggingface.co/a/b/commit/55": hub.Reference("a/b", revision="55"),
        "https://huggingface.co/a/b/blob/main/c/x%20y.gguf": hub.Reference("a/b", "c/x y.gguf"),
        "https://huggingface.co/a/b/resolve/v2/x.gguf?download=true": hub.Reference(
            "a/b", "x.gguf", revision="v2"
        ),
        "https://huggingface.co/a/b/blob/main/README.md": hub.Reference("a/b"),
        "https://huggingface.co/a/b/discussions/3": hub.Reference("a/b"),
        "https://example.com/a/b": None,
        "https://huggingface.co.example.com/a/b": None,
    }.items():
        assert hub.parse(text) == reference
    for text in ("hf:", "hf:a", "hf:a/b/c.bin", "hf:a/b/c", "hf:/a/b", "hf:a/b/x.gguf:Q4_0"):
        with pytest.raises(UserError, match=r"write hf:OWNER/REPO/FILE\.gguf"):
            hub.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://huggingface.co/datasets/a/b", "not the page of a model"),
        ("https://huggingface.co/a", "not the page of a model"),
        ("https://huggingface.co/a/b/tree/main/UD-Q5_K_XL", "a folder inside a repository"),
    ],
)
def test_an_address_that_is_no_models_is_told(text, said):
    with pytest.raises(UserError, match=said):
        resolve(text)


@pytest.mark.parametrize(
    ("text", "revision", "named"),
    [
        ("me/x", "v2", "me/x@v2"),
        ("hf:me/x", "refs/pr/1", "me/x@refs/pr/1"),
        ("me/x:Q4_K_M", "v2", "me/x@v2:Q4_K_M"),
        ("hf:me/x/a/X.gguf", "v2", "hf:me/x@v2/a/X.gguf"),
        (
            "hf:me/x/a/X 1.gguf",
            "refs/pr/1",
            "https://huggingface.co/me/x/blob/refs%2Fpr%2F1/a/X%201.gguf",
        ),
        ("https://huggingface.co/me/x/blob/main/X.gguf", "v2", "hf:me/x@v2/X.gguf"),
    ],
)
def test_a_revision_by_its_flag_is_one_in_the_text(text, revision, named):
    assert at_revision(text, revision) == named
    (given, wanted) = hub.parse(text), hub.parse(named)
    assert wanted == replace(given, revision=revision)


def test_a_revision_of_what_has_none_is_told(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    texts = ("demo", str(tmp_path), str(tmp_path / "x.gguf"), "ollama:x", "http://localhost/v1")
    for text in texts:
        with pytest.raises(UserError, match=f"--revision v2: {text} is not a model on Hugging"):
            at_revision(text, "v2")
    with pytest.raises(UserError, match="names the revision v1 already"):
        at_revision("me/x@v1:Q4_K_M", "v2")
    with pytest.raises(UserError, match="' x' is no branch, tag or commit"):
        at_revision("me/x", " x")


MODELS = [
    ("run", "{}", "-o", "out"),
    ("measure", "{}", "-o", "new.safetensors"),
    ("apply", "d.safetensors", "{}", "-o", "out"),
    ("undo", "{}", "-o", "out"),
    ("convert", "{}", "out.gguf"),
    ("eval", "{}"),
    ("audit", "{}"),
    ("inspect", "{}"),
    ("show", "{}", "Hello"),
    ("chat", "{}"),
]


@pytest.mark.parametrize("command", MODELS, ids=lambda one: one[0])
def test_every_command_that_takes_a_model_takes_a_revision(command, tmp_path, monkeypatch):
    def refuse(text, *_):
        raise UserError(f"asked for {text}.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("abl_mlx.inputs.sources.resolve", refuse)
    monkeypatch.setattr("abl_mlx.outputs.remote_file.find_remote", refuse)  # `audit` reads parts
    direction_file.save(Path("d.safetensors"), DirectionFile(random_direction(8, 1)))
    given = [one.format("me/x") for one in command]
    result = CliRunner().invoke(cli, [*given, "--revision", "v2"])
    assert result.stderr.splitlines()[-1] == "Error: asked for me/x@v2."


def test_a_models_page_is_no_server():
    assert endpoint.is_endpoint("https://127.0.0.1:1/v1")
    assert not endpoint.is_endpoint("https://huggingface.co/a/b")


def test_a_file_that_may_not_be_read_is_told():
    with open_folder() as folder:
        blob = folder / "blob"
        blob.write_bytes(b"GGUF")
        blob.chmod(0)
        closed = folder / "closed"
        closed.mkdir(mode=0)
        with as_a_stranger():
            for text in (blob, closed / "x.gguf"):
                for how in (resolve, resolve_gguf):
                    with pytest.raises(UserError, match=f"{text} cannot be read .Permission den"):
                        how(str(text))


# --------------------------------------------------------------------------------------------------
# On Hugging Face


def test_a_tag_picks_one_gguf(ask, server):
    cases = {
        "someone/X-GGUF:Q4_K_M": "X-Q4_K_M.gguf",
        "hf:someone/X-GGUF:q4_k_m": "X-Q4_K_M.gguf",
        "someone/X-GGUF:iq4_k_m": "X-IQ4_K_M.gguf",
        "someone/X-GGUF:Q4_K_M_L": "X-Q4_K_M_L.gguf",
        "someone/X-GGUF:Q3_K_S": "x.q3_k_s.gguf",
        "someone/X-GGUF:Q6_K": "X-Q6_K-v2.gguf",
        "someone/X-GGUF:BF16": "BF16/X.gguf",
        "someone/X-GGUF:Q4_1": "X_Q4_1.gguf",
        "someone/X-GGUF:Q2_K_L": "X-Q2_K_L.gguf",
        "someone/X-GGUF:Q2_K": "odd [1]-Q2_K.gguf",
        "someone/floats:Q4_K_M": "X-Q4_K_M.gguf",
        "hf:someone/X-GGUF/BF16/X.gguf": "BF16/X.gguf",
        "hf:someone/unnamed/two.gguf": "two.gguf",
    }
    for how in ("resolve", "resolve_gguf"):
        for (text, file), answer in zip(cases.items(), ask(*cases, how=how), strict=True):
            assert "error" not in answer, answer
            repository = "/".join(text.removeprefix("hf:").split(":")[0].split("/")[:2])
            assert answer["content"] == f"GGUF {repository} {file}"
            assert answer["path"].endswith(f"snapshots/{COMMIT}/{file}")
            assert answer["title"] == Path(file).stem
            assert answer["name"] == text
            assert answer["repository"] == repository
            assert answer["is_gguf"]
            assert not answer["is_repository"]
        if how == "resolve":
            # Each file once, and nothing else.
            files = [f"someone/X-GGUF/{file}" for file in cases.values()]
            files[-3:] = ["someone/floats/X-Q4_K_M.gguf", files[-2], "someone/unnamed/two.gguf"]
            assert sorted(server.fetched) == sorted(set(files))
        else:
            # All of them were in the cache.
            assert server.fetched == []


def test_only_the_file_is_downloaded(ask, server):
    ask("someone/X-GGUF:Q4_K_M")
    assert server.fetched == ["someone/X-GGUF/X-Q4_K_M.gguf"]
    # Brackets and blanks in a name are no pattern.
    ask("someone/X-GGUF:Q2_K")
    assert server.fetched == ["someone/X-GGUF/odd [1]-Q2_K.gguf"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("someone/X-GGUF:Q8_0", "X-Q8_0-00001-of-00002.gguf"),
        ("hf:someone/X-GGUF/X-Q8_0-00002-of-00002.gguf", "X-Q8_0-00001-of-00002.gguf"),
        ("someone/X-GGUF:ud-q5_k_xl", "X-UD-Q5_K_XL-00001-of-00002.gguf"),
        ("someone/X-GGUF:Q5_K_XL", "X-UD-Q5_K_XL-00001-of-00002.gguf"),
    ],
)
def test_all_parts_of_a_split_model_come_and_the_first_is_named(ask, server, text, first):
    (answer,) = ask(text)
    assert Path(answer["path"]).name == first
    assert answer["files"] == [first, first.replace("-00001-", "-00002-")]
    assert len(server.fetched) == 2
    assert answer["title"] == first.removesuffix("-00001-of-00002.gguf")


def test_what_there_is_is_said_when_nothing_or_too_much_fits(ask, server):
    tags = "BF16, UD-Q5_K_XL, F16, IQ3_M, IQ4_K_M, Q2_K_L, Q4_K_M, Q4_K_M_L, Q8_0, "
    absent, whole, both, parts, file, none, unnamed, mmproj = (
        answer["error"]
        for answer in ask(
            "someone/X-GGUF:Q4_K",
            "someone/X-GGUF",
            "someone/X-GGUF:Q5_0",
            "someone/X-GGUF:F16",
            "hf:someone/X-GGUF/X-Q4_K_N.gguf",
            "someone/nothing:Q4_K_M",
            "someone/unnamed:Q4_K_M",
            "hf:someone/X-GGUF/mmproj-BF16.gguf",
        )
    )
    assert absent.startswith(f"there is no GGUF of type Q4_K in someone/X-GGUF: pick one of {tags}")
    assert "by writing someone/X-GGUF:BF16" in absent
    assert whole.startswith(f"someone/X-GGUF holds GGUFs and no safetensors: pick one of {tags}")
    assert "mmproj" not in whole
    assert "imatrix" not in whole
    assert "fits 2 files: name one of hf:someone/X-GGUF/a/X-Q5_0.gguf, hf:" in both
    assert parts.startswith("parts of X-F16-00001-of-00002.gguf are missing in someone/X-GGUF:")
    assert "did you mean hf:someone/X-GGUF/X-Q4_K_M.gguf or " in file
    assert none.startswith("there is no GGUF in someone/nothing:")
    assert unnamed.endswith("pick one of hf:someone/unnamed/one.gguf, hf:someone/unnamed/two.gguf.")
    assert mmproj.startswith("there is no mmproj-BF16.gguf in someone/X-GGUF")
    # Neither a part of a type nor the end of another.
    pieces = ["Q3_M", "K_XL", "4_1", "Q4", "Q3_K", "M", "X-Q4", "Q6_K-v", "00001-of-00002"]
    for piece, answer in zip(
        pieces, ask(*(f"someone/X-GGUF:{one}" for one in pieces)), strict=True
    ):
        assert answer["error"].startswith(f"there is no GGUF of type {piece} in someone/X-GGUF")
    assert not any(name.endswith(".gguf") for name in server.fetched)


def test_a_repository_with_safetensors_is_a_folder(ask, server):
    plain, marked = ask("someone/floats", "hf:someone/floats")
    assert plain == marked
    assert plain["is_repository"]
    assert plain["name"] == plain["repository"] == "someone/floats"
    assert plain["title"] == "floats"
    assert not plain["is_gguf"]
    assert sorted(server.fetched) == [
        "someone/floats/config.json", "someone/floats/model.safetensors"
    ]  # fmt: skip
    (refused,) = ask("someone/floats", how="resolve_gguf")
    assert refused["error"] == (
        "someone/floats is a whole repository, and one GGUF is wanted: pick one of Q4_K_M, by "
        "writing someone/floats:Q4_K_M."
    )
    assert server.fetched == []
    # Neither kind: whoever reads the folder says what is missing in it.
    assert "error" not in ask("someone/nothing")[0]


def test_the_cache_serves_without_a_connection(ask, server):
    texts = ["someone/X-GGUF:Q4_K_M", "someone/X-GGUF:Q8_0", "someone/floats"]
    ask(*texts)
    online = ask(*texts)
    assert server.fetched == []
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert ask(*texts, **variables) == online
        assert server.fetched == []
        (other,) = ask("someone/X-GGUF:Q3_K_S", **variables)
        assert other["error"].startswith(
            "there is no GGUF of type Q3_K_S in what the cache has of someone/X-GGUF (Hugging Face "
            "could not be reached): pick one of "
        )
    server.broken = True
    try:
        assert ask("someone/X-GGUF:Q4_K_M")[0] == online[0]
    finally:
        server.broken = False
    next(Path(online[1]["path"]).parent.glob("*00002-of-00002*")).unlink()
    (part,) = ask("someone/X-GGUF:Q8_0", HF_HUB_OFFLINE="1")
    assert part["error"].startswith("parts of X-Q8_0-00001-of-00002.gguf are missing in what the")


def test_a_revision_is_taken_and_a_missing_one_is_told(ask, server):
    texts = [
        "someone/floats@v2", "https://huggingface.co/someone/floats/tree/v2",
        "someone/X-GGUF@v2:Q4_K_M", "https://huggingface.co/someone/X-GGUF/blob/v2/X-Q4_K_M.gguf",
    ]  # fmt: skip
    folder, address, tag, file = ask(*texts)
    assert folder == address
    assert (folder["name"], folder["repository"]) == ("someone/floats@v2", "someone/floats")
    assert folder["title"] == "floats"
    assert folder["is_repository"]
    assert tag["path"] == file["path"]
    assert tag["repository"] == "someone/X-GGUF"
    # The snapshot of that revision, which has a commit of its own here.
    assert folder["path"].endswith("7" * 40)
    assert ("7" * 40) in tag["path"]
    for text in ("someone/floats@nosuch", "someone/X-GGUF@nosuch:Q4_K_M"):
        (missing,) = ask(text)
        assert "has no branch, tag or commit nosuch: check the spelling" in missing["error"]
    (several,) = ask("someone/X-GGUF@v2")
    assert "someone/X-GGUF@v2 holds GGUFs and no safetensors" in several["error"]


@pytest.mark.parametrize("form", ["{}", "{}:Q4_K_M", "hf:{}/X-Q4_K_M.gguf"])
def test_what_hugging_face_refuses_is_one_sentence(ask, server, form):
    repositories = ["gated", "private", "missing", "forbidden", "token", "bad--name"]
    answers = ask(*(form.format(f"someone/{name}") for name in repositories))
    gated, private, missing, forbidden, token, bad = (answer["error"] for answer in answers)
    assert gated == (
        "someone/gated asks for a licence to be accepted: do so on its Hugging Face page and log "
        "in with `hf auth login`."
    )
    for name, message in (("private", private), ("missing", missing)):
        assert message.startswith(f"someone/{name} is neither a folder here nor a model on Hugging")
    for name, status, message in (("forbidden", 403, forbidden), ("token", 401, token)):
        assert message == (
            f"someone/{name}: Hugging Face does not let you have it (HTTP {status}): log in with "
            "`hf auth login`, with a token that may read it."
        )
    assert bad.startswith("someone/bad--name is not a folder here, and no id that Hugging Face")
    unreachable, offline = (
        ask(form.format("someone/new"), **variables)[0]["error"]
        for variables in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"})
    )
    assert unreachable.startswith("someone/new is not a folder here, and Hugging Face could not be")
    assert "HF_HUB_OFFLINE is set" in offline
