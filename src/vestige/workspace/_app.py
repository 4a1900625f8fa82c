"""The workspace as a web server of this computer alone: its pages, what they ask for, and who may ask."""

import json
import secrets
import socket
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from vestige.errors import MissingExtra, UserError
from vestige.parsing import parse_object
from vestige.progress import announce
from vestige.reports import make_workspace_page, render_page
from vestige.workspace._ask import Asker, choose_folder
from vestige.workspace._folder import Workspace
from vestige.workspace._kinds import find_kind
from vestige.workspace._rows import find_rows

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
    from starlette.requests import Request
    from starlette.responses import (
        HTMLResponse,
        PlainTextResponse,
        RedirectResponse,
        Response,
        StreamingResponse,
    )
    from starlette.routing import Route
    from starlette.types import ASGIApp
except ImportError as error:
    raise MissingExtra('The workspace needs a web server.\nType: pip install "vestige[view]"') from error

Json = dict[str, Any]
LOOPBACK = "127.0.0.1"
_PAGES_KEPT = 8
_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_LONGEST_QUESTION = 20_000


def view(folder: str | Path, port: int = 0, index: str | Path | None = None) -> None:
    """Serve a folder of results to the browser on this computer until Ctrl-C; a single run is served as its report.

    Args:
        folder: A folder with runs, indexes, trainings, audits and other results in it or below it; or one of them.
        port: Port on the loopback address; 0 takes a free one, and the line printed names it.
        index: An index, in that folder, whose model is loaded at once, to be asked.

    Raises:
        UserError: There is no such folder, nothing in it is a result, the run in it cannot be shown, or the port is
            taken.
    """
    workspace = Workspace(Path(folder))
    if workspace.folder.resolve().parent == workspace.folder.resolve():
        raise UserError(f"{folder} is the root of all files, expected a folder of results: vestige view FOLDER")
    if not workspace.results():
        raise UserError(
            f"{folder} holds no run, index, training or other result, and no folder below it does. Give one that does: "
            "vestige view FOLDER"
        )
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((LOOPBACK, port))
        except OSError as error:
            raise UserError(
                f"Port {port} cannot be used ({error.strerror}).\nType: vestige view {folder}   (takes a free port)"
            ) from error
        number, token = listening.getsockname()[1], secrets.token_urlsafe(24)
        app = make_app(workspace.folder, token=token, port=number, index=None if index is None else Path(index))
        what = "Report of" if app.state.single else "Workspace"
        announce(f"{what} {folder}: http://{LOOPBACK}:{number}/?token={token}   (Ctrl-C ends it)")
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            app.state.asker.close()
            announce("Closed.")


def make_app(folder: str | Path, *, token: str, port: int, index: Path | None = None) -> Starlette:
    """Return the server of a folder, which answers only who knows the token.

    Args:
        folder: As for `view`.
        token: What the first address has to hold; a cookie keeps it from then on.
        port: Where it will listen: other addresses are refused.
        index: As for `view`.

    Raises:
        UserError: As for `view`.
    """
    served = _Server(Workspace(Path(folder)))
    app = Starlette(
        routes=[
            Route("/", served.start),
            Route("/page", served.page),
            Route("/version", served.version),
            Route("/api/list", served.results),
            Route("/api/open", served.open),
            Route("/api/rows", served.rows),
            Route("/api/events", served.events),
            Route("/api/ask", served.ask, methods=["POST"]),
            Route("/api/stop", served.stop, methods=["POST"]),
        ],
        exception_handlers={UserError: _refuse},
    )
    app.add_middleware(_Guard, token=token, port=port)
    app.state.asker, app.state.single = served.asker, served.single
    if index is not None:
        served.begin(index, "")
    return app


def _json(value: Json, status: int = 200) -> Response:
    # Names of files may hold what is no UTF-8: it travels as escapes.
    return Response(json.dumps(value), status, media_type="application/json")


def _refuse(_: Request, error: Exception) -> Response:
    return _json({"error": str(error)}, 400)


