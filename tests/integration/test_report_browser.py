"""The report page in a real browser, headless Chromium: plots are drawn, nothing overflows, the console stays empty."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from fake_run import make_compared_run, make_run

from tdro_ray.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)")

# A frame of the wanted width (a window cannot be narrower than 500 pixels), measured from outside once it is drawn
MEASURE = """<!doctype html><body style="margin:0"><iframe srcdoc="{page}" style="width:{width}px;height:900px;border:0"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const box = e => {{ const b = e.getBoundingClientRect(); return [b.left, b.right, b.width, b.height].map(Math.round); }};
  const shown = [...page.querySelectorAll("svg")].filter(e => e.getClientRects().length);
  const texts = shown.flatMap(s => [...s.querySelectorAll("text")].map(t => [box(t), box(s), t.textContent]));
  const result = {{
    width: page.defaultView.innerWidth, scroll: root.scrollWidth, plots: shown.map(box),
    cut: texts.filter(([t, s]) => t[0] < s[0] - 2 || t[1] > s[1] + 2).map(([, , words]) => words),
    ink: shown.map(s => getComputedStyle(s.querySelector("text")).fill),
    tables: [...page.querySelectorAll(".box")].map(box), searches: page.querySelectorAll(".search").length,
  }};
  document.body.innerHTML = "<pre>" + JSON.stringify(result) + "</pre>";
}});
</script>"""


def browse(page: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """Open a page and return (its final DOM, what reached the console)."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    command += [
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--dump-dom",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", params=[9, 25])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = None if request.param == 9 else [f"collection-{i}-{'of_questions' * (i % 3)}" for i in range(request.param)]
    folder = make_run(
        tmp_path_factory.mktemp("runs") / "quickstart", tasks=tasks, queries=40, untested=tasks[3] if tasks else ""
    )
    return write_report(folder)


def test_the_page_opens_with_its_plots_and_an_empty_console(report: Path, tmp_path: Path) -> None:
    dom, console = browse(report, tmp_path)
    assert console == []
    assert len(re.findall(r"<svg", dom)) == 16
    assert "parse an ISO 8601 date" in dom


def test_the_console_check_sees_what_the_page_forbids(report: Path, tmp_path: Path) -> None:
    """The page's own policy refuses scripts and fetches; a browser says so on the console."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        report.read_text(encoding="utf-8").replace("</main>", '<script>1</script><img src="x.png"></main>'),
        encoding="utf-8",
    )
    assert len(browse(bad, tmp_path / "profile")[1]) == 2


@pytest.mark.parametrize("width", [1280, 900, 390])
def test_plots_fill_the_width_and_nothing_overflows(report: Path, tmp_path: Path, width: int) -> None:
    page = measured(report, tmp_path, width)
    assert len(page["plots"]) == 8
    assert page["searches"] == 2


@pytest.mark.parametrize("width", [1280, 390])
def test_a_comparison_over_seeds_has_its_plots_too(compared: Path, tmp_path: Path, width: int) -> None:
    """Beside the seven: the map of all mixtures, the mixtures over seeds, the weights over seeds, the influence."""
    assert len(measured(compared, tmp_path, width)["plots"]) == 12


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = [f"collection-{i}-{'of_questions' * (i % 3)}" for i in range(18)]
    return write_report(make_compared_run(tmp_path_factory.mktemp("runs") / "real", tasks))


def measured(report: Path, tmp_path: Path, width: int) -> dict[str, Any]:
    """What a browser of that width makes of the page, once checked for what no width may show."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE.format(page=html.escape(text), width=width), encoding="utf-8")
    dom, console = browse(outer, tmp_path / "profile", "--window-size=1400,1000", "--virtual-time-budget=10000")
    assert console == []
    found = re.search(r"<pre>(\{.*\})</pre>", dom)
    assert found is not None, dom[-2000:]
    page = json.loads(html.unescape(found[1]))
    assert page["width"] in range(width - 20, width + 1)  # less a scroll bar
    assert page["scroll"] <= page["width"]  # the page never scrolls sideways, only boxes within it do
    for left, right, across, high in page["plots"]:
        assert left >= 0
        assert right <= page["width"]
        assert across > 250
        assert high > 150
    assert page["cut"] == []  # no label runs out of its plot
    assert set(page["ink"]) != {"rgb(0, 0, 0)"}  # the colour variables are resolved
    assert all(right <= page["width"] for _, right, _, _ in page["tables"])
    return dict(page)
