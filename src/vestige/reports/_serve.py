"""The report served on this computer, made again whenever the run's files change."""

from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from vestige.errors import UserError
from vestige.progress import announce
from vestige.reports._component_page import RESULT
from vestige.reports._render import page_of

LOOPBACK = "127.0.0.1"


def view(run: str | Path, port: int = 0) -> None:
    """Serve the report of `run` on this computer until Ctrl-C; the page follows the run's files.

    Args:
        run: A run directory, as `attribute` or `audit` writes it.
        port: Port on the loopback address; 0 takes a free one, and the line printed names it.

    Raises:
        UserError: `run` is no run directory, or the port is taken.
    """
    try:
        server = make_server(run, port)
    except OSError as error:
        raise UserError(
            f"Port {port} cannot be used ({error.strerror}).\nType: vestige view {run}   (takes a free port)"
        ) from error
    with server:
        announce(f"Report of {run}: http://{LOOPBACK}:{server.server_address[1]}/   (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            announce("Closed.")


def make_server(run: str | Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server for the report of `run`, bound to the loopback address and not yet serving."""
    page = LivePage(Path(run))
    page.current()  # a folder that is no run is refused here, before anything is served
    return ThreadingHTTPServer((LOOPBACK, port), partial(_Handler, page))


class LivePage:
    """The page of a run and the version of the files it was made from."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._version = ""
        self._html = ""
        self._lock = Lock()

    def version(self) -> str:
        """Return the version of the page that `current` returns, so that a page knows when it is outdated.

        Raises:
            UserError: As for `current`.
        """
        self.current()
        return self._version

    def _files_version(self) -> str:
        """Return what changes whenever a file of the run does: its name, size and time."""
        files = [*sorted(self._folder.glob("*.parquet")), self._folder / "run.json", self._folder / RESULT]
        stats = [(file.name, file.stat()) for file in files if file.exists()]
        return " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)

    def current(self) -> str:
        """Return the page for the files as they are now.

        Raises:
            UserError: The run is gone, or its files cannot be read and there is no earlier page; with one, that page
                is kept, because a run that is being written again is unreadable for a moment.
        """
        with self._lock:
            version = self._files_version()
            if not version and self._html:
                raise UserError(f"The run {self._folder} is gone: it was removed or renamed.")
            if version != self._version or not self._html:
                try:
                    self._html = page_of(self._folder, live=version)
                    self._version = version
                except UserError:
                    if not self._html:
                        raise
            return self._html


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, page: LivePage, *args, **kwargs):
        self._page = page
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """Answer `/` with the page and `/version` with the version of the run's files."""
        pages = {"/": ("text/html", self._page.current), "/version": ("text/plain", self._page.version)}
        if not self._asked_locally():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "Only pages of this computer are served here.")
        elif self.path not in pages:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "The report is at /")
        else:
            kind, content = pages[self.path]
            try:
                self._answer(HTTPStatus.OK, kind, content())
            except UserError as error:
                self._answer(HTTPStatus.GONE, "text/plain", str(error))

    def _asked_locally(self) -> bool:
        """Tell whether the address bar holds a loopback name: a foreign name that resolves here is turned away."""
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        return name in (LOOPBACK, "localhost")

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: one line per poll is of no use to a reader."""
