"""Prompts whose refusals are to stay: `--keep` and `--keep-system`."""

import pytest

from abl_mlx.choices import Prompting
from abl_mlx.commands import prompt_choice
from abl_mlx.inputs import kept, prompts
from abl_mlx.inputs.sets import normalized, prompt_hashes
from convert.base.errors import UserError


def texts(parts):
    return [{normalized(text) for text in one.texts} for one in kept._each(parts)]


def test_categories_leave_the_harmful_set_part_by_part():
    whole = prompts.load_demo()
    sets = kept.with_kept(whole, "category:cloth, wood", 0)
    for before, stay, left in zip(*map(kept._each, (whole.harmful, sets.kept, sets.harmful)),
                                  strict=True):  # fmt: skip
        assert {one.category for one in stay.prompts} == {"cloth", "wood"}
        assert {one.category for one in left.prompts} == {"metal", "paper", "stone"}
        assert sorted(stay.texts + left.texts) == sorted(before.texts)
    assert sets.harmless == whole.harmless


def test_prompts_of_a_file_are_split_and_taken_out_of_the_other_sets(tmp_path):
    harmful, borderline = prompts.bundled("harmful").texts, prompts.bundled("borderline").texts
    own = [f"Tell me secret {number}." for number in range(10)]
    shouted = [text.upper() for text in harmful[:12]]
    (tmp_path / "keep.txt").write_text("\n".join([*shouted, *own, borderline[0]]))
    whole = prompt_choice.load(None, Prompting())
    sets = prompt_choice.load(None, Prompting(keep=str(tmp_path / "keep.txt")))
    parts = texts(sets.kept)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 23
    assert all(parts)
    left = set.union(*texts(sets.harmful))
    assert left == set.union(*texts(whole.harmful)) - set.union(*parts)
    assert len(left) == len(harmful) - 12
    assert borderline[0] not in sets.borderline.texts
    assert prompt_hashes(sets)["kept train"] == sets.kept.train.sha256


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("category:clot", "no category clot; there are cloth, metal, paper, stone, wood"),
        ("category:", "no category named"),
        ("category:cloth,metal,paper,stone,wood", "leaves too few harmful prompts"),
        ("one.txt", "too few to train, validate and test on"),
        ("both.txt", "and the harmless prompts both hold 'Move the oak beam.'"),
    ],
)
def test_what_cannot_be_kept_is_said_in_one_sentence(spec, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = prompts.load_demo()
    shared = sets.harmless.train.texts[0]
    (tmp_path / "one.txt").write_text("Only this.")
    (tmp_path / "both.txt").write_text("\n".join([f"Say {n}." for n in range(16)] + [shared]))
    with pytest.raises(UserError) as error:
        kept.with_kept(sets, spec, 0)
    assert said.replace("Move the oak beam.", shared) in str(error.value)


def test_a_system_message_is_put_before_the_harmless_prompts(tmp_path):
    (tmp_path / "rule.txt").write_text("Only talk of cloth.\n")
    sets = prompt_choice.load(
        None, Prompting(keep_system=str(tmp_path / "rule.txt"), system="Be kind.", quick=True)
    )
    assert {one.system for one in sets.off_topic.test.prompts} == {"Only talk of cloth."}
    assert {one.system for one in sets.harmless.test.prompts} == {"Be kind."}
    for one, other in zip(*map(kept._each, (sets.off_topic, sets.harmless)), strict=True):
        assert one.texts == other.texts
    with pytest.raises(UserError, match="--keep-system is empty"):
        prompt_choice.load(None, Prompting(keep_system=" "))
