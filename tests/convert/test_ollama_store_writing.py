"""Models filed in Ollama's store are as Ollama would have filed them."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from convert.base.errors import UserError
from convert.ollama import store_writing
from convert.ollama.settings import Settings
from convert.ollama.store import find, parse_name
from tests.support import tiny_gguf
from tests.support.gguf_recipes import RECIPES
from tests.support.ollama_tools import Store, as_a_stranger, open_folder, shown_in_store

LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store(tmp_path / "store")
    monkeypatch.setenv("OLLAMA_MODELS", str(made.path))
    return made


def settings_of(model: Settings) -> Settings:
    """The settings of a model in the store, without the rest."""
    return Settings(**{one.name: getattr(model, one.name) for one in fields(Settings)})


def weights(path: Path, name: str = "llama") -> Path:
    return tiny_gguf.write(path, RECIPES[name])


FULL = Settings(
    template="{{ .Tools }}{{ range .Messages }}{{ .Content }}{{ end }}",
    params={"stop": ["<|im_end|>"], "temperature": 0.5, "num_ctx": 4096},
    system="Be brief.",
    licenses=("MIT", "Apache"),
    messages=(("user", "Hi"), ("assistant", "Hello")),
    parser="qwen3-coder",
    renderer="qwen3-coder",
    requires="0.14.0",
    capabilities=("tools",),
)


def test_what_is_filed_is_found_again(store: Store, tmp_path: Path) -> None:
    gguf = weights(tmp_path / "m.gguf")
    content, seeing = gguf.read_bytes(), weights(tmp_path / "p.gguf", "gemma")
    draft = weights(tmp_path / "d.gguf", "qwen2")
    name = store_writing.check("me/mine:v1")
    path = store_writing.file(name, gguf, FULL, projectors=[seeing], draft=draft)
    assert path == store.path / "manifests/registry.ollama.ai/me/mine/v1"
    assert not gguf.exists()  # it became the blob
    assert seeing.exists()
    assert draft.exists()
    found = find("me/mine:v1")
    assert found.gguf.read_bytes() == content
    assert settings_of(found) == FULL
    assert [one.read_bytes() for one in found.projectors] == [seeing.read_bytes()]
    assert found.draft is not None
    assert found.draft.read_bytes() == draft.read_bytes()
    manifest = json.loads(path.read_text())
    assert manifest["schemaVersion"] == 2
    digest = manifest["config"]["digest"].replace(":", "-")
    config = json.loads((store.path / "blobs" / digest).read_text())
    assert config["model_format"] == "gguf"
    assert config["model_family"] == "llama"
    assert config["model_families"] == ["llama"]
    assert config["file_type"] == "unknown"  # the tiny file does not say it
    assert config["draft"] == {"model_format": "gguf", "architecture": "qwen2"}
    assert shown_in_store(store.path, "registry.ollama.ai/me/mine/v1") == (
        "completion", "tools", "vision",
    )  # fmt: skip
    # All have the rights that Ollama gives them, and nothing else is left behind.
    assert {oct(one.stat().st_mode)[-3:] for one in (store.path / "blobs").iterdir()} == {"644"}
    assert sorted(one.name for one in store.path.iterdir()) == ["blobs", "manifests"]


def test_architectures_with_a_renderer_of_their_own_get_it(store: Store, tmp_path: Path) -> None:
    gguf = weights(tmp_path / "m.gguf", "gemma4, keys as values")
    store_writing.file(parse_name("g"), gguf, Settings())
    assert (find("g").renderer, find("g").parser) == ("gemma4", "gemma4")
    assert "thinking" in shown_in_store(store.path, f"{LIBRARY}/g/latest")


def test_a_tag_that_is_there_is_never_replaced(store: Store, tmp_path: Path) -> None:
    store.add(f"{LIBRARY}/taken/latest", model=b"GGUF of another")
    for text in ("taken", "TAKEN:latest"):
        with pytest.raises(UserError, match="`ollama rm"):
            store_writing.check(text)
    gguf = weights(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="appeared in Ollama meanwhile"):
        store_writing.file(parse_name("taken"), gguf, Settings())
    assert find("taken").gguf.read_bytes() == b"GGUF of another"


def test_on_demand_the_manifest_is_replaced_and_nothing_else(store: Store, tmp_path: Path) -> None:
    old = store.add(f"{LIBRARY}/Taken/latest", model=b"GGUF of another", license="Do as you like.")
    other = store.add(f"{LIBRARY}/other/latest", model=b"GGUF of another")
    before = {one.name: one.read_bytes() for one in (store.path / "blobs").iterdir()}
    kept = other.read_bytes()
    gguf = weights(tmp_path / "m.gguf")
    content = gguf.read_bytes()
    name = store_writing.check("taken", overwrite=True)
    path = store_writing.file(name, gguf, FULL, overwrite=True)
    assert path == old  # its case is kept
    assert find("taken").gguf.read_bytes() == content
    assert settings_of(find("taken")) == FULL
    assert other.read_bytes() == kept
    # Blobs are named by their content, so that none changed; those without a name are Ollama's.
    after = {one.name: one.read_bytes() for one in (store.path / "blobs").iterdir()}
    assert before.items() <= after.items()
    assert sorted(one.name for one in store.path.iterdir()) == ["blobs", "manifests"]


def test_a_failed_replacement_leaves_the_old_model(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(f"{LIBRARY}/taken/latest", model=b"GGUF of another")
    gguf, replace = weights(tmp_path / "m.gguf"), os.replace

    def refuses(source: object, target: object) -> None:
        if "manifests" in str(target):
            raise OSError(28, "No space left on device")
        replace(str(source), str(target))

    monkeypatch.setattr(os, "replace", refuses)
    with pytest.raises(OSError, match="No space"):
        store_writing.file(parse_name("taken"), gguf, Settings(), overwrite=True)
    assert find("taken").gguf.read_bytes() == b"GGUF of another"
    assert sorted(one.name for one in store.path.iterdir()) == ["blobs", "manifests"]


def test_a_model_in_another_store_is_not_replaced(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Store(tmp_path / "system")
    other.add(f"{LIBRARY}/taken/latest", model=b"GGUF of another")
    monkeypatch.setattr("convert.ollama.store.stores", lambda: [store.path, other.path])
    with pytest.raises(UserError, match="give another name, or remove that one"):
        store_writing.check("taken", overwrite=True)
    store_writing.check("free", overwrite=True)


def test_a_blob_that_is_there_is_shared(store: Store, tmp_path: Path) -> None:
    first = weights(tmp_path / "m.gguf")
    content = first.read_bytes()
    store_writing.file(parse_name("one"), first, Settings())
    inode = find("one").gguf.stat().st_ino
    (tmp_path / "n.gguf").write_bytes(content)
    store_writing.file(parse_name("two"), tmp_path / "n.gguf", Settings())
    assert find("two").gguf.stat().st_ino == inode


def test_between_disks_it_is_copied(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = weights(tmp_path / "m.gguf")
    content, replace = gguf.read_bytes(), os.replace

    def refuses(source: object, target: object) -> None:
        if source == gguf:
            raise OSError(18, "Invalid cross-device link")
        replace(str(source), str(target))

    monkeypatch.setattr(os, "replace", refuses)
    store_writing.file(parse_name("far"), gguf, Settings())
    assert find("far").gguf.read_bytes() == content
    assert not gguf.exists()


def test_a_store_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_folder() as folder:
        Store(folder / "store")
        (folder / "store").chmod(0o755)
        monkeypatch.setenv("OLLAMA_MODELS", str(folder / "store"))
        for place in (folder / "store", folder / "store" / "blobs"):
            place.chmod(0o555)
        with as_a_stranger(), pytest.raises(UserError, match="may not be written by you"):
            store_writing.check("mine")


def test_without_a_store_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="OLLAMA_MODELS"):
        store_writing.check("mine")


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (999, "999"),
        (1_000, "1K"),
        (135_000_000, "135M"),
        (494_032_768, "494.03M"),
        (7_000_000_000, "7B"),
        (7_615_616_512, "7.6B"),
    ],
)
def test_sizes_are_said_as_ollama_says_them(count: int, said: str) -> None:
    assert store_writing.in_words(count) == said
