"""Changes of MLPs: what they do to the stream at the ends of harmful and harmless prompts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import measuring, rome
from abl_mlx.edits.steering import ablation
from abl_mlx.edits.update import Update
from abl_mlx.inputs import prompts
from abl_mlx.models import capture
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers
from abl_mlx.support.arrays import numpy_of
from convert.base.errors import UserError
from tests.support import small_models

POSITIONS = (-2, -1)


@pytest.fixture(scope="module", params=["demo", "easy"])
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A model, its prompts, their means, and the keys; norms follow the MLPs of easy."""
    if request.param == "demo":
        chat, sets = load(MODEL_PATH), prompts.load_demo()
    else:
        chat = load(small_models.folder("easy"))
        sets = small_models.prompt_sets("easy")
    writers = find_writers(chat)
    encoded = [
        [chat.encode(one) for one in part.train.take(24).prompts]
        for part in (sets.harmful, sets.harmless)
    ]
    candidates = measuring.measure(chat, *encoded, POSITIONS)
    keys = rome.KeyPass(chat, writers, *encoded, POSITIONS)
    directions = numpy_of(candidates.leads[:, -1])
    return {"chat": chat, "writers": writers, "encoded": encoded, "keys": keys,
            "directions": directions, "mean": numpy_of(candidates.harmless_mean)}  # fmt: skip


def along(seen: dict[str, Any], which: int, update: Update | None = None) -> np.ndarray:
    """Components along each layer's direction at the keys, (N, L, P)."""
    if update is None:
        states = capture.full(seen["chat"], seen["encoded"][which], POSITIONS)
    else:
        with ablation(seen["writers"], update):
            states = capture.full(seen["chat"], seen["encoded"][which], POSITIONS)
    found: np.ndarray = np.einsum("nlpd,ld->nlp", numpy_of(states), seen["directions"])
    return found


@pytest.mark.parametrize(
    "form",
    [
        rome.Form(1, 3, keep=1.0, reach=1.0, ridge=0.1),
        rome.Form(2, 3, reach=1.0, form=rome.NULL_SPACE, ridge=0.1),
    ],
)
def test_harmful_prompts_end_where_harmless_ones_do(seen: dict[str, Any], form: rome.Form) -> None:
    updates = seen["keys"].updates(form, seen["directions"], seen["mean"])
    assert sorted(updates) == list(range(form.first, 4))
    aim = np.einsum("lpd,ld->lp", seen["mean"], seen["directions"])
    harmful, harmless = along(seen, 0), along(seen, 1)
    after, same = along(seen, 0, Update(updates)), along(seen, 1, Update(updates))
    gap = np.abs(harmful - aim)[:, form.last].mean()
    assert np.abs(after - aim)[:, form.last].mean() < 0.35 * gap
    assert np.abs(same - harmless)[:, form.last].mean() < 0.1 * gap
    assert np.array_equal(after[:, : form.first], harmful[:, : form.first])


def test_in_the_null_space_prompts_that_were_kept_give_the_same_logits(
    seen: dict[str, Any],
) -> None:
    form = rome.Form(2, 3, reach=1.0, form=rome.NULL_SPACE, ridge=0.1)
    updates = seen["keys"].updates(form, seen["directions"], seen["mean"])
    tokens = mx.array([seen["encoded"][1][0]], mx.int32)
    plain = seen["chat"].model(tokens)
    with ablation(seen["writers"], Update(updates)):
        edited = seen["chat"].model(tokens)
    assert mx.abs(edited - plain).max().item() < 1e-2


def test_tokens_are_counted(seen: dict[str, Any]) -> None:
    keys, before = seen["keys"], seen["keys"].tokens
    keys.updates(rome.Form(3, 3), seen["directions"], seen["mean"])
    prefix = len(seen["encoded"][0][0]) and keys._prefix.length
    whole = sum(len(one) - prefix for part in seen["encoded"] for one in part)
    assert keys.tokens - before == whole


def test_models_with_experts_are_refused(tiny_folder: Any) -> None:
    chat = load(tiny_folder("qwen3_moe"))
    with pytest.raises(UserError, match="has experts"):
        rome.mlps(find_writers(chat), len(chat.layers))