class _Guard(BaseHTTPMiddleware):
    """Turns away what does not come from a page of this server: other names, other sites, and those without the token.

    A foreign page may send requests here, and a foreign name may resolve to this computer: neither has the cookie,
    which is `SameSite=Strict`, and both say in their headers who they are.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        super().__init__(app)
        self._token, self._port = token, port

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = self._turn_away(request) or await call_next(request)
        response.headers.update(_HEADERS)
        return response

    def _turn_away(self, request: Request) -> Response | None:
        host, name = request.headers.get("host", ""), f"vestige-{self._port}"
        site = request.headers.get("sec-fetch-site", "none")
        if host not in (f"{LOOPBACK}:{self._port}", f"localhost:{self._port}"):
            return PlainTextResponse("Only pages of this computer are served here.", 403)
        given = request.query_params.get("token")
        if given is not None and request.method == "GET" and self._is_token(given):
            rest = request.url.remove_query_params("token")
            answer = RedirectResponse(f"/{rest.path.lstrip('/')}" + (f"?{rest.query}" if rest.query else ""), 303)
            answer.set_cookie(name, given, httponly=True, samesite="strict")
            return answer
        if not self._is_token(request.cookies.get(name, "")):
            return PlainTextResponse("Open the address that `vestige view` printed, with its token.", 403)
        if site not in ("same-origin", "none"):
            return PlainTextResponse("Pages of other sites may not ask.", 403)
        if request.method not in ("GET", "HEAD") and request.headers.get("origin") != f"http://{host}":
            return PlainTextResponse("Pages of other sites may not change anything.", 403)
        return None

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())


class _Server:
    """Answers requests; each method runs in a thread of its own."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.asker, self._lock = workspace, Asker(), Lock()
        kind = find_kind(workspace.folder)
        self.single = kind is not None and kind.summarise(workspace.folder).page
        if self.single:
            # One that cannot be shown is refused here, before anything is served.
            _open_page(workspace.folder, None, None).current()

    def begin(self, index: Path, question: str) -> Json:
        """Begin to answer a question about an index; without one, load its model."""
        if len(question) > _LONGEST_QUESTION:
            raise UserError(f"A question of at most {_LONGEST_QUESTION:,} letters was expected.")
        out = choose_folder(self.workspace.folder, question)
        about = {"question": question, "path": out.relative_to(self.workspace.folder).as_posix()}
        self.asker.ask(self.workspace.require_index(index), question, out, about)
        return about

    def start(self, request: Request) -> Response:
        """Return the report of a single run, else the page that shows the folder."""
        if self.single:
            return self.page(request)
        return HTMLResponse(make_workspace_page(self.workspace.folder))

    def page(self, request: Request) -> Response:
        """Return the report of a run, beside another one if that is requested."""
        return self._read_page(request, "text/html", _LivePage.current)

    def version(self, request: Request) -> Response:
        """Return the version of the files that a report was made from."""
        return self._read_page(request, "text/plain", _LivePage.version)

    def results(self, _: Request) -> Response:
        """Return a line for every result."""
        return _json({"results": self.workspace.results()})

    def open(self, request: Request) -> Response:
        """Return what is shown of one result."""
        return _json(self.workspace.open(request.query_params.get("path", ".")))

    def rows(self, request: Request) -> Response:
        """Return a page of the training data behind a result."""
        query = request.query_params
        folder = self.workspace.find(query.get("path", "."))
        kind = find_kind(folder)
        if kind is None or not kind.has_rows:
            raise UserError(f"{folder} is no run and no index: there are no training data to search behind it.")
        start, order = query.get("start", "0"), query.get("order", "row")
        if not start.isdecimal() or order not in ("row", "high", "low"):
            raise UserError("Expected start=NUMBER, and order=row, high or low.")
        with self._lock:  # data that are read for one request are there for the next
            return _json(find_rows(folder, query.get("words", ""), query.get("query"), order, int(start)))

    async def ask(self, request: Request) -> Response:
        """Begin what the body says: `path` of an index, and `question`."""
        try:
            content = parse_object(await request.body())
            path, question = str(content["path"]), str(content["question"]).strip()
        except (ValueError, LookupError) as error:
            raise UserError('Expected {"path": INDEX, "question": TEXT}.') from error
        return _json(await run_in_threadpool(self.begin, self.workspace.find(path), question))

    async def events(self, _: Request) -> Response:
        """Stream what is reported of the last question: a line of JSON for each event."""
        lines = (json.dumps(event) + "\n" async for event in self.asker.events())
        return StreamingResponse(lines, media_type="application/x-ndjson")

    def stop(self, _: Request) -> Response:
        """Stop the question that is being answered."""
        self.asker.stop()
        return _json({})

    def _read_page(self, request: Request, kind: str, read: "Callable[[_LivePage], str]") -> Response:
        query, status = request.query_params, 200
        try:
            folder, other = self.workspace.find(query.get("path", ".")), query.get("compare")
            other = None if other is None else self.workspace.find(other)
            text = read(_open_page(folder, other, None if self.single else "/"))
        except UserError as error:
            text, kind, status = str(error), "text/plain", 410
        return Response(text.encode("utf-8", "replace"), status, media_type=kind)


class _LivePage:
    """The page of a run, or of two, and the version of the files it was made from."""

    def __init__(self, folder: Path, compare: Path | None, home: str | None):
        self._folder, self._compare, self._home, self._lock = folder, compare, home, Lock()
        self._version = self._html = ""

    def version(self) -> str:
        """Return the version of the page that `current` returns, so that a page knows when it is outdated."""
        self.current()
        return self._version

    def current(self) -> str:
        """Return the page for the files as they are now.

        Raises:
            UserError: The run is gone, or its files cannot be read and there is no earlier page; with one, that page
                is kept, because a run that is being written again is unreadable for a moment.
        """
        with self._lock:
            version = " ".join(map(_find_version, (self._folder, self._compare or self._folder)))
            if not version.strip() and self._html:
                raise UserError(f"The run {self._folder} is gone: it was removed or renamed.")
            if version != self._version or not self._html:
                try:
                    self._html = render_page(self._folder, live=version, compare=self._compare, home=self._home)
                    self._version = version
                except UserError:
                    if not self._html:
                        raise
            return self._html


_open_page = lru_cache(_PAGES_KEPT)(_LivePage)


def _find_version(folder: Path) -> str:
    paths = sorted(path for form in ("*.parquet", "*.json") for path in folder.glob(form))
    stats = [(path.name, path.stat()) for path in paths]
    return " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
