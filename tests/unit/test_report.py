"""The report page from made-up run folders: whole, partial, broken and hostile ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from fake_run import TASKS, make_run, write_json
from hypothesis import given
from hypothesis import strategies as st

from tdro_ray import recipe
from tdro_ray.dro.weights import effective_tasks as their_effective_tasks
from tdro_ray.dro.weights import weight_shift as their_weight_shift
from tdro_ray.errors import DataError
from tdro_ray.report import drawing, findings, page, plots
from tdro_ray.report.collect import collect
from tdro_ray.report.findings import compare_models, effective_tasks, verdict, warnings, weight_shift
from tdro_ray.report.page import summary_table, write_report
from tdro_ray.report.repeat import changed_settings, commands

VOID = {"meta", "link", "br", "wbr"}
HOSTILE = [
    '<script>alert("x")</script>',
    "</svg><img src=http://x.example/a.png>",
    "a & b $x$ 'quoted' \"double\"",
    "日本語タスク",
]


class Tags(HTMLParser):
    """Counts tags and ids, and notes any tag that is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.misplaced: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.links += [value or "" for key, value in attrs if key in ("href", "src", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.misplaced.append(tag)


def assert_sound(text: str) -> Tags:
    """The page is well formed, its ids are unique, it holds no script and points nowhere but into itself."""
    tags = Tags(text)
    assert not tags.misplaced
    assert not tags.open
    assert [i for i, n in Counter(tags.ids).items() if n > 1] == []
    assert not set(tags.count) & {"script", "img", "iframe", "object", "embed", "form"}
    for link in tags.links:
        assert link == "data:," or (link.startswith("#") and link[1:] in tags.ids), link
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{i}" for i in tags.ids}
    assert "#fe00" not in text  # every stand-in colour became a variable
    return tags


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart", untested="language_reference")


@pytest.fixture
def light_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are painted but not written out, which is most of a page's time."""
    from matplotlib.figure import Figure

    def paint_only(name: str, description: str, width: int, height: int, paint: Callable[[Any], None]) -> str:
        with matplotlib.rc_context(drawing.STYLE):
            paint(Figure().add_subplot())
        return "<svg></svg>"

    monkeypatch.setattr(plots, "draw", paint_only)
    monkeypatch.setattr(findings, "RESAMPLES", 200)


def test_a_whole_run_has_every_part(run_folder: Path) -> None:
    path = write_report(run_folder)
    text = path.read_text(encoding="utf-8")
    tags = assert_sound(text)
    assert path == run_folder / "report.html"
    assert tags.count["svg"] == 2 * 8  # eight plots, each for wide screens and for phones
    assert "not run yet" not in text
    for words in [
        "current beats uniform",
        "top70",
        "Holm",
        "parse an ISO 8601 date",
        "Near a test query",
        "Shared positive",
        "Taken by the margins",
        "nearly the answer",
        "effective tasks",
        "torch",
        "tdro run",
    ]:
        assert words in text, words
    assert len(text) < 700_000
    assert [p.name for p in run_folder.glob("report*")] == ["report.html"]


def test_the_same_run_gives_the_same_bytes(run_folder: Path) -> None:
    write_report(run_folder)
    assert page.render(collect(run_folder)) == (run_folder / "report.html").read_text(encoding="utf-8")


def test_texts_from_outside_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tasks=[*TASKS[:4], *HOSTILE], queries=20)
    evil = HOSTILE[0]
    write_json(
        folder / "serve.json", [{"query": evil, "hits": [{"id": evil, "score": 0.5, "title": evil, "text": evil}]}]
    )
    write_json(folder / "versions.json", {evil: evil})
    settings = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**settings, "name": evil, "data": {evil: evil}})
    text = write_report(folder).read_text(encoding="utf-8")
    assert_sound(text)
    assert text.count("&lt;script&gt;") > 10
    assert "日本語タスク" in text


