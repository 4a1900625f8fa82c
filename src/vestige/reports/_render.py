"""The page itself: templates, styles and scripts from this package and the data of one run, in one string."""

import base64
import hashlib
import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vestige.reports._audit_page import audit_page
from vestige.reports._component_page import component_page, is_component_run, with_marked_drawings
from vestige.reports._header import Header, header_of
from vestige.reports._payload import payload_of
from vestige.reports._read import RunFiles, read_run
from vestige.runs import Audit, is_audit

SCRIPTS = (
    "common.js",
    "elements.js",
    "numbers.js",
    "state.js",
    "text.js",
    "examples.js",
    "distribution.js",
    "heatmap.js",
    "groups.js",
    "export.js",
    "page.js",
)
"""In the order in which they are joined; `page.js` starts the page."""
AUDIT_SCRIPTS = ("common.js", "audit.js")
COMPONENT_SCRIPTS = ("common.js", "components.js")


def page_of(run: Path, *, live: str | None = None) -> str:
    """Return the page of whatever run is in the folder, as HTML; `live` as in `render`.

    Raises:
        UserError: There is no run, or it cannot be read.
    """
    if is_component_run(run):
        return render_components(run, live=live)
    return render_audit(Audit.open(run), live=live) if is_audit(run) else render(read_run(run), live=live)


def render_audit(audit: Audit, *, live: str | None = None) -> str:
    """Return the page of an audit as HTML; `live` as in `render`."""
    page = audit_page(audit)
    # Every text in a drawing was escaped as it was drawn.
    page = replace(page, charts=tuple(chart._replace(svg=Markup(chart.svg)) for chart in page.charts))
    script = _script(AUDIT_SCRIPTS)
    return (
        _environment()
        .get_template("audit.html.jinja")
        .render(
            page=page,
            live=live,
            policy=_policy(script, live is not None),
            style=Markup(_asset("style.css") + _asset("audit.css")),
            script=Markup(script),
        )
    )


def render_components(folder: Path, *, live: str | None = None) -> str:
    """Return the page of a component search as HTML; `live` as in `render`."""
    script = _script(COMPONENT_SCRIPTS)
    return (
        _environment()
        .get_template("components.html.jinja")
        .render(
            page=with_marked_drawings(component_page(folder), Markup),
            live=live,
            policy=_policy(script, live is not None),
            style=Markup(_asset("style.css") + _asset("audit.css") + _asset("components.css")),
            script=Markup(script),
        )
    )


def render(run: RunFiles, *, live: str | None = None) -> str:
    """Return the whole page as HTML.

    Args:
        run: What to show.
        live: The version of the run's files when the page is served, so that it can ask for a newer one; None for
            a page that stands alone and may open no connection at all.
    """
    return _page(header_of(run), payload_of(run), live)


def _page(header: Header, payload: dict[str, Any], live: str | None) -> str:
    script = _script(SCRIPTS)
    template = _environment().get_template("report.html.jinja")
    return template.render(
        header=header,
        live=live,
        policy=_policy(script, live is not None),
        style=Markup(_asset("style.css")),
        script=Markup(script),
        data=Markup(json_for_html(payload)),
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


def _policy(script: str, live: bool) -> str:
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
def _script(names: tuple[str, ...]) -> str:
    parts = "\n".join(_asset(f"app/{name}") for name in names)
    return f'\n(function () {{\n"use strict";\n{parts}\n}})();\n'


def _asset(name: str) -> str:
    return files("vestige.reports").joinpath("templates", *name.split("/")).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("vestige.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
