"""Names of strengths, and who may send requests."""

import pytest

from abl_mlx.serving.dials import Dials, UnknownModel
from abl_mlx.serving.door import Door

DIALS = Dials("demo")


@pytest.mark.parametrize(
    ("model", "steering", "name", "strength"),
    [
        ("demo", None, "demo", 1.0),
        (None, None, "demo", 1.0),
        ("default_model", None, "demo", 1.0),
        ("demo@0.7", None, "demo@0.7", 0.7),
        ("demo@-1", None, "demo@-1", -1.0),
        ("demo@1.0", None, "demo", 1.0),
        ("demo@-0", None, "demo@0", 0.0),
        ("demo", 0.25, "demo@0.25", 0.25),
        ("demo@0.5", 0.5, "demo@0.5", 0.5),
        ("demo@0.12345678", None, "demo@0.123457", 0.123457),
    ],
)
def test_strengths(model, steering, name, strength):
    found = DIALS.of(model, steering)
    assert (found.name, found.strength) == (name, strength)
    assert DIALS.of(found.name) == found


def test_a_name_may_hold_the_sign():
    dials = Dials("owner/model@main", 0.5)
    assert dials.of("owner/model@main").strength == 0.5
    assert dials.of("owner/model@main@2").strength == 2
    assert [one.name for one in dials.listed][:2] == ["owner/model@main", "owner/model@main@0"]


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4o@1", "../demo", "@1"])
def test_other_models_are_unknown(model):
    with pytest.raises(UnknownModel, match="this server has demo"):
        DIALS.of(model)


@pytest.mark.parametrize(
    ("model", "steering"),
    [("demo@much", None), ("demo@nan", None), ("demo@inf", None), ("demo", "1"), ("demo", True),
     ("demo", float("nan")), ("demo@0.5", 0.7)],
)  # fmt: skip
def test_no_strengths(model, steering):
    with pytest.raises(ValueError, match=r"number|strength"):
        DIALS.of(model, steering)


HERE = "127.0.0.1:8080"


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (HERE, None),
        ("localhost:8080", None),
        ("[::1]:8080", None),
        ("host.docker.internal:8080", None),
        (HERE, f"http://{HERE}"),
        (HERE, "http://localhost:3000"),
    ],
)
def test_let_in(host, origin):
    assert Door(origins=frozenset({"http://localhost:3000"})).refusal(host, origin) is None


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (None, None),
        ("attacker.example:8080", None),
        ("192.168.0.7:8080", None),
        ("[", None),
        ("127.0.0.1.attacker.example", None),
        (HERE, "http://attacker.example"),
        (HERE, "null"),
        (HERE, "http://127.0.0.1:9090"),
        ("attacker.example", "http://attacker.example"),
    ],
)
def test_kept_out(host, origin):
    assert Door().refusal(host, origin).endswith(".")


def test_a_server_for_others_is_called_by_its_addresses():
    door = Door("0.0.0.0")
    assert door.refusal("192.168.0.7:8080", None) is None
    assert door.refusal("attacker.example:8080", None) is not None
