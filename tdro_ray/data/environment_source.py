"""One parsed Python file: its lines, its syntax tree, its statements with their scopes, and the records made of it.

Knows nothing of tasks; `environment_parse` decides what becomes a record.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tdro_ray.data.environment_files import SourceFile
from tdro_ray.errors import DataError

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Record(NamedTuple):
    """One query with its passage. `links` are the dotted names of the base classes, for methods only."""

    task: str
    id: str  # package.module:qualname
    group: str  # records of one group are all in training or all in the test
    query: str
    passage: str
    links: tuple[str, ...] = ()
    docid: str = ""  # of the passage, where it is not `id`


@dataclass
class Scope:
    """Where a statement stands: the names around it, and the innermost class and function."""

    names: tuple[str, ...] = ()
    bases: tuple[str, ...] | None = None  # of the class that directly holds the statement
    function: FunctionNode | None = None

    def inside(self, name: str, bases: tuple[str, ...] | None, function: FunctionNode | None) -> Scope:
        return Scope((*self.names, name), bases, function or self.function)


@dataclass
class Source:
    """One parsed file."""

    module: str
    lines: list[str]
    tree: ast.Module
    imports: dict[str, str]  # local name -> dotted name
    seen: Counter[str] = field(default_factory=Counter)  # ids given out, per task

    @property
    def group(self) -> str:
        return ".".join(self.module.split(".")[:2])

    def record(self, task: str, name: str, query: str, passage: str, links: tuple[str, ...] = ()) -> Record:
        """Return a record with an id of its own: a second definition of a name gets `#2`."""
        self.seen[f"{task} {name}"] += 1
        count = self.seen[f"{task} {name}"]
        identity = f"{self.module}:{name}" + (f"#{count}" if count > 1 else "")
        return Record(task, identity, self.group, query, passage, links)


def read_source(file: SourceFile) -> Source | None:
    """Return the parsed file, None where it is not valid Python; raises DataError when it cannot be read at all."""
    try:
        raw = Path(file.path).read_bytes()
    except OSError as err:
        raise DataError(
            f"Module {file.module} of the Python environment cannot be read ({err}). The environment source reads "
            f"the same installed packages on every node; install them there, or ingest other data.sources."
        ) from err
    try:
        text = importlib.util.decode_source(raw)  # honours the coding line
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are not ours to report
            tree = ast.parse(text)
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
        return None
    package = file.module if Path(file.path).stem == "__init__" else file.module.rpartition(".")[0]
    return Source(file.module, text.split("\n"), tree, _imports(tree, package))


def _imports(tree: ast.Module, package: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if node.level else []
            base = parents[: len(parents) - node.level + 1] + ([node.module] if node.module else [])
            names |= {alias.asname or alias.name: ".".join([*base, alias.name]) for alias in node.names}
    return names


def suites(tree: ast.Module) -> Iterator[tuple[list[ast.stmt], Scope]]:
    """Yield every list of statements with its scope. Iterative: an elif chain may be thousands deep."""
    pending: list[tuple[list[ast.stmt], Scope]] = [(tree.body, Scope())]
    while pending:
        statements, scope = pending.pop()
        yield statements, scope
        for node in statements:
            if isinstance(node, ast.ClassDef):
                bases = tuple(ast.unparse(base) for base in node.bases if isinstance(base, (ast.Name, ast.Attribute)))
                pending.append((node.body, scope.inside(node.name, bases, None)))
            elif isinstance(node, FUNCTIONS):
                pending.append((node.body, scope.inside(node.name, None, node)))
            else:
                pending += [(suite, scope) for suite in _children(node)]


def _children(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        if suite := getattr(node, name, None):
            yield suite
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield part.body