def test_an_empty_folder_says_what_has_not_run(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert_sound(text)
    for stage in ("ingest", "optimize", "evaluate", "serve"):
        assert re.search(rf"{stage}</th>.*?not run yet", text), stage
    assert summary_table(tmp_path) == [["task", "rows", "weight"]]


PARTS = ["config.json", "versions.json", "serve.json", "stages", "weights", "eval", "stages/ingest", "stages/optimize",
         "weights/trajectory.parquet", "weights/current.json", "stages/clean", "stages/clean/audit.json", "eval/uniform.json", "eval/uniform.per_query.json", "eval/current.per_query.json"]  # fmt: skip


@pytest.mark.usefixtures("light_plots")
@pytest.mark.parametrize("part", PARTS)
def test_any_missing_part_is_tolerated(run_folder: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    target = folder / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert_sound(write_report(folder).read_text(encoding="utf-8"))
    assert summary_table(folder)[0][:3] == ["task", "rows", "weight"]


@pytest.mark.usefixtures("light_plots")
@pytest.mark.parametrize(
    "part",
    [
        "config.json",
        "weights/current.json",
        "weights/trajectory.parquet",
        "eval/current.json",
        "stages/ingest/manifest.json",
    ],
)
def test_a_broken_part_is_named(run_folder: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / part).write_text('{"half', encoding="utf-8")
    text = write_report(folder).read_text(encoding="utf-8")
    assert_sound(text)
    assert re.search(rf"<li>[^<]*{re.escape(Path(part).name)}[^<]*</li>", text)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tdro run"):
        write_report(tmp_path / "nowhere")


def test_the_old_page_stays_when_a_new_one_fails(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "report.html").write_text("old", encoding="utf-8")
    monkeypatch.setattr(page, "render", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize(
    ("gain", "tone", "says"),
    [(0.05, "good", "beats uniform"), (0.0, "open", "can be chance"), (-0.05, "bad", "uniform beats every")],
)
def test_the_verdict_says_plainly_who_won(tmp_path: Path, gain: float, tone: str, says: str) -> None:
    facts = collect(make_run(tmp_path, gain=gain))
    found = compare_models(facts)
    assert verdict(facts, found)[0] == tone
    assert says in verdict(facts, found)[1]
    worse = [w for w in warnings(facts, found) if "significantly worse" in w]
    assert bool(worse) == (gain < 0)


def test_models_are_compared_over_tasks_and_corrected(run_folder: Path) -> None:
    facts = collect(run_folder)
    found = compare_models(facts)
    assert set(found.overall) == {"current", "top70"}
    assert "language_reference" not in found.tasks["current"]
    means = {m: r["mean"]["ndcg@10"] for m, r in facts.evals.items()}
    comparison, p = found.overall["current"]
    assert comparison.mean_diff == pytest.approx(means["current"] - means["uniform"])
    assert p >= comparison.p


def test_warnings_name_what_is_wrong(tmp_path: Path) -> None:
    facts = collect(make_run(tmp_path, drift=2.0, untested=TASKS[3], queries=20))
    texts = " ".join(warnings(facts, compare_models(facts)))
    for words in [
        "collapsed",
        f"No held-out test for {TASKS[3]}",
        "Fewer than 30",
        "refused while ingesting",
        f"The margins took most of what mining found for {TASKS[1]} (93%)",
        f"More negatives are random than mined or given for {TASKS[2]}",
        "training noise",
    ]:
        assert words in texts, words
    calm = collect(make_run(tmp_path / "calm", drift=0.0))
    assert "collapsed" not in " ".join(warnings(calm, compare_models(calm)))


def test_weight_statistics_agree_with_the_algorithm_room(run_folder: Path) -> None:
    facts = collect(run_folder)
    alpha = torch.tensor(facts.trajectory.alpha_SG)
    assert effective_tasks(facts.learned[1].values()) == pytest.approx(their_effective_tasks(alpha[-1]))
    assert weight_shift(facts) == pytest.approx(their_weight_shift(alpha, len(alpha) // 10))


def test_summary_table_is_ready_for_a_terminal(run_folder: Path) -> None:
    table = summary_table(run_folder)
    assert table[0] == ["task", "rows", "weight", "uniform", "current", "top70"]
    assert {len(row) for row in table} == {6}
    assert [row[0] for row in table[-2:]] == ["mean", "worst"]
    shares = [float(row[2].rstrip("%")) for row in table[1:-2]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert ["-", "-", "-"] in [row[3:] for row in table]  # the task without a test


def test_logged_steps_survive_a_resume_and_a_kill(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    log = folder / "stages" / "reference" / "metrics.jsonl"
    log.write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo', encoding="utf-8"
    )
    facts = collect(folder)
    assert [step["loss"] for step in facts.metrics["reference"]] == [3, 1]
    assert facts.problems == []
    log.write_text('{"step": 1}\nnot json\n{"step": 3}\n', encoding="utf-8")
    assert "line 2" in collect(folder).problems[0]


def test_the_commands_repeat_the_run_exactly(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = collect(run_folder)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    monkeypatch.setattr(recipe, "RECIPES", recipes)
    assert changed_settings(facts) is None
    copy = shlex.split(commands(facts)[0][1])
    assert copy[0] == "cp"
    shutil.copy(copy[1], tmp_path / copy[2])
    assert recipe.load_recipe(str(tmp_path / copy[2])).model_dump(mode="json") == facts.config

    (recipes / "quickstart.yaml").write_text(
        "finetune: {steps: 7}\nserve: {queries: [a, 'it''s']}\ncompare: [proportional]\n", encoding="utf-8"
    )
    command = shlex.split(commands(facts)[0][1])
    assert command[:3] == ["tdro", "run", "quickstart"]
    options = tuple(option for flag, option in zip(command[3::2], command[4::2], strict=True) if flag == "--set")
    assert recipe.load_recipe("quickstart", options).model_dump(mode="json") == facts.config


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_labels_keep_their_order_and_their_distance(wanted: list[float]) -> None:
    gap = 1 / 31
    places = drawing.spread(sorted(wanted), gap)
    assert all(np.diff(places) >= gap - 1e-9)
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9
    assert drawing.spread(places, gap) == pytest.approx(places)


def test_many_tasks_are_all_labelled(tmp_path: Path) -> None:
    tasks = [f"task number {i}" for i in range(25)]
    text = write_report(make_run(tmp_path, tasks=tasks, steps=600, queries=20)).read_text(encoding="utf-8")
    assert_sound(text)
    drawn = text[text.index("Weights over the") : text.index("Mixtures and data kept")]
    for task in tasks:
        assert len(re.findall(rf">{task} [\d.]+%</text>", drawn)) == 2, task
