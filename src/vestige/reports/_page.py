"""A run directory in, one HTML file out; the same page for the server of `vestige view`, and that of a folder."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from vestige.errors import UserError
from vestige.registry import Registry
from vestige.reports._payload import make_comparison, make_payload
from vestige.reports._read import COMPONENTS, make_header, read_run
from vestige.runs import Audit, is_audit
from vestige.storage import make_folder, remove_strays_of, write_durably

GENERATOR = '<meta name="generator" content="vestige'
"""Marks a page as ours: only such a file is overwritten without asking."""
_ASSETS = {
    "report": (
        "common elements numbers state text answer examples distribution heatmap groups compare export page",
        "style parts report",
    ),
    "audit": ("common choices", "style audit"),
    "components": ("common choices", "style audit components"),
    "other": ("common choices", "style audit"),
    "workspace": ("common elements numbers listing search ask workspace", "style parts workspace"),
}
"""Scripts and styles of each kind of page, in the order in which they are joined; the last script starts the page."""


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


def render_page(run: Path, *, live: str | None = None, compare: Path | None = None, home: str | None = None) -> str:
    """Return the page of whatever run is in the folder, as HTML.

    Args:
        run: The folder.
        live: The version of the run's files when the page is served, so that it can ask for a newer one; None for
            a page that stands alone and may open no connection at all.
        compare: Another run of the same data and queries, to be shown beside it.
        home: Address of the list of results from which the page was opened; None for a page without one.

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
    return _fill(template or environment.get_template(f"{kind}.html.jinja"), kind, page, data, live, home)


def make_workspace_page(folder: Path) -> str:
    """Return the page on which the server of `vestige view` shows a folder, as HTML."""
    page = {"title": folder.resolve().name, "subtitle": "workspace", "vestige": version("vestige")}
    return _fill(_make_environment().get_template("workspace.html.jinja"), "workspace", page, "{}", "", None)


def _fill(template: Template, kind: str, page: dict[str, Any], data: str, live: str | None, home: str | None) -> str:
    """Return a page with the script and the styles of its kind."""
    script, style = _load_script(kind), "".join(map(_read_asset, (f"{name}.css" for name in _ASSETS[kind][1].split())))
    return template.render(
        page=page,
        live=live,
        home=home,
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
    parts = "\n".join(_read_asset(f"app/{name}.js") for name in _ASSETS[kind][0].split())
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
