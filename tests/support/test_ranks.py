"""Sharing out work: nobody is left out, and the shares cost about the same."""

import pytest

from abl_mlx.support import ranks


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 3)


def test_shares_hold_every_number_once_and_cost_the_same(three):
    costs = [1, 9, 2, 8, 3, 7, 4, 6, 5, 5]
    parts = ranks.shares(costs)
    assert sorted(number for part in parts for number in part) == list(range(10))
    sums = [sum(costs[number] for number in part) for part in parts]
    assert max(sums) - min(sums) <= 3
    assert all(part == sorted(part) for part in parts)


def test_there_may_be_fewer_pieces_than_ranks(three):
    assert sorted(map(len, ranks.shares([5]))) == [0, 0, 1]


def test_results_are_put_in_order(three):
    parts = ranks.shares([3, 1, 2, 2])
    assert ranks.joined(parts, [[str(n) for n in part] for part in parts]) == ["0", "1", "2", "3"]


def test_one_process_exchanges_nothing():
    assert (ranks.size(), ranks.rank()) == (1, 0)
    assert ranks.gathered("a value", {"a": 1}) == [{"a": 1}]
    assert ranks.each("squares", [1, 2], lambda n: n * n) == [1, 4]
    ranks.agree("nothing")
    ranks.check_same({"a thing": "0"})
