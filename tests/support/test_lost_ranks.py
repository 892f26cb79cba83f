"""A watch ends the process for a lost connection, and for nothing else."""

import os
import socket
import threading

import pytest

from abl_mlx.support import lost_ranks


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What happens in place of the end of the process."""
    happened = threading.Event()
    monkeypatch.setattr(lost_ranks, "GRACE", 0.1)
    monkeypatch.setattr(lost_ranks.Watch, "_end", lambda self: (happened.set(), self.stop()))
    return happened


def watched() -> tuple[socket.socket, socket.socket, lost_ranks.Watch]:
    before = lost_ranks.sockets()
    here, other = socket.socketpair()
    mine = {one for one in lost_ranks.sockets() - before if one[0] == here.fileno()}
    watch = lost_ranks.Watch(mine, "lost", lambda: None)
    watch.start()
    return here, other, watch


def test_a_connection_whose_other_end_is_closed_ends_the_process(over: threading.Event) -> None:
    here, other, _ = watched()
    assert not over.wait(0.7)
    other.close()
    assert over.wait(10)
    here.close()


def test_the_end_of_the_command_ends_the_watch(over: threading.Event) -> None:
    here, other, watch = watched()
    watch.stop()
    other.close()
    assert not over.wait(1)
    here.close()


def test_a_closed_socket_whose_number_another_file_has_is_no_loss(over: threading.Event) -> None:
    here, other, watch = watched()
    reading, writing = os.pipe()
    os.close(writing)  # poll tells of a pipe that was closed, too
    os.dup2(reading, here.fileno())
    other.close()
    assert not over.wait(1.5)
    watch.stop()
    here.close()
    os.close(reading)
