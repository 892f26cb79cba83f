"""Starts the studio: the web server in a thread of its own, the model in the main thread."""

from __future__ import annotations

import gc
import importlib.util
import secrets
import socket
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from abl_mlx import __version__
from abl_mlx.serving.door import Door
from abl_mlx.studio.desk import Desk, Event, Loaded
from abl_mlx.support import clock, interrupts
from abl_mlx.support.console import running, say
from convert.base.errors import UserError

if TYPE_CHECKING:  # the page is served before the heavy imports
    from abl_mlx.choices import SteerOptions
    from abl_mlx.studio.app import Reports
    from abl_mlx.studio.dropped import Dropped


@dataclass(frozen=True)
class Place:
    """Where a studio listens.

    Attributes:
        port: its port on 127.0.0.1.
        token: the secret of its address.
    """

    port: int
    token: str

    @property
    def url(self) -> str:
        """The address to open. The token is behind the sign #, so no server ever gets it."""
        return f"http://127.0.0.1:{self.port}/#/talk?token={self.token}"


def launch(
    text: str, options: SteerOptions, *, port: int = 0, opens: bool = True,
    runtime: str | None = None,
) -> None:  # fmt: skip
    """Run the studio until Ctrl-C.

    Args:
        text: the model, as the user typed it.
        options: the direction and the edit.
        port: the port; 0 for a free one.
        opens: whether to open a browser.
        runtime: what a GGUF replies in, as for `eval`; None for the first available one.

    Raises:
        UserError: when the model or the direction cannot be loaded, or the port is taken.
    """
    desk = Desk()
    with (
        served(desk, text, options, port) as (place, reports, dropped),
        ExitStack() as stack,
    ):
        say(f"the studio is at {place.url}; Ctrl-C ends it")
        if opens:
            webbrowser.open(place.url)
        try:
            desk.run(partial(_load, text, options, runtime, reports, dropped, stack))
        except KeyboardInterrupt:
            interrupts.forget()
            say("stopped")


@contextmanager
def served(
    desk: Desk, text: str, options: SteerOptions, port: int
) -> Iterator[tuple[Place, Reports, Dropped]]:
    """Context manager in which the pages are served; the work is done where the desk runs.

    It yields where, and what keeps further pages and dropped files.

    Raises:
        UserError: when the web server is not installed, or the port is taken.
    """
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise UserError("the studio needs a web server: pip install 'abl-mlx[studio]'.")
    import uvicorn

    from abl_mlx.studio.app import Reports, app
    from abl_mlx.studio.dropped import Dropped

    with _listening(port) as listener:
        place = Place(listener.getsockname()[1], secrets.token_urlsafe(24))
        reports, dropped = Reports(), Dropped()
        web = app(desk, lambda: about(desk, text, options), reports, dropped, Door(), place.token)
        settings = uvicorn.Config(
            web, log_level="error", access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield place, reports, dropped
        finally:
            server.should_exit = True
            thread.join(5)


def _load(
    text: str, options: SteerOptions, runtime: str | None, reports: Reports, dropped: Dropped,
    stack: ExitStack,
) -> Loaded:  # fmt: skip
    gc.disable()  # what is imported stays; looking for garbage takes a tenth of the time
    try:
        from abl_mlx.studio.works import load
    finally:
        gc.freeze()  # nor is any looked for there later
        gc.enable()

    return load(text, options, runtime, reports, dropped, stack)


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()  # from here on a browser waits instead of being refused
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used ({error.strerror}): choose another with --port, or "
                "leave --port out."
            ) from None
        yield listener


def about(desk: Desk, text: str, options: SteerOptions) -> Event:
    """What a page is told of the model; until it is loaded, what is being done and how far."""
    known = {
        "version": __version__,
        "name": text,
        "strength": options.editing.strength,
        "direction": None if options.direction is None else str(options.direction),
    }
    loaded = desk.loaded
    if loaded is None:
        at = running()
        doing = {"doing": clock.now() or "start", "progress": None if at is None else asdict(at)}
        return {**known, **doing, "ready": False}
    steered, direction = loaded.steered, loaded.steered.direction
    summary = direction.metadata.get("summary", {})
    return {
        **known,
        "name": steered.name,
        "ready": True,
        "talks_in": loaded.talks_in,
        "architecture": steered.chat.model_type,
        "layers": len(steered.chat.layers),
        "width": steered.chat.width,
        "rank": int(direction.selected.shape[-2]),
        "method": direction.metadata.get("method"),
        "layer": summary.get("layer"),
        "position": summary.get("position"),
        "means": direction.candidates is not None and summary.get("position") is not None,
    }
