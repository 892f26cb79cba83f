"""What the page says of a bar that no terminal shows."""

from abl_mlx.support.console import Progress, progress, progress_to, running


def test_the_innermost_bar_is_told():
    assert running() is None
    with progress(4, "outer") as outer:
        outer.update(3)
        with progress(None, "inner", "step") as inner:
            inner.update()
            assert running() == Progress("inner", 1, None)
        assert running() == Progress("outer", 3, 4)
        with progress_to("third", "B") as moved:
            moved(2, 9)
            moved(5, 9)
            assert running() == Progress("third", 5, 9)
    assert running() is None
