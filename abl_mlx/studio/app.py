"""The web app: static pages, and routes that pass requests on to the desk.

Every request must name this machine (Host) and come from no other origin; every route under /api
also needs the token of the address that was printed. Pages may load nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from abl_mlx.serving.door import Door
from abl_mlx.studio.desk import Desk, Event, Job
from abl_mlx.studio.dropped import Dropped

STATIC = Path(__file__).with_name("static")

#: The largest body of a request, in bytes.
_LARGEST = 4 << 20

_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

#: Of a report, which has its style in itself and no script of another origin.
_REPORT = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts"
)


class Guard:
    """Lets requests in by their headers, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, door: Door, token: str) -> None:
        self._app, self._door, self._token = app, door, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refused = self._door.refusal(headers.get("host"), headers.get("origin"))
        status = 403
        if refused is None and scope["path"].startswith("/api/"):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                status, refused = 401, "the token is wrong: open the address that was printed."
        own = _REPORT if scope["path"].startswith("/report/") else _PAGE

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_headers(own)]
            await send(message)

        if refused is not None:
            await JSONResponse({"error": refused}, status)(scope, receive, sending)
            return
        await self._app(scope, receive, sending)


def _headers(policy: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cache-control", b"no-store"),
    ]


class Reports:
    """Pages that were made, under addresses that nobody can guess."""

    def __init__(self) -> None:
        self._pages: dict[str, str] = {}

    def keep(self, page: str) -> str:
        """Keep a page and give its address."""
        name = secrets.token_urlsafe(16)
        self._pages[name] = page
        return f"/report/{name}"

    async def send(self, request: Request) -> Response:
        page = self._pages.get(request.path_params["name"])
        if page is None:
            return Response("there is no such report.", 404, media_type="text/plain")
        return Response(page, media_type="text/html")


def app(
    desk: Desk, about: Callable[[], Event], reports: Reports, dropped: Dropped, door: Door,
    token: str,
) -> ASGIApp:  # fmt: skip
    """The web app.

    Args:
        desk: does the work of a POST to ``/api/NAME``, whose events are sent as they come.
        about: what the page is told of the model.
        reports: the pages under ``/report``.
        dropped: takes the files that are sent to ``/api/drop``.
        door: who is let in.
        token: the secret of the printed address.
    """

    async def told(request: Request) -> Response:
        return JSONResponse(about())

    async def posted(request: Request) -> Response:
        return await _answer(desk, request)

    routes = [
        Route("/api/about", told),
        Route("/api/drop", dropped.take, methods=["POST"]),
        Route("/api/{name}", posted, methods=["POST"]),
        Route("/report/{name}", reports.send),
        *(Route(f"/{name}", _file(place)) for name, place in files().items()),
    ]
    return Guard(Starlette(routes=routes), door, token)


def files() -> dict[str, Path]:
    """Path in the app -> static file."""
    found = {one.name: one for one in sorted(STATIC.iterdir()) if one.is_file()}
    return {"" if name == "index.html" else name: place for name, place in found.items()}


def _file(place: Path) -> Callable[[Request], Any]:
    async def send(request: Request) -> Response:
        return FileResponse(place)

    return send


async def _answer(desk: Desk, request: Request) -> Response:
    """Start a piece of work, and stream its events as lines of JSON."""
    raw = b""
    async for piece in request.stream():
        raw += piece
        if len(raw) > _LARGEST:
            return JSONResponse({"error": "the request is too large."}, 413)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        return JSONResponse({"error": "the request must be a JSON object."}, 400)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

    def tell(event: Event | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    job = Job(request.path_params["name"], body, tell)
    desk.submit(job)

    async def lines() -> AsyncIterator[str]:
        try:
            while (event := await events.get()) is not None:
                if event:
                    yield json.dumps(event) + "\n"
        finally:  # also when the page has gone
            job.cancelled.set()

    return StreamingResponse(lines(), media_type="application/x-ndjson")
