"""A record is always written, as JSON that every reader takes."""

import json
import math

import pytest

from abl_mlx.support.strict_json import finite, to_json


def strictly(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_figures_that_are_not_finite_are_null_and_named():
    record = {"kl": {"k1": math.nan, "k32": 0.5}, "scores": [1.0, math.inf, {"x": -math.inf}]}
    assert strictly(to_json(record)) == {
        "kl": {"k1": None, "k32": 0.5},
        "scores": [1.0, None, {"x": None}],
        "not_finite": {"kl.k1": "nan", "scores.1": "inf", "scores.2.x": "-inf"},
    }
    assert math.isnan(record["kl"]["k1"])  # the record itself stays


@pytest.mark.parametrize(
    "record", [{}, {"a": [1, "nan", None, True, 1e300, {"b": []}], "é": "“quoted”"}]
)
def test_other_records_are_what_they_were(record):
    assert to_json(record) == json.dumps(record, indent=2, ensure_ascii=False)
    assert finite(record) == record
