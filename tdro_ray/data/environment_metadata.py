"""Records from what is not Python source: READMEs in package metadata, language-reference topics, C functions.

Imports standard-library modules only (`pydoc_data.topics` and `C_MODULES`); knows nothing of sampling or splitting.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tdro_ray.data.environment_source import Record
from tdro_ray.data.environment_texts import QUERY_CHARS, clip, clip_lines, enough_words, indent_of, plain

C_MODULES = ("builtins", "itertools", "math", "time")  # without Python source, safe to import, always present
OWN_DISTRIBUTION = "tdro-ray"


class Installed(NamedTuple):
    """One installed distribution."""

    name: str  # normalised
    version: str
    readme: str


def installed(roots: Sequence[Path]) -> list[Installed]:
    """Return the distributions under `roots`, sorted by name; this project itself is left out."""
    found: dict[str, Installed] = {}
    for distribution in importlib.metadata.distributions(path=[str(root) for root in roots]):
        # `distribution.metadata` parses the whole file anew at each access, which takes longer than all the rest.
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        header, _, readme = text.replace("\r\n", "\n").partition("\n\n")
        fields = dict(re.findall(r"(?m)^(Name|Version):\s*(\S+)", header))
        name = re.sub(r"[-_.]+", "-", fields.get("Name", "")).lower()
        if name and name != OWN_DISTRIBUTION:
            found.setdefault(name, Installed(name, fields.get("Version", ""), readme))
    return sorted(found.values())


def readme_records(roots: Sequence[Path]) -> Iterator[Record]:
    """Yield (distribution and heading, section) of every README in the metadata of the installed distributions."""
    for name, _, readme in installed(roots):
        sections = [(h, t) for h, t in readme_sections(readme) if not _RELEASE.match(h)]
        kept = [(h, t) for h, t in sections if enough_words(h, 1) and enough_words(t, 12)]
        for identity, heading, text in _numbered(f"{name}:README", kept):
            yield Record("py_readme_section", identity, name, clip(f"{name}: {heading}", QUERY_CHARS), text)


def topic_records() -> Iterator[Record]:
    """Yield (heading or definition, text) of the Python language reference."""
    if importlib.util.find_spec("pydoc_data.topics") is None:  # some distributions of Python leave it out
        return
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        kept = [(h, body) for h, body in topic_entries(text) if enough_words(body, 12)]
        for identity, heading, body in _numbered(f"pydoc_data.topics:{topic}", kept):
            # The group is the heading: a definition that stands in two topics stays on one side.
            yield Record("py_language_reference", identity, f"topic {heading}", clip(heading, QUERY_CHARS), body)


def c_function_records() -> Iterator[Record]:
    """Yield (signature, docstring) of the functions, types and methods of `C_MODULES`."""
    for module_name in C_MODULES:
        for name, thing in sorted(vars(importlib.import_module(module_name)).items()):
            if name[0] == "_" or getattr(thing, "__module__", module_name) != module_name:
                continue
            yield from _c_record(module_name, name, thing)
            for method, function in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
                if method[0] != "_":
                    yield from _c_record(module_name, f"{name}.{method}", function)


def _c_record(module_name: str, name: str, thing: object) -> Iterator[Record]:
    doc = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    if callable(thing) and enough_words(doc, 5):
        signature = getattr(thing, "__text_signature__", None) or "(...)"
        signature = re.sub(r"\$(self|module|type),? ?", "", signature)
        doc = re.sub(rf"\A(?:(?:\w+\.)*{name.rpartition('.')[2]}\(.*(?:\n|\Z))+\s*", "", doc) or doc
        yield Record(
            "py_signature_docstring", f"{module_name}:{name}", module_name, f"{name}{signature}", clip_lines(doc)
        )


def _numbered(prefix: str, sections: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield (id without blanks, heading, text); a heading that comes again gets `#2`."""
    seen: Counter[str] = Counter()
    for heading, body in sections:
        name = re.sub(r"\s+", "-", heading)
        seen[name] += 1
        yield f"{prefix}/{name}" + (f"#{seen[name]}" if seen[name] > 1 else ""), heading, body


