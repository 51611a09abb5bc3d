"""A whole run as a user starts it: what it prints and leaves, that it repeats nothing, that a kill loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import make_collections, tdro, write_recipe

from tdro_ray.dro.files import read_trajectory, read_weights

STAGES = [
    "ingest",
    "clean",
    "mine",
    "model",
    "reference",
    "score",
    "optimize",
    "finetune-current",
    "finetune-top70",
    "evaluate",
    "index",
    "serve",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(runs folder, recipe, completed process) of one whole run."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, make_collections(folder / "source"))
    return folder / "runs", recipe, tdro("run", recipe, runs=folder / "runs")


def test_a_run_leaves_what_the_readme_says(made):
    runs, _, done = made
    assert done.returncode == 0, done.stderr[-3000:]
    folder = runs / "small"
    for stage in STAGES:
        assert f"✓ {stage}" in done.stdout
        assert json.loads((folder / "stages" / stage / "manifest.json").read_text())["stage"] == stage
    assert json.loads((folder / "config.json").read_text())["optimize"]["eta"] == 0.3
    sizes = read_weights(folder / "weights" / "current.json").sizes
    assert list(sizes) == ["easy", "middle", "noisy"]
    for name in ("current", "mean", "ema"):
        weights = read_weights(folder / "weights" / f"{name}.json").weights
        assert sum(weights.values()) == pytest.approx(1) and len(set(weights.values())) == 3
    assert len(read_weights(folder / "weights" / "top70.json").weights) == 2
    assert read_trajectory(folder / "weights" / "trajectory.parquet").steps == list(range(6))
    for model in ("uniform", "current", "top70"):
        found = json.loads((folder / "eval" / f"{model}.json").read_text())
        assert set(found["tasks"]) == {"easy", "middle", "noisy"}
        mean = sum(t["ndcg@10"] for t in found["tasks"].values()) / 3
        assert found["mean"]["ndcg@10"] == pytest.approx(mean)
        assert found["tasks"]["easy"]["ndcg@10"] > found["tasks"]["noisy"]["ndcg@10"]
    hits = json.loads((folder / "serve.json").read_text())["queries"][0]["hits"]
    assert len(hits) == 2 and hits[0]["score"] >= hits[1]["score"]
    assert "<svg" in (folder / "report.html").read_text()
    assert "report.html" in done.stdout and "Next:" in done.stdout
    shipped = yaml.safe_load((Path(__file__).parents[2] / "serve" / "config.yaml").read_text())["applications"][0][
        "args"
    ]
    for name in ("model", "index"):  # what `serve deploy serve/config.yaml` asks for after the quickstart
        assert (folder / Path(shipped[name]).relative_to("runs/quickstart")).is_dir()


def test_a_second_run_repeats_nothing(made):
    runs, recipe, _ = made
    began = time.monotonic()
    done = tdro("run", recipe, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "✓" not in done.stdout
    assert all(f"· {stage}" in done.stdout for stage in STAGES)
    assert time.monotonic() - began < 60


def test_a_dry_run_after_it_says_so_and_writes_nothing(made):
    runs, recipe, _ = made
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    began = time.monotonic()
    done = tdro("run", recipe, "--dry-run", runs=runs)
    assert time.monotonic() - began < 5 and done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("up to date") == len(STAGES) + 1 and "to do" not in done.stdout
    changes = ("--set", "finetune.steps=16", "--set", "compare=[proportional]")
    shown = tdro("run", recipe, "--dry-run", *changes, runs=runs).stdout.splitlines()
    state = {line.split()[0]: "up to date" in line for line in shown[4:17] if line}
    assert [name for name, current in state.items() if not current] == [
        *("finetune-current", "finetune-top70", "finetune-proportional"),
        *("evaluate", "index", "serve"),
    ]
    assert "tokens/s of this recipe's earlier run" in "\n".join(shown)
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()} == before


def test_a_new_setting_redoes_only_what_depends_on_it(made):
    runs, recipe, _ = made
    done = tdro("evaluate", recipe, "--set", "evaluate.ndcg_at=5", runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "✓ evaluate" in done.stdout and "ndcg@5" in (runs / "small" / "eval" / "uniform.json").read_text()
    later = tdro("optimize", recipe, "--set", "reference.steps=9", runs=runs)
    assert later.returncode == 0, later.stderr[-3000:]  # the reference that exists is used, and still up to date
    assert "· optimize" in later.stdout


@pytest.mark.long
def test_a_killed_run_ends_like_an_uninterrupted_one(made, tmp_path):
    """SIGKILL in the middle of the reference and of stage 1; the same command goes on; alpha is bitwise the same."""
    runs, recipe, _ = made
    environment = {**os.environ, "TDRO_RUNS": str(tmp_path)}
    for stage, step in (("reference", 3), ("optimize", 3)):
        process = subprocess.Popen(
            [sys.executable, "-m", "tdro_ray", "run", str(recipe), "--no-serve"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _wait_for_step(tmp_path / "small" / "stages" / stage / "metrics.jsonl", step, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "small" / "stages" / stage / "manifest.json").exists()
    done = tdro("run", recipe, "--no-serve", runs=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "· reference" in done.stdout and "✓ optimize" in done.stdout
    for name in ("current", "mean", "ema"):
        ours, theirs = (read_weights(r / "small" / "weights" / f"{name}.json").weights for r in (tmp_path, runs))
        assert ours == theirs


def _wait_for_step(path: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never reached step {step} (exit code {process.poll()})")
