"""Which Python files of the installed environment are read: a bounded sample that depends on their names alone.

Knows nothing of tasks. Files are only read as text; no third-party module is ever imported.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_BYTES = 300_000  # larger files are tables or generated code
MIN_BYTES = 200
TEST_SHARE = 0.2  # of the groups are held out

# Modules that everybody knows: always read, always on the training side, so that a search over a small
# environment finds them. Names with an underscore hold the Python source of the public module in some versions.
WELL_KNOWN = frozenset(
    [
        "_pydatetime",
        "_strptime",
        "argparse",
        "asyncio",
        "calendar",
        "collections",
        "csv",
        "datetime",
        "difflib",
        "email",
        "gzip",
        "hashlib",
        "http",
        "itertools",
        "json",
        "logging",
        "os",
        "pathlib",
        "random",
        "re",
        "shutil",
        "socket",
        "sqlite3",
        "statistics",
        "subprocess",
        "tempfile",
        "textwrap",
        "threading",
        "time",
        "urllib",
        "zipfile",
    ]
)
SKIPPED_FOLDERS = frozenset(
    # tests; copies of other packages; parts of the standard library that are tables, tests or an application
    [
        "test",
        "tests",
        "testing_data",
        "idle_test",
        "conftest",
        "__pycache__",
        "site-packages",
        "dist-packages",
        "_vendor",
        "vendor",
        "vendored",
        "_vendored",
        "third_party",
        "thirdparty",
        "thirdparty_files",
        "externals",
        "extern",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "pydoc_data",
    ]
)
OWN_PACKAGES = frozenset({"tdro_ray", "cluster", "serve"})  # the environment must not change with this project's source


class SourceFile(NamedTuple):
    """One Python file; `module` is its dotted name, which is all of its location that reaches a text."""

    module: str
    path: str
    size: int  # bytes


def stable_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone (unlike `hash`, the same in every process)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=7).digest(), "big") / 2**56


def held_out(group: str) -> bool:
    """Return whether the texts of `group` belong to the tests. Well-known modules never do."""
    return group.partition(".")[0] not in WELL_KNOWN and stable_hash(f"split {group}") < TEST_SHARE


def environment_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed packages, without repeats."""
    names = [sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")]
    names += [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return [p for p in dict.fromkeys(Path(n).resolve() for n in names) if p.is_dir()]


def sample_files(max_files: int, roots: Sequence[Path] | None = None) -> list[SourceFile]:
    """Return at most `max_files` files under `roots` (default: the installed environment), by module name.

    Well-known modules come first. Of the rest a package of n files gives a number in proportion to sqrt(n), the
    files with the smallest hashes of their names: the largest packages do not drown the others.
    """
    files: dict[str, SourceFile] = {}
    for root in environment_roots() if roots is None else roots:
        for file in _walk(Path(root)):
            files.setdefault(file.module, file)  # as for an import, the first root wins
    packages: dict[str, list[SourceFile]] = defaultdict(list)
    for file in files.values():
        packages[file.module.partition(".")[0]].append(file)
    order: list[tuple[float, float, SourceFile]] = []
    for package, members in packages.items():
        members.sort(key=lambda file: (stable_hash(file.module), file.module))
        for rank, file in enumerate(members):
            priority = -1.0 if package in WELL_KNOWN else rank / math.sqrt(len(members))
            order.append((priority, stable_hash(file.module), file))
    return sorted((file for *_, file in sorted(order)[:max_files]), key=lambda file: file.module)


def chunk_files(files: Sequence[SourceFile], chunk_bytes: int = 1_000_000) -> list[list[SourceFile]]:
    """Return `files` in chunks of about `chunk_bytes`: the unit that one parallel worker parses at a time."""
    chunks: list[list[SourceFile]] = []
    filled = chunk_bytes
    for file in files:
        if filled + file.size > chunk_bytes:
            chunks.append([])
            filled = 0
        chunks[-1].append(file)
        filled += file.size
    return chunks


def _walk(root: Path) -> Iterator[SourceFile]:
    pending: list[tuple[str, tuple[str, ...]]] = [(str(root), ())]
    while pending:
        folder, parents = pending.pop()
        for entry in _entries(folder):
            if entry.is_dir(follow_symlinks=False):
                if entry.name.isidentifier() and entry.name not in SKIPPED_FOLDERS:
                    pending.append((entry.path, (*parents, entry.name)))
                continue
            stem, extension = os.path.splitext(entry.name)  # noqa: PTH122
            if extension != ".py" or not stem.isidentifier() or _skipped(stem) or not entry.is_file():
                continue
            parts = parents if stem == "__init__" else (*parents, stem)
            size = entry.stat().st_size
            if parts and parts[0] not in OWN_PACKAGES and MIN_BYTES <= size <= MAX_BYTES:
                yield SourceFile(".".join(parts), entry.path, size)


def _entries(folder: str) -> Iterable[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _skipped(stem: str) -> bool:
    generated = stem.endswith(("_pb2", "_pb2_grpc")) or stem.startswith(("_sysconfigdata", "__editable__"))
    return generated or stem == "conftest" or stem.startswith("test_") or stem.endswith(("_test", "_tests"))
