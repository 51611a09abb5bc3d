"""Text helpers of the environment source: normal form, cuts, summaries and parameters of docstrings.

Pure functions on strings; knows nothing of files, tasks or the syntax tree.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

QUERY_CHARS = 400
PASSAGE_CHARS = 1500

_WORDS = re.compile(r"\w+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`[~!]?([^`<]*?)\s*(?:<[^`>]*>)?`")
_SECTION = re.compile(
    r"\s*(?:(?:Args|Arguments|Parameters|Returns?|Raises|Yields?|Examples?|Usage|Notes?|Attributes|See Also|References|Warnings?)\s*:?\s*$"
    r"|:\w+[^:]*:(?:\s|$)|[-=~^*]{3,}\s*$|>>> |\.\. |@\w+)"
)
_GOOGLE_HEADER = re.compile(r"(\s*)(?:Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments)\s*:\s*$")
_GOOGLE_ENTRY = re.compile(r"\*{0,2}`{0,2}(\w+)`{0,2}(?:\s*\(.*?\))?\s*:(?:\s+(.*)|)$")
_NUMPY_ENTRY = re.compile(r"\*{0,2}(\w+)(?:\s*:.*)?$")
_SPHINX_ENTRY = re.compile(r"\s*:(?:param|parameter|arg|argument|keyword)\s+(?:[^:]*?\s)?\\?\*{0,2}(\w+)\s*:\s*(.*)$")


def normalise(text: str) -> str:
    """Return `text` as its lower-case words alone; two texts with the same words in order count as duplicates."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(_WORDS.findall(text.casefold()))


def enough_words(text: str, minimum: int) -> bool:
    """Return whether `text` has at least `minimum` words of two letters or more."""
    return len(_WORD.findall(text)) >= minimum


def plain(text: str) -> str:
    """Return `text` on one line, without reStructuredText roles and double backquotes."""
    return " ".join(_ROLE.sub(r"\1", text).replace("``", "").split())


def clip(text: str, limit: int) -> str:
    """Return `text` cut at a word boundary to at most `limit` characters."""
    if len(text) <= limit:
        return text
    return text[: limit + 1].rsplit(None, 1)[0][:limit].rstrip()


def clip_lines(text: str, limit: int = PASSAGE_CHARS) -> str:
    """Return `text` cut at a line boundary to at most `limit` characters (its first line is cut at a word)."""
    if len(text) <= limit:
        return text
    head = text[: limit + 1].rpartition("\n")[0].rstrip()
    return head or clip(text, limit)


def first_paragraph(doc: str, limit: int = QUERY_CHARS) -> str:
    """Return the first paragraph of a cleaned docstring on one line; "" where it opens with a section or markup."""
    lines: list[str] = []
    for line in doc.split("\n"):
        if _SECTION.match(line) or (not line.strip() and lines):
            break
        if line.strip():
            lines.append(line)
    return clip(plain(" ".join(lines)), limit)


def docstring_parameters(doc: str) -> list[tuple[str, str]]:
    """Return (name, description on one line) of each parameter documented in google, numpy or sphinx style."""
    lines = doc.split("\n")
    found: list[tuple[str, list[str]]] = []
    for at, line in enumerate(lines):
        if header := _GOOGLE_HEADER.match(line):
            found += _google_entries(lines[at + 1 :], len(header[1]))
        elif (
            line.strip() in ("Parameters", "Other Parameters")
            and at + 1 < len(lines)
            and set(lines[at + 1].strip()) == {"-"}
        ):
            found += _numpy_entries(lines[at + 2 :], indent_of(line))
        elif entry := _SPHINX_ENTRY.match(line):
            found.append((entry[1], [entry[2], *_deeper(lines[at + 1 :], indent_of(line))]))
    return [(name, clip(plain(" ".join(text)), PASSAGE_CHARS)) for name, text in found]


def indent_of(line: str) -> int:
    """Return the number of blanks that `line` begins with."""
    return len(line) - len(line.lstrip())


def _deeper(lines: list[str], indent: int) -> Iterator[str]:
    """Yield the lines up to the first one that is blank or not deeper than `indent`."""
    for line in lines:
        if not line.strip() or indent_of(line) <= indent:
            return
        yield line


def _google_entries(lines: list[str], header_indent: int) -> list[tuple[str, list[str]]]:
    entries: list[tuple[str, list[str]]] = []
    entry_indent = None
    for line in lines:
        if not line.strip():
            continue
        indent = indent_of(line)
        if indent <= header_indent:
            break
        entry_indent = indent if entry_indent is None else entry_indent
        start = _GOOGLE_ENTRY.match(line.strip()) if indent == entry_indent else None
        if start:
            entries.append((start[1], [start[2] or ""]))
        elif entries and indent >= entry_indent:
            entries[-1][1].append(line)
        else:
            break
    return entries


def _numpy_entries(lines: list[str], indent: int) -> list[tuple[str, list[str]]]:
    entries: list[tuple[str, list[str]]] = []
    for at, line in enumerate(lines):
        if not line.strip():
            continue
        if indent_of(line) > indent and entries:
            entries[-1][1].append(line)
            continue
        underlined = at + 1 < len(lines) and len(lines[at + 1].strip()) >= 3 and set(lines[at + 1].strip()) <= set("-=")
        start = _NUMPY_ENTRY.match(line.strip())
        if underlined or not start or indent_of(line) != indent:
            break
        entries.append((start[1], []))
    return entries
