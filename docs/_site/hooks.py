"""What mkdocs does not do by itself: pages made of the README, the changelog, the rooms' offers and the YAML files.

A page's link to a file outside docs/ leads to the page that is made of it, or to the repository; formulas are drawn
here, so that a page needs no script from elsewhere.
"""

from __future__ import annotations

import ast
import base64
import html
import io
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "fmcib_ssl"
#: Files outside docs/ that are pages of the site.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {f"examples/{file.name}": f"examples/{file.stem}.md" for file in (REPO / "examples").glob("*.ipynb")}
ROOMS = {
    "api": "What a notebook calls, and `fmcib_ssl` offers itself",
    "data": "From a table and scans to batches of patches",
    "augment": "From patches to views",
    "losses": "Both losses",
    "models": "Encoders, heads, methods, encoder files",
    "training": "Settings, run folders, what watches a run",
    "evaluation": "Features, probes, reports",
    "types": "What the rooms hand each other, and the base of all errors",
}
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?!https?:|mailto:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```[ ]*$|^    [^\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"(^```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)
#: What GitHub takes for a list's text and code, of which mkdocs wants four spaces a level.
_INDENT = re.compile(r"^(?: {2,3}| {6,7})(?=\S)", re.MULTILINE)
_ITEM = re.compile(r"^( {4}\S.*)\n(?=\d+\. )", re.MULTILINE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of something else."""
    texts = {source: (REPO / source).read_text(encoding="utf-8") for source in PAGES}
    pages = {PAGES[source]: notebook(text) if source.endswith(".ipynb") else text for source, text in texts.items()}
    pages |= api_pages()
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Resolve links out of docs/, draw formulas, list the rooms."""
    if page.file.src_uri == "api/index.md":
        markdown += "\n" + "".join(f"- [`fmcib_ssl.{room}`]({room}.md): {title}\n" for room, title in ROOMS.items())
    sources = {made: source for source, made in PAGES.items()}
    folder = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["path"]))
        if page_of := PAGES.get(target) or (target.startswith("docs/") and target.removeprefix("docs/")):
            place = posixpath.relpath(page_of, posixpath.dirname(page.file.src_uri) or ".")
            return f"[{match['text']}]({place}{match['anchor'] or ''})"
        repository = (config.repo_url or "").rstrip("/")
        return f"[{match['text']}]({repository}/blob/main/{target})" if repository else match["text"]

    fences = _FENCE.split(markdown)
    fences[::2] = [_INDENT.sub(lambda space: "    " if len(space[0]) < 4 else "        ", text) for text in fences[::2]]
    fences[::2] = [_ITEM.sub(r"\1\n\n", text) for text in fences[::2]]
    pieces = _CODE.split("".join(fences))
    pieces[::2] = [_FORMULA.sub(formula, _LINK.sub(link, piece)) for piece in pieces[::2]]
    return "".join(pieces)


def notebook(text: str) -> str:
    """A notebook as Markdown, its code in blocks."""
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
    return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for source, kind in cells)


def formula(match: re.Match[str]) -> str:
    """A formula as a picture, with its TeX as the text for those who do not see it."""
    tex = " ".join((match[1] or match[2]).split())
    drawn = io.BytesIO()
    with matplotlib.rc_context({"mathtext.fontset": "cm", "svg.hashsalt": "fmcib_ssl"}):
        depth = mathtext.math_to_image(f"${tex}$", drawn, format="svg", prop=FontProperties(size=11))
    alt = html.escape(tex, quote=True)
    picture = f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    image = f'<img class="formula" alt="{alt}" src="{picture}" style="vertical-align: -{depth / 72:.2f}in">'
    return f'<p class="formula">{image}</p>' if match[1] else image


def api_pages() -> dict[str, str]:
    """A page for each room, of the names that it offers to others."""
    pages = {}
    for room, title in ROOMS.items():
        entries = [f"::: fmcib_ssl.{room}.{name}\n" for name in offered_names(room)]
        pages[f"api/{room}.md"] = "\n".join([f"# fmcib_ssl.{room}", "", f"{title}.", "", *entries])
    return pages


def offered_names(room: str) -> list[str]:
    """Of a package what its `__init__.pyi` takes from its modules, as `module.name`; of a module its public names."""
    module = PACKAGE / f"{room}.py"
    source = module if module.exists() else PACKAGE / room / "__init__.pyi"
    body = ast.parse(source.read_text(encoding="utf-8")).body
    if source != module:
        offers = [(node.module, name.name) for node in body if isinstance(node, ast.ImportFrom) for name in node.names]
        return [f"{inner}.{name}" for inner, name in offers if not name.isupper()]
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in names if not name.startswith("_")]
