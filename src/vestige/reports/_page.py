"""A run directory in, one HTML file out; or the same page served on this computer, following the run's files."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from vestige.errors import UserError
from vestige.progress import announce
from vestige.registry import Registry
from vestige.reports._payload import make_comparison, make_payload
from vestige.reports._read import COMPONENTS, make_header, read_run
from vestige.runs import Audit, is_audit
from vestige.storage import make_folder, remove_strays_of, write_durably

GENERATOR = '<meta name="generator" content="vestige'
"""Marks a page as ours: only such a file is overwritten without asking."""
LOOPBACK = "127.0.0.1"
_SCRIPTS = {
    "report": "common elements numbers state text answer examples distribution heatmap groups compare export page",
    "audit": "common choices",
    "components": "common choices",
    "other": "common choices",
}
"""In the order in which they are joined; the last one starts the page."""
_STYLES = {
    "report": "style report",
    "audit": "style audit",
    "components": "style audit components",
    "other": "style audit",
}


@dataclass(frozen=True)
class Page:
    """A page of what a command leaves in a folder; announced in "vestige.pages"."""

    matches: Callable[[Path], bool]
    """Whether a folder is of this kind."""
    make: Callable[[Path], dict[str, Any]]
    """From the folder to the variable `page` of the template; `base.html.jinja` needs title, subtitle, facts, command,
    versions and vestige of it."""
    template: str
    """Jinja's text of the page; it extends `base.html.jinja`, which all pages share."""


PAGES: Registry[Page] = Registry("vestige.pages", "page", Page)


def report(run: str | Path, out: str | Path | None = None, *, compare: str | Path | None = None) -> Path:
    """Write the report of a run as one HTML file that opens anywhere, without a network, and return its path.

    Args:
        run: A run directory, as `attribute` or `audit` writes it.
        out: The file to write, or a folder to put `report.html` in; by default `RUN/report.html`.
        compare: Another run of the same training data and queries, to be shown beside the first: by another method,
            or of another checkpoint.

    Raises:
        UserError: `run` is no run directory, `out` is a file that Vestige did not write, or cannot be written, or
            the two runs cannot be compared.
    """
    target = _check_target(Path(run), out)
    page = render_page(Path(run), compare=None if compare is None else Path(compare))
    make_folder(target.parent)
    remove_strays_of(target)
    write_durably(target, [page.encode()])
    return target


def _check_target(run: Path, out: str | Path | None) -> Path:
    """Return the file to write, refusing to replace a file that Vestige did not make."""
    target = Path(out) if out is not None else run / "report.html"
    if target.is_dir():
        target = target / "report.html"
    if target.exists():
        ours = False
        if target.is_file():  # a pipe would be waited for
            with target.open(encoding="utf-8", errors="replace") as file:
                ours = GENERATOR in file.read(2000)
        if not ours:
            raise UserError(
                f"{target} exists and is not a Vestige report; it was left as it is.\n"
                f"Type: vestige report {run} --out {target.with_name('report.html')}"
            )
    return target


def render_page(run: Path, *, live: str | None = None, compare: Path | None = None) -> str:
    """Return the page of whatever run is in the folder, as HTML.

    Args:
        run: The folder.
        live: The version of the run's files when the page is served, so that it can ask for a newer one; None for
            a page that stands alone and may open no connection at all.
        compare: Another run of the same data and queries, to be shown beside it.

    Raises:
        UserError: There is no run, it cannot be read, or the two cannot be compared.
    """
    data, environment = "", _make_environment()
    template: Template | None = None
    own = next((one for one in PAGES if one.matches(run)), None)
    if compare is not None and ((run / COMPONENTS).is_file() or is_audit(run) or own is not None):
        raise UserError(f"{run} ranks no training examples for queries.\nType: vestige report {run}")
    # Pages with figures import matplotlib and the measures, which those of attributions do without.
    if (run / COMPONENTS).is_file():
        from vestige.reports._component_page import make_component_page

        kind, page = "components", make_component_page(run)
    elif is_audit(run):
        from vestige.reports._audit_page import make_audit_page

        kind, page = "audit", make_audit_page(Audit.open(run))
    elif own is not None:
        kind, page, template = "other", own.make(run), environment.from_string(own.template)
    else:
        found = read_run(run)
        other = None if compare is None else make_comparison(found, read_run(compare))
        kind, page, data = "report", make_header(found), json_for_html(make_payload(found, other))
    script, style = _load_script(kind), "".join(map(_read_asset, (f"{name}.css" for name in _STYLES[kind].split())))
    return (template or environment.get_template(f"{kind}.html.jinja")).render(
        page=page,
        live=live,
        policy=_make_policy(script, live is not None),
        style=Markup(style),
        script=Markup(script),
        data=Markup(data),
    )


def json_for_html(value: Any) -> str:
    r"""Return JSON that may stand inside a script element: no `<`, `>` or `&` is left in it.

    >>> json_for_html(["</script>"])
    '["\\u003c/script\\u003e"]'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Half of a surrogate pair cannot be written as UTF-8; a tokenizer that cuts inside a character can leave one.
    return text.encode("utf-8", "replace").decode("utf-8")


def _make_policy(script: str, live: bool) -> str:
    """Return a content security policy that allows this page's own script and nothing from anywhere else.

    Even markup that slipped out of a training text could then neither run nor load anything.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _load_script(kind: str) -> str:
    parts = "\n".join(_read_asset(f"app/{name}.js") for name in _SCRIPTS[kind].split())
    return f'\n(function () {{\n"use strict";\n{parts}\n}})();\n'


def _read_asset(name: str) -> str:
    return files("vestige.reports").joinpath("templates", *name.split("/")).read_text(encoding="utf-8")


@cache
def _make_environment() -> Environment:
    return Environment(
        loader=PackageLoader("vestige.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


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
    page = _LivePage(Path(run))
    page.current()  # a folder that is no run is refused here, before anything is served
    return ThreadingHTTPServer((LOOPBACK, port), partial(_Handler, page))


class _LivePage:
    """The page of a run and the version of the files it was made from."""

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, Lock()
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
            paths = sorted(path for form in ("*.parquet", "*.json") for path in self._folder.glob(form))
            stats = [(path.name, path.stat()) for path in paths]
            version = " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
            if not version and self._html:
                raise UserError(f"The run {self._folder} is gone: it was removed or renamed.")
            if version != self._version or not self._html:
                try:
                    self._html = render_page(self._folder, live=version)
                    self._version = version
                except UserError:
                    if not self._html:
                        raise
            return self._html


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, page: _LivePage, *args, **kwargs):
        self._page = page
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """Answer `/` with the page and `/version` with the version of the run's files."""
        pages = {"/": ("text/html", self._page.current), "/version": ("text/plain", self._page.version)}
        # A foreign name in the address bar that resolves to this computer is turned away.
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in (LOOPBACK, "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "Only pages of this computer are served here.")
        elif self.path not in pages:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "The report is at /")
        else:
            kind, content = pages[self.path]
            try:
                self._answer(HTTPStatus.OK, kind, content())
            except UserError as error:
                self._answer(HTTPStatus.GONE, "text/plain", str(error))

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
