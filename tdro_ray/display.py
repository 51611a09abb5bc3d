"""What a user sees of a run: on a terminal a live line per stage, elsewhere (a job's log) plain lines now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUIET_SECONDS = 15.0  # between two progress lines where there is no terminal


class Terminal:
    """Live progress by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[_Live]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[name]:<20}"),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            yield _Live(bars, bars.add_task("", total=None, name=name))

    def done(self, name: str, line: str, seconds: float) -> None:
        self.console.print(f"[green]✓[/] {name:<20} {_time(seconds)}  {_plain(line)}")

    def skipped(self, name: str, line: str) -> None:
        self.console.print(f"[dim]· {name:<20} up to date  {_plain(line)}[/]")


class _Live:
    def __init__(self, bars: object, task: int) -> None:
        self.bars, self.task = bars, task

    def update(self, text: str, share: float | None = None) -> None:
        total = {} if share is None else {"total": 1.0, "completed": share}
        self.bars.update(self.task, description=_plain(text), **total)  # type: ignore[attr-defined]


class Lines:
    """Plain lines, flushed, for logs."""

    @contextmanager
    def stage(self, name: str) -> Iterator[_Slow]:
        print(f"  {name} …", flush=True)
        yield _Slow(name)

    def done(self, name: str, line: str, seconds: float) -> None:
        print(f"✓ {name:<20} {_time(seconds)}  {line}", flush=True)

    def skipped(self, name: str, line: str) -> None:
        print(f"· {name:<20} up to date  {line}", flush=True)


class _Slow:
    def __init__(self, name: str) -> None:
        self.name, self.last = name, time.monotonic()

    def update(self, text: str, share: float | None = None) -> None:
        if time.monotonic() - self.last >= QUIET_SECONDS:
            self.last = time.monotonic()
            print(f"  {self.name}: {text}" + (f" ({share:.0%})" if share is not None else ""), flush=True)


def display() -> Terminal | Lines:
    """Return the display that fits standard output."""
    return Terminal() if sys.stdout.isatty() else Lines()


def _time(seconds: float) -> str:
    return f"{seconds:6.1f} s"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich reads brackets as markup


def table(rows: list[list[str]]) -> str:
    """Return a text table: first row the header, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
