"""How large the code is, and how much of it has to be read: the figures of docs/design.md.

    python tests/code_size.py [REPOSITORY]

Code lines are those with code: no blank lines, comments, docstrings. A public name is a function, class or constant of
a module without a leading underscore. A module rests on those that it imports, directly or through others.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "fmcib_ssl"
LONG_FUNCTION = 50
#: Modules whose code a lesion, a scan or a feature passes through; of names that a version has not, none is counted.
PATHS = {
    "a training step": (
        "data.loader", "augment.views", "models.pretraining", "models.mined_contrast", "losses",
    ),
    "a prepared scan": ("data.prepare", "data.prepare_scan", "data.scans", "data.store", "data.scan_file"),
    "a feature table with its numbers": (
        "evaluation.embedding", "evaluation.feature_table", "evaluation.evaluate", "evaluation.labels",
        "evaluation.probes", "evaluation.metrics",
    ),
}  # fmt: skip

_NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
)  # fmt: skip
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> set[int]:
    """Numbers of the lines of a file that hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def num_code_lines(folder: Path) -> int:
    """Of all Python files below a folder."""
    return sum(len(code_lines(file.read_text(encoding="utf-8"))) for file in folder.rglob("*.py"))


def public_names(tree: ast.Module) -> Iterator[str]:
    """What a module defines for others."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Functions of more than `LONG_FUNCTION` code lines."""
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = sum(node.lineno <= line <= (node.end_lineno or 0) for line in lines)
            if length > LONG_FUNCTION:
                yield node.name, length


def foreign_private_names(trees: dict[str, ast.Module]) -> Iterator[tuple[str, int, str]]:
    """Private names of other projects: modules that are imported, attributes that no module of this package sets."""
    own = {"_asdict", "_exit"}  # documented, in spite of their names: named tuples', os's
    own |= {name for tree in trees.values() for node in ast.walk(tree) for name in _defined(node)}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith((PACKAGE, "__")):
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                if any(part.startswith("_") for part in parts):
                    yield module, node.lineno, ".".join(parts)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if "._" in alias.name:
                        yield module, node.lineno, alias.name
            elif isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in own:
                yield module, node.lineno, ast.unparse(node)


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg


def rests_on(start: tuple[str, ...], trees: dict[str, ast.Module], offers: dict[str, str]) -> set[str]:
    """Modules, and all that they import of this package, directly or through others; imports for types do not count.

    Args:
        start: names of modules within the package; those it has not are left out.
        trees: every module of the package.
        offers: for `room.name` that a room imports when it is asked for, the module it comes from.
    """
    todo = [name for name in start if name in trees]
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo.extend(_imported(trees[name], trees, offers))
    return reached


def _imported(tree: ast.Module, trees: dict[str, ast.Module], offers: dict[str, str]) -> Iterator[str]:
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            module = node.module.removeprefix(PACKAGE).removeprefix(".")
            for alias in node.names:
                name = f"{module}.{alias.name}".removeprefix(".")
                name = offers.get(name, name)
                yield from (known for known in (name if name in trees else module,) if known in trees)


def main(repository: Path) -> None:
    """Print the figures as rows of a table."""
    package = repository / PACKAGE
    sources = {
        ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): file.read_text("utf-8")
        for file in sorted(package.rglob("*.py"))
    }
    trees = {name: ast.parse(source) for name, source in sources.items()}
    offers = {
        f"{stub.parent.name}.{alias.name}": f"{stub.parent.name}.{node.module}"
        for stub in package.glob("*/__init__.pyi")
        for node in ast.parse(stub.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    num_lines = num_code_lines(package)
    long = [found for source in sources.values() for found in long_functions(source)]
    private = list(foreign_private_names(trees))
    loose = [file for file in package.glob("*.py") if file.name != "__init__.py"]
    rows: list[tuple[str, object]] = [
        ("code lines of the package", f"{num_lines:,}"),
        ("modules / loose ones at the top", f"{len(sources)} / {len(loose)}"),
        ("public names", sum(1 for tree in trees.values() for _ in public_names(tree))),
        (f"functions over {LONG_FUNCTION} code lines", len(long)),
        ("uses of other projects' private names", len(private)),
        ("test code lines", f"{(tests := num_code_lines(repository / 'tests')):,}"),
        ("test lines a line of code", f"{tests / num_lines:.2f}"),
    ]
    for path, start in PATHS.items():
        known = sum(name in trees for name in start)
        rows.append(
            (f"modules of {path}: path / with all it rests on", f"{known} / {len(rests_on(start, trees, offers))}")
        )
    for what, figure in rows:
        print(f"| {what} | {figure} |")
    for name, length in sorted(long, key=lambda item: -item[1]):
        print(f"  long: {name}, {length}")
    for module, line, name in private:
        print(f"  private: {module}:{line} {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
