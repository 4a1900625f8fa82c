"""A hook of MkDocs: pages from outside docs/, and notebooks, as pages of the site.

Every page keeps its links as GitHub follows them, from file to file of the repository. What lies outside docs/ stands
in the site below its path in the repository.
"""

import json
import os.path
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "recipes/*.md",
    "recipes/grids/*.md",
    "recipes/src/vestige_recipes/*/*.md",
    "benchmarks/*.md",
)
"""What of the repository, besides docs/, is in the site."""
BOOSTS = {"how-to": 4, "concepts": 4, "cli.md": 0.5, "CHANGELOG.md": 0.3, "benchmarks": 0.3, "recipes": 0.5}
"""How far up search lists a page, by its folder or name; others have 1."""

_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"`[^`]*`")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files from outside docs/, and a page for every notebook."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.append(
            File.generated(config, _page_of(notebook.src_uri), content=show_notebook(Path(notebook.abs_src_path)))
        )
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Return the text with links from page to page of the site, and bars as Python-Markdown reads them in tables."""
    here = page.file.src_uri
    root = PurePosixPath(here).parent
    folder = "" if (ROOT / here).is_file() else "docs"
    page.meta["search"] = {"boost": BOOSTS.get(PurePosixPath(here).parts[0], 1)}

    def relink(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target or target.startswith("/"):
            return match[0]
        place = os.path.normpath(PurePosixPath(folder, root, target))
        found = _page_of(place.removeprefix("docs/"))
        return f"{match[1]}{os.path.relpath(found, root)}{match[3]}" if files.get_file_from_path(found) else match[0]

    lines = _LINK.sub(relink, markdown).split("\n")
    return "\n".join(_CODE.sub(_unescape_bars, line) if line.startswith("|") else line for line in lines)


def show_notebook(path: Path) -> str:
    """Return a notebook as Markdown: its text, and its code in blocks."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = ["".join(cell["source"]) for cell in cells]
    shown = [
        f"```python\n{part}\n```" if cell["cell_type"] == "code" else part
        for cell, part in zip(cells, parts, strict=True)
    ]
    download = f'<a href="{path.name}" download>Download this notebook</a>; it runs as it is once the names are set.'
    return "\n\n".join([shown[0], download, *shown[1:]])


def _page_of(path: str) -> str:
    return re.sub(r"\.ipynb$", ".md", path)


def _unescape_bars(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")
