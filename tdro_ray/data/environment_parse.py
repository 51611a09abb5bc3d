"""Reads Python files into retrieval records: (query, passage) pairs of each task, by the syntax tree alone.

Knows nothing of sampling, splitting or de-duplication. `parse_files` is what a parallel map carries.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator

from tdro_ray.data.environment_files import SourceFile
from tdro_ray.data.environment_source import FUNCTIONS, FunctionNode, Record, Scope, Source, read_source, suites
from tdro_ray.data.environment_texts import (
    PASSAGE_CHARS,
    QUERY_CHARS,
    clip,
    clip_lines,
    docstring_parameters,
    enough_words,
    first_paragraph,
    normalise,
    plain,
)


def parse_files(files: Iterable[SourceFile]) -> list[Record]:
    """Return the records of `files`; a file that is not valid Python gives none.

    Raises DataError when a file cannot be read at all.
    """
    records: list[Record] = []
    for file in files:
        source = read_source(file)
        if source is not None:
            records += _module_records(source)
            for statements, scope in suites(source.tree):
                records += _suite_records(source, statements, scope)
    return records


def _suite_records(source: Source, statements: list[ast.stmt], scope: Scope) -> Iterator[Record]:
    for node in statements:
        if isinstance(node, FUNCTIONS):
            yield from _function_records(source, node, scope)
            for decorator in node.decorator_list:  # click.option
                if isinstance(decorator, ast.Call):
                    yield from _option(source, decorator)
        elif isinstance(node, ast.ClassDef):
            yield from _class_records(source, node, scope)
        elif isinstance(node, ast.Raise) and scope.function is not None:
            yield from _exception_records(source, node, scope)
        else:
            yield from _option_records(source, node)
    yield from _comment_records(source, statements, scope)


def _docstring(node: FunctionNode | ast.ClassDef | ast.Module) -> str:
    return ast.get_docstring(node) or ""


def _module_records(source: Source) -> Iterator[Record]:
    query = first_paragraph(_docstring(source.tree))
    names = [n.name for n in source.tree.body if isinstance(n, (ast.ClassDef, *FUNCTIONS)) and n.name[0] != "_"]
    licence = re.search(r"copyright|licen[sc]e|all rights", query, re.IGNORECASE)
    if enough_words(query, 4) and len(names) >= 3 and not licence:
        yield source.record("py_module_names", "names", query, clip(", ".join(dict.fromkeys(names)), PASSAGE_CHARS))


def _function_records(source: Source, node: FunctionNode, scope: Scope) -> Iterator[Record]:
    doc = _docstring(node)
    if not doc:
        return
    name = ".".join((*scope.names, node.name))
    summary = first_paragraph(doc)
    if enough_words(summary, 4):
        code = function_source(source.lines, node)
        if code and normalise(summary) not in normalise(code):
            yield source.record("py_docstring_source", name, summary, clip_lines(code))
        if scope.bases is not None and not node.name.startswith("__"):
            links = tuple(_resolve(source, base) for base in scope.bases)
            yield source.record("methods", name, summary, node.name, links)  # no task: `override_pairs` reads them
    short = ".".join((*scope.names, node.name)[-2:])
    if enough_words(doc, 5):
        signature = clip(f"{short}({ast.unparse(node.args)})", QUERY_CHARS)
        yield source.record("py_signature_docstring", name, signature, clip_lines(_without_signature(doc, node.name)))
    yield from _parameter_records(source, name, short, doc)


def _class_records(source: Source, node: ast.ClassDef, scope: Scope) -> Iterator[Record]:
    doc = _docstring(node)
    if not enough_words(doc, 5):
        return
    name = ".".join((*scope.names, node.name))
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    query = clip(f"class {node.name}({bases})", QUERY_CHARS)
    yield source.record("py_signature_docstring", name, query, clip_lines(_without_signature(doc, node.name)))
    yield from _parameter_records(source, name, name, doc)


def _without_signature(doc: str, name: str) -> str:
    """Return `doc` without a first line that repeats the call, which would give the answer away."""
    first, _, rest = doc.partition("\n")
    return rest.strip() if re.match(rf"[\w.]*{re.escape(name)}\s*\(", first) and rest.strip() else doc


def _parameter_records(source: Source, name: str, short: str, doc: str) -> Iterator[Record]:
    for parameter, description in docstring_parameters(doc):
        if enough_words(description, 5):
            yield source.record(
                "py_parameter_description", f"{name}.{parameter}", f"{parameter} of {short}", description
            )


def _resolve(source: Source, base: str) -> str:
    """Return the dotted name of a base class as far as this file's imports tell."""
    first, _, rest = base.partition(".")
    if first in source.imports:
        return ".".join(filter(None, (source.imports[first], rest)))
    return f"{source.module}.{base}" if not rest else base


def function_source(lines: list[str], node: FunctionNode) -> str:
    """Return the dedented source of a function without decorators and docstring; "" where too little is left."""
    doc, *body = node.body
    if not body or doc.lineno == node.lineno or body[0].lineno <= (doc.end_lineno or 0):
        return ""
    if lines[doc.lineno - 1][: doc.col_offset].strip():
        return ""  # the docstring shares a line with the end of the signature
    after = lines[doc.end_lineno : node.end_lineno]
    if len([line for line in after if line.strip()]) < 2:
        return ""
    return textwrap.dedent("\n".join(lines[node.lineno - 1 : doc.lineno - 1] + after)).strip()


