"""The desk takes turns between pieces of work; `in_turns` makes such work of what calls back."""

import threading
import time

import pytest

from abl_mlx.models import hooks
from abl_mlx.studio.desk import Desk, Job, Loaded
from abl_mlx.studio.turns import in_turns
from convert.base.errors import UserError


class _Enough(Exception):
    """Ends a desk."""


def done(works, jobs):
    """The events of jobs in the order in which they came, each with its job's name."""
    desk, told, left = Desk(), [], [len(jobs)]

    def telling(name):
        def tell(event):
            told.append((name, event))
            left[0] -= event is None
            if not left[0]:
                raise _Enough

        return tell

    for name, body in jobs:
        desk.submit(Job(name, body, telling(name)))
    with pytest.raises(_Enough):
        desk.run(lambda: Loaded(None, works, ""))
    return told


def test_quick_work_has_many_steps_beside_one_long_step():
    def long(_, body):
        for number in range(3):
            time.sleep(0.2)
            yield {"step": number}

    def quick(_, body):
        for number in range(20):
            yield {"step": number}

    told = [name for name, _ in done({"long": long, "quick": quick}, [("long", {}), ("quick", {})])]
    assert told.index("quick") <= 1
    assert len(told) - told[::-1].index("quick") < len(told) - 2  # ends before the long one


def test_what_goes_wrong_is_told():
    def wrong(_, body):
        yield {}
        raise UserError("it is wrong.")

    told = done({"wrong": wrong}, [("wrong", {}), ("other", {})])
    assert ("wrong", {"error": "it is wrong."}) in told
    assert ("other", {"error": "there is no such work."}) in told


def test_work_goes_on_only_in_its_turn():
    seen = []

    def work(tell):
        for number in range(3):
            seen.append((number, threading.current_thread() is not threading.main_thread()))
            tell({"number": number})

    steps = in_turns(work)
    assert seen == []
    assert [next(steps), next(steps)] == [{"number": 0}, {"number": 1}]
    assert seen == [(0, True), (1, True)]
    assert list(steps) == [{"number": 2}]


def test_work_that_is_left_cleans_up():
    cleaned, scopes = [], []

    def work(tell):
        try:
            scopes.append(hooks.scopes())
            tell({})
        finally:
            cleaned.append(True)

    steps = in_turns(work)
    next(steps)
    steps.close()
    assert cleaned == [True]
    assert len(scopes[0]) == len(hooks.scopes()) + 1


def test_an_error_of_work_comes_out():
    def work(tell):
        raise UserError("it is wrong.")

    with pytest.raises(UserError, match=r"it is wrong\."):
        next(in_turns(work))
