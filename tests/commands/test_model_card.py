"""Model cards of folders, as metadata of GGUFs; test_folders_to_gguf has the converter's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from abl_mlx.choices import ApplyOptions
from abl_mlx.commands import conversion, measure_apply
from abl_mlx.demo import MODEL_PATH
from convert.architectures.model_card import card_keys
from convert.gguf.file import metadata

CARD = """---
license: mit
language: [en, de]
tags: [chat, abl-mlx]
base_model: some/Parent-7B
---
# A card
"""


@pytest.mark.parametrize(
    ("front", "wanted"),
    [
        ("license: mit", {"general.license": "mit"}),
        ("license: [mit, other]", {"general.license": "mit,other"}),
        ("language:\n- no\n- en", {"general.languages": ["no", "en"]}),
        ("version: 1.5", {"general.version": "1.5"}),
        ("tags: [a, {b: c}, [d], 1]", {"general.tags": ["a", "1"]}),
        ("license: {a: b}\nauthor: [a, b]", {}),
        ("license: yes\nlicense_name: 2024-01-01", {}),
        ("base_model: [{name: [a], url: u}]", {
            "general.base_model.count": 1, "general.base_model.0.url": "u"}),
        ("base_model: []", {"general.base_model.count": 0}),
        ("a: &a [x, x]\nb: &b [*a, *a]\ntags: [*b, *b]", {}),
        ("license: \"\\ud800\"", {"general.license": "?"}),
        ("a: [", {}), ("- a", {}), ("", {}), ("license:", {}), ("\0", {}),
    ],
)  # fmt: skip
def test_whatever_the_front_matter_holds(tmp_path: Path, front: str, wanted: object) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\ntext")
    assert card_keys(tmp_path) == wanted


def test_folders_without_a_readable_card(tmp_path: Path) -> None:
    assert card_keys(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert card_keys(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * (1 << 21))
    assert card_keys(tmp_path) == {}


def test_an_edited_gguf_names_the_folder_after_its_parents(tmp_path: Path, direction: Path) -> None:
    folder, out = tmp_path / "child", tmp_path / "out.gguf"
    shutil.copytree(MODEL_PATH, folder)
    (folder / "README.md").write_text(CARD)
    measure_apply.apply(direction, str(folder), [out], ApplyOptions())
    said = metadata(out)
    assert said["general.license"] == "mit"
    assert said["general.languages"] == ["en", "de"]
    assert said["general.tags"] == ["chat", "abl-mlx", "abliterated"]
    assert said["general.base_model.count"] == 2
    assert said["general.base_model.0.repo_url"] == "https://huggingface.co/some/Parent-7B"
    assert said["general.base_model.1.name"] == "child"


def test_an_edited_folder_keeps_its_tags_in_a_gguf(tmp_path: Path, direction: Path) -> None:
    folder, out = tmp_path / "edited", tmp_path / "out.gguf"
    measure_apply.apply(direction, "demo", [folder], ApplyOptions())
    conversion.convert(str(folder), out)
    assert {"abliterated", "abl-mlx"} <= set(metadata(out)["general.tags"])
    assert metadata(out)["abl_mlx.edited"]