def _message(node: ast.expr | None) -> str:
    """Return the text of a message expression with `...` for its values; "" where it is not text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%\(\w+\)[a-z]|%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z](?!\w)|\{[^{}]*\}", "...", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return _message(node.left)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _message(node.left), _message(node.right)
        return (left or "...") + (right or "...") if left or right else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _message(node.func.value)
    return ""


def _exception_records(source: Source, node: ast.Raise, scope: Scope) -> Iterator[Record]:
    """One message for each function, or other parts of the same function would be near-copies of the answer."""
    call = node.exc
    if not isinstance(call, ast.Call) or not call.args or not isinstance(call.func, (ast.Name, ast.Attribute)):
        return
    message = plain(_message(call.args[0]))
    function = scope.function
    name = ".".join(scope.names)
    if not enough_words(message, 4) or function is None or source.seen[f"py_exception_source {name}"]:
        return
    kind = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
    passage = _around(source.lines, function, node.lineno)
    yield source.record("py_exception_source", name, clip(f"{kind}: {message}", QUERY_CHARS), passage)


def _around(lines: list[str], function: FunctionNode, focus: int) -> str:
    """Return the function's first lines and, when it is longer than a passage, the part that ends after `focus`."""
    whole = textwrap.dedent("\n".join(lines[function.lineno - 1 : function.end_lineno]))
    rows = whole.split("\n")
    at = focus - function.lineno
    last = min(len(rows), at + 6)
    if len("\n".join(rows[:last])) <= PASSAGE_CHARS:
        return clip_lines(whole)
    head = clip(rows[0], 200)
    first, room = last, PASSAGE_CHARS - len(head) - len("\n    ...\n")
    while first > 1 and room >= len(rows[first - 1]) + 1:
        first -= 1
        room -= len(rows[first]) + 1
    return clip_lines("\n".join([head, "    ...", *rows[first:last]]))


def _option_records(source: Source, node: ast.stmt) -> Iterator[Record]:
    value = getattr(node, "value", None)
    if isinstance(node, (ast.Expr, ast.Assign)) and isinstance(value, ast.Call):
        yield from _option(source, value)
    elif isinstance(node, ast.AnnAssign) and isinstance(value, ast.Call) and isinstance(node.target, ast.Name):
        for keyword in value.keywords:  # a dataclass of options: field(metadata={"help": ...})
            if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                texts = [
                    v for k, v in zip(keyword.value.keys, keyword.value.values) if getattr(k, "value", "") == "help"
                ]
                yield from _option_record(source, [f"--{node.target.id}"], texts[0] if texts else None)


def _option(source: Source, call: ast.Call) -> Iterator[Record]:
    """A call such as `parser.add_argument("-x", "--xyz", help="...")`, whatever its name: flags and help mark it."""
    flags = [
        a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str) and a.value[:1] == "-"
    ]
    help_text = next((k.value for k in call.keywords if k.arg == "help"), None)
    yield from _option_record(source, flags, help_text)


def _option_record(source: Source, flags: list[str], help_text: ast.expr | None) -> Iterator[Record]:
    text = plain(_message(help_text))
    if flags and enough_words(text, 4):
        query = clip(f"{' '.join(flags)} of {source.module}", QUERY_CHARS)
        yield source.record("py_option_help", flags[-1].lstrip("-"), query, clip(text, PASSAGE_CHARS))


def _comment_records(source: Source, statements: list[ast.stmt], scope: Scope) -> Iterator[Record]:
    """Comments on lines of their own directly above a statement, with the statements up to the next blank line.

    Lines between two statements hold nothing but comments, so a `#` inside a string is never taken for one.
    """
    lines, floor = source.lines, 0
    for at, node in enumerate(statements):
        top = node.lineno - 1  # lines above the statement
        while top > floor and lines[top - 1].lstrip().startswith("#"):
            top -= 1
        floor = node.end_lineno or node.lineno
        if top == node.lineno - 1 or isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom)):
            continue
        comment = plain(" ".join(line.lstrip().lstrip("#:! ") for line in lines[top : node.lineno - 1]))
        if not enough_words(comment, 5) or _is_noise(comment):
            continue
        end = node.end_lineno or node.lineno
        for later in statements[at + 1 :]:
            if later.lineno != end + 1 or end - node.lineno > 15:
                break
            end = later.end_lineno or later.lineno
        code = clip_lines(textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).strip())
        if enough_words(code, 4):
            name = ".".join((*scope.names, f"line{node.lineno}"))
            yield source.record("py_comment_code", name, clip(comment, QUERY_CHARS), code)


def _is_noise(comment: str) -> bool:
    """Return whether a comment is a licence, a tool's mark, a rule or code that was commented out."""
    if re.search(
        r"copyright|licen[sc]e|pylint|noqa|type: ignore|pragma|mypy|fmt: o|-{4}|={4}|\*{4}|#{2}", comment, re.IGNORECASE
    ):
        return True
    if comment.endswith(("(", "{", "[", ",", ")", ":")) or re.match(
        r"(?:if|for|return|def|assert|print|self)\b.*[=(]", comment
    ):
        return True
    return bool(re.match(r"[\w.\[\]]+\s*(?:[-+*/|&]?=|\()", comment))