_FENCE = re.compile(r"\s*(?:```|~~~)")
_MARKDOWN_HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*$")
_MARKUP = re.compile(r"\s*(?:\.\. |:\w+:|\[[^\]]+\]:\s|\W*$)")  # lines that say nothing, blank ones among them
_RELEASE = re.compile(r"\W*(?:version|release|v)?\s*\d+\.\d+", re.IGNORECASE)  # headings of change logs
_UNDERLINE = re.compile(r"([=\-~^*+#\"'`.])\1{2,}\s*$")


def readme_sections(text: str) -> list[tuple[str, str]]:
    """Return (heading, text up to the next heading) of a Markdown or reStructuredText README, links flattened."""
    sections: list[tuple[str, list[str]]] = []
    lines = text.split("\n")
    fenced = False
    for at, line in enumerate(lines):
        fenced ^= bool(_FENCE.match(line))
        following = lines[at + 1] if at + 1 < len(lines) else ""
        heading = None if fenced else _MARKDOWN_HEADING.match(line)
        if heading:
            sections.append((heading[1], []))
        elif not fenced and _is_title(line) and _UNDERLINE.match(following) and len(following) >= len(line.strip()) - 1:
            sections.append((line, []))
        elif sections and not (not fenced and _UNDERLINE.match(line)):
            sections[-1][1].append(line)
    return [(plain(_flat(heading)), clip_lines(_flat_block("\n".join(body)))) for heading, body in sections]


def _is_title(line: str) -> bool:
    return bool(line.strip()) and not line[0].isspace() and len(line) <= 80 and enough_words(line, 1)


def _flat(text: str) -> str:
    """Return `text` without images, HTML tags, link targets and emphasis."""
    text = re.sub(r"</?(?:a|b|i|u|em|strong|code|kbd|span|sub|sup)\b[^<>]*>", "", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|</?[a-zA-Z][^<>]*>|\|[\w\s-]+\|", " ", text)
    text = re.sub(r"\[([^\]\[]+)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*(?:<[^`>]*>)?`_+", r"\1", text)
    return text.replace("**", "").replace("`", "")


def _flat_block(text: str) -> str:
    """Return `text` flattened, without code fences, directives, field lists, link definitions and rules."""
    text = re.sub(r"(?m)^\s*(?:```|~~~).*$", "", text)
    lines = [line for line in _flat(text).split("\n") if not _MARKUP.match(line)]
    return "\n".join(plain(line) for line in lines)


def topic_entries(text: str) -> list[tuple[str, str]]:
    """Return (heading or definition, text) of a language-reference topic.

    Headings are underlined; a definition is a line such as ``object.__len__(self)`` with an indented body.
    """
    entries: list[tuple[str, str]] = []
    lines = text.split("\n")
    for at, line in enumerate(lines):
        following = lines[at + 1] if at + 1 < len(lines) else ""
        if line.strip() and _UNDERLINE.match(following) and not following[0].isspace():
            body: list[str] = []
            for n, later in enumerate(lines[at + 2 :], at + 2):
                if (
                    n + 1 < len(lines)
                    and later.strip()
                    and _UNDERLINE.match(lines[n + 1])
                    and not lines[n + 1][0].isspace()
                ):
                    break
                body.append(later)
            entries.append((line.strip(), "\n".join(body)))
        elif (
            re.match(r"\s*(?:(?:class|exception|coroutine) )?[a-z_]+[\w.]*(?:\(.*\)|\.\w+)$", line)
            and not following.strip()
        ):
            entries.append((line.strip(), "\n".join(_indented(lines[at + 1 :], indent_of(line)))))
    return [(heading, clip_lines(body.strip("\n"))) for heading, body in entries if body.strip()]


def _indented(lines: list[str], indent: int) -> Iterator[str]:
    for line in lines:
        if line.strip() and indent_of(line) <= indent:
            return
        yield line[indent:].strip() if line.strip() else ""
