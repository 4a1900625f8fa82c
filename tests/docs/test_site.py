"""The documentation as a site: built without a warning, whole, searched in a browser, and with nothing from outside."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import vestige
from tests.docs.blocks import ROOT
from tests.reports.browser import Visit
from vestige.registry import COMMANDS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""What a browser fetches by itself, by tag and attribute."""


class Html(HTMLParser):
    """Anchors, links and loaded files of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href") is not None:
            self.links.append(found["href"])
        if tag in LOADED and found.get(LOADED[tag]) and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(found[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not re.search(r"^(WARNING|ERROR)", done.stderr, re.MULTILINE), done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Every page, by its path in the site."""
    return {path.relative_to(site).as_posix(): Html(path) for path in site.rglob("*.html")}


@pytest.fixture(scope="module")
def address(site):
    """The site on the loopback, where search works without a network."""
    handler = functools.partial(_Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *words):
        pass


@pytest.mark.slow
def test_every_link_and_anchor_inside_the_site_leads_somewhere(site, pages):
    lost = []
    for page, html in pages.items():
        for link in html.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            base = site if parts.path.startswith("/") else (site / page).parent
            place = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else site / page
            place = place / "index.html" if place.is_dir() else place
            name = place.relative_to(site.resolve()).as_posix()
            anchor = unquote(parts.fragment)
            if not place.is_file() or (anchor and name in pages and anchor not in pages[name].anchors):
                lost.append(f"{page}: {link}")
    assert not lost, "\n".join(lost)


@pytest.mark.slow
def test_nothing_is_loaded_from_another_host(site, pages):
    found = [f"{page}: {address}" for page, html in pages.items() for address in html.loaded if "//" in address]
    for style in site.rglob("*.css"):
        found += [
            f"{style.name}: {each}"
            for each in re.findall(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//[^)\"']*", style.read_text())
        ]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_the_search_index_holds_the_words_of_the_glossary_and_what_is_registered(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    titles = {(entry["location"], entry["title"]) for entry in entries}
    for word in (
        "Damping",
        "Tensor sketch",
        "PSMI",
        "Bank",
        "Hub",
        "LDS",
        "Component",
        "Opponent",
        "Proponent",
        "Lift",
    ):
        assert any(place.startswith("concepts/glossary.html#") and title == word for place, title in titles), word
    text = " ".join(f"{entry['title']} {entry['text']}" for entry in entries)
    for word in (
        "vestige.attribute",
        "--engine slurm",
        "ekfac-index",
        "rmia_offline",
        "logra",
        "tail-patch",
        "max_length",
    ):
        assert word in text, word


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")
@pytest.mark.parametrize(
    ("question", "page"),
    [
        ("rows behind a wrong answer", "how-to/find-rows.html"),
        ("slurm", "how-to/slurm.html"),
        ("ray", "how-to/ray.html"),
        ("what a score means", "concepts/scores.html"),
        ("add a method", "how-to/add-a-method.html"),
    ],
)
def test_search_in_the_browser_finds_the_page_among_the_first(address, question, page):
    with Visit(CHROMIUM, f"{address}/index.html") as visit:
        visit.evaluate("document.querySelector('#__search').click()")
        visit.evaluate("document.querySelector('.md-search__input').focus()")
        visit.press(*question)
        links = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.getAttribute('href'))"
        found, until = [], time.monotonic() + 20
        while not found and time.monotonic() < until:
            found = visit.evaluate(links)
            time.sleep(0.1)
        assert any(page in link for link in found[:4]), found[:8]
        assert not visit.errors


def test_the_reference_has_every_public_name():
    shown = set(re.findall(r"^::: (vestige\.[\w.]+)$", (ROOT / "docs/reference/python.md").read_text(), re.MULTILINE))
    functions = {command.function for command in COMMANDS if command.function}
    kinds = {one.replace(":", ".") for one in functions if one.startswith(("vestige.evaluate:", "vestige.prepare:"))}
    assert shown >= {f"vestige.{name}" for name in vestige.__all__ if name not in ("evaluate", "prepare")} | kinds


@pytest.mark.slow
def test_the_pages_of_what_is_registered_are_what_the_registries_say(tmp_path):
    # A process of its own: what other tests registered is no part of Vestige.
    subprocess.run([sys.executable, "docs/generate_reference.py", str(tmp_path)], cwd=ROOT, check=True)
    for path in tmp_path.iterdir():
        kept = ROOT / "docs" / "reference" / path.name
        assert kept.read_text() == path.read_text(), "run: python docs/generate_reference.py"
