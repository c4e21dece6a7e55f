"""The pages of the documentation: errors of the FAQ exist, the page of settings has every key, links lead somewhere."""

from __future__ import annotations

import ast
import re
import runpy
from functools import partial
from pathlib import Path

import pytest

from fmcib_ssl.command import VERBS, main_of
from fmcib_ssl.training.settings import FineTune, Hardware, _Data, _Trainer

REPO = Path(__file__).resolve().parents[1]
DOCS = REPO / "docs"


def messages() -> list[str]:
    """Every text in the package, with `…` for what a formatted one leaves open."""
    texts = []
    for file in (REPO / "fmcib_ssl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(
                        getattr(part, "value", "") if isinstance(part, ast.Constant) else "…" for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[\d.]*[sdgf]", "…", node.value).replace("%%", "%"))
    return texts


def test_errors_of_the_faq_are_those_of_the_package() -> None:
    titles = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(titles) >= 25
    known = messages()
    for title in titles:
        pattern = re.compile(".*?".join(map(re.escape, title.split("…"))), re.DOTALL)
        assert any(pattern.search(text) for text in known), f"no message of the package is: {title}"


def test_the_page_of_settings_has_every_key_and_option() -> None:
    page = "\n".join(runpy.run_path(str(DOCS / "_site" / "settings.py"))["lines"]())
    typed = {
        f"{name}.{key}"
        for name, section in (("data", _Data), ("hardware", Hardware), ("trainer", _Trainer), ("finetune", FineTune))
        for key in section.model_fields
    }
    assert not {key for key in typed - {"data.phantom"} if f"| `{key}` |" not in page}
    files = {f"{file.parent.name}={file.stem}" for file in (REPO / "configs").glob("[!h]*/*.yaml")}
    defaults = {"data=lesions", "paths=default", "finetune=default"}
    assert not {option for option in files - defaults if not re.search(rf"^### \+?{option}$", page, re.MULTILINE)}


def test_the_page_of_commands_has_every_verb_and_key() -> None:
    page = "\n".join(runpy.run_path(str(DOCS / "_site" / "settings.py"))["command_lines"]())
    for verb in VERBS:
        (section,) = re.findall(rf"^### {verb}\n(.*?)(?=^### |\Z)", page, re.MULTILINE | re.DOTALL)
        main = main_of(verb)
        keys = main.args[0].model_fields if isinstance(main, partial) else []
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(keys)


@pytest.mark.parametrize("page", sorted([*DOCS.rglob("*.md"), *REPO.glob("*.md")]), ids=lambda page: page.stem)
def test_links_lead_to_files_of_the_checkout(page: Path) -> None:
    """As on GitHub; that they also do on the site, and that anchors exist, is what `make docs` checks."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    absent = [link for link in links if not (page.parent / link).resolve().exists()]
    assert not absent
