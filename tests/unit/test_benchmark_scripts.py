"""The scripts under `benchmarks/` are kept running: what they write is what the product reads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tdro_ray.data.collection import CollectionStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> Any:
        found = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        monkeypatch.setitem(sys.modules, found.name, module)  # dataclasses look themselves up there
        found.loader.exec_module(module)
        return module

    return load


def test_every_script_can_be_loaded(script: Any) -> None:
    assert all(callable(script(path.stem).main) for path in BENCHMARKS.glob("*.py") if path.stem != "serving_search")


def test_the_data_benchmark_writes_a_store_of_the_asked_size(script: Any, tmp_path: Path) -> None:
    data = script("data")
    data.write_store(tmp_path, 2, 30, 3, 5, 9)
    tasks = [CollectionStore(tmp_path)[f"task{i}"] for i in range(2)]
    assert [(len(task), task.manifest.passages) for task in tasks] == [(30, 120), (30, 120)]
    row = tasks[0].take_rows([7], ["positives", "negatives"]).to_pylist()[0]
    assert len(row["positives"]) == 1 and len(row["negatives"]) == 3


def test_the_serving_benchmarks_vectors_are_of_unit_length_and_repeat(script: Any) -> None:
    import numpy as np

    search = script("serving_search")
    seeds = np.eye(8, dtype=np.float32)[np.arange(20) % 8]
    made = search.make_vectors(seeds, 100, 0)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(made, search.make_vectors(seeds, 100, 0))
