"""The pages of settings and of commands, made of the YAML files under configs/ and of the types that check them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fmcib_ssl.command import VERBS, main_of
from fmcib_ssl.io import as_typed
from fmcib_ssl.training import Settings

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / "configs"
#: Sections whose values are typed, and the option that holds the defaults.
TYPED = {"data": "lesions", "hardware": "cpu", "paths": "default", "finetune": "default"}
#: Groups whose options are shown as they are written, in this order.
GROUPS = (
    "experiment", "loss", "method", "encoder", "head", "augment", "optimizer", "schedule", "callbacks", "logger", "task"
)  # fmt: skip
TRAINER = "How long and how carefully to train; any other argument of Lightning's Trainer can be added."
KINDS = {
    "boolean": "`true`, `false`", "string": "text", "number": "number", "integer": "whole number", "null": "`null`",
    "object": "dictionary",
}  # fmt: skip
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">"}
_LINE = re.compile(r"^(?P<key>\w+):\s*(?P<value>.*?)\s*(?:# (?P<comment>.*))?$")
_PAGE = re.compile(r"docs/(\w+)\.md")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add the keys to the pages."""
    added = {"settings.md": lines, "commands.md": command_lines}.get(page.file.src_uri)
    return "\n".join([markdown, *added()]) + "\n" if added else markdown


def command_lines() -> Iterator[str]:
    """The verbs, and the keys of each as `fmcib-ssl VERB --help` has them."""
    yield from ["", "## Verbs", "", "| verb | |", "| --- | --- |"]
    yield from (f"| [`{verb}`](#{verb}) | {about} |" for verb, about in VERBS.items())
    for verb, about in VERBS.items():
        yield from ["", f"### {verb}", ""]
        if verb in ("train", "demo"):
            yield f"{about.capitalize()}. Its keys are the [settings](settings.md)."
            continue
        command = main_of(verb).args[0]
        text = inspect.cleandoc(command.__doc__)
        yield linked(re.sub("^(?=fmcib-ssl )", "    ", text, flags=re.MULTILINE))
        yield from ["", "| key | default | allowed | |", "| --- | --- | --- | --- |"]
        schema = command.model_json_schema()
        for key, field in command.model_fields.items():
            default = "" if field.is_required() else as_typed(field.default)
            description = linked(field.description or "").replace("|", "\\|")
            shown = f"`{default}`" if default else ""
            yield f"| `{key}` | {shown} | {allowed(schema['properties'][key])} | {description} |"


def lines() -> Iterator[str]:
    """The page below its introduction."""
    schema = Settings.model_json_schema()
    top, sections = schema["properties"], schema["$defs"]
    train = (CONFIGS / "train.yaml").read_text(encoding="utf-8")
    yield from ["", "## The run", "", *table("", train, {k: v for k, v in top.items() if k not in TYPED}, sections)]
    trainer = re.search(r"^trainer:.*\n((?:  .*\n)+)", train, re.MULTILINE)
    assert trainer is not None
    inner = re.sub("^  ", "", trainer[1], flags=re.MULTILINE)
    yield from [
        "",
        "## trainer",
        "",
        TRAINER,
        "",
        *table("trainer.", inner, sections["_Trainer"]["properties"], sections),
    ]
    for group, option in TYPED.items():
        text = (CONFIGS / group / f"{option}.yaml").read_text(encoding="utf-8")
        reference = top[group].get("$ref") or top[group]["anyOf"][0]["$ref"]
        yield from ["", f"## {group}", "", introduction(text), ""]
        yield from table(f"{group}.", text, sections[reference.rpartition("/")[2]]["properties"], sections)
        yield from options(group, skip=option)
    for group in GROUPS:
        yield from ["", f"## {group}", *options(group)]


def options(group: str, skip: str = "") -> Iterator[str]:
    """Each option of a group as its file has it."""
    plus = "+" if group == "experiment" else ""
    for file in sorted((CONFIGS / group).glob("*.yaml")):
        if file.stem != skip:
            text = file.read_text(encoding="utf-8")
            body = text[len(header(text)) :].strip()
            yield from ["", f"### {plus}{group}={file.stem}", "", introduction(text), "", "```yaml", body, "```"]


def header(text: str) -> str:
    """The comments at the beginning of a file."""
    match = re.match(r"(?:#.*\n)*", text)
    assert match is not None
    return match[0]


def introduction(text: str) -> str:
    """The comments at the beginning of a file as text, its command lines as code."""
    rows = [row[2:] for row in header(text).splitlines() if not row.startswith("# @package")]
    return linked("\n".join(f"\n    {row.strip()}\n" if row.startswith("  ") else row for row in rows))


def table(prefix: str, text: str, properties: Mapping[str, Any], sections: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a file with default, type and comment."""
    yield from ["| key | default | allowed | |", "| --- | --- | --- | --- |"]
    for row in text.splitlines():
        match = _LINE.match(row)
        if match is not None and match["key"] in properties and "$ref" not in properties[match["key"]]:
            value, about = match["value"], linked(match["comment"] or "").replace("|", "\\|")
            shown = f"`{value}`" if value else ""
            yield f"| `{prefix}{match['key']}` | {shown} | {allowed(properties[match['key']])} | {about} |"


def allowed(schema: Mapping[str, Any]) -> str:
    """The values of a type, in words."""
    if "anyOf" in schema:
        return ", ".join(filter(None, map(allowed, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} numbers"
    if "items" in schema:
        return f"list of {allowed(schema['items'])}"
    words = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    kind = "path" if schema.get("format") == "path" else KINDS[schema.get("type", "object")]
    return " ".join([kind, *words])


def linked(text: str) -> str:
    """Names of pages in a comment as links."""
    return _PAGE.sub(r"[\1](\1.md)", text)
