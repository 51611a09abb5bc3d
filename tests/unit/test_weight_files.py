"""Weight files in the released format, selection, baselines, caps, trajectories."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdro_ray.dro import select
from tdro_ray.dro.files import WeightFile, read_trajectory, read_weights, write_trajectory, write_weights
from tdro_ray.errors import ConfigError, DataError

SHARED = Path(os.environ.get("TDRO_SHARED") or Path(__file__).parents[2].parent / "shared")
RELEASED = SHARED / "reference" / "released_weights"
released = pytest.mark.skipif(
    not RELEASED.is_dir(), reason=f"no {RELEASED}; set TDRO_SHARED to the folder that holds reference/"
)
FILES = ["curr", "mean", "ema", "top20", "top30", "top40", "top50", "top60", "top70", "top80", "top90"]
SIZES = {"a": 100, "b": 300, "c": 600}


@released
@pytest.mark.parametrize("name", [*(f"{f}_weights" for f in FILES), "uniform_sampling_s0"])
def test_released_files_are_read_and_written_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    source = RELEASED / f"{name}.json"
    write_weights(tmp_path / "again.json", read_weights(source))
    assert (tmp_path / "again.json").read_bytes() == source.read_bytes()


@released
@pytest.mark.parametrize("percent", [20, 30, 40, 50, 60, 70, 80, 90])
def test_selection_from_the_current_weights_is_the_released_selection(percent: int) -> None:
    ours = read_weights(RELEASED / "curr_weights.json").selected(percent)
    theirs = read_weights(RELEASED / f"top{percent}_weights.json")
    assert ours.tasks == theirs.tasks and ours.weights == theirs.weights and ours.sizes == theirs.sizes


@released
def test_released_uniform_sampling_is_our_uniform_baseline() -> None:
    file = read_weights(RELEASED / "uniform_sampling_s0.json")
    assert select.uniform(file.sizes) == file.weights


def test_meta_is_kept_and_epochs_are_passes_over_a_task(tmp_path: Path) -> None:
    file = WeightFile({"a": 0.5, "b": 0.3, "c": 0.2}, SIZES, {"measure": "ratio", "seed": 42})
    write_weights(tmp_path / "w.json", file)
    assert read_weights(tmp_path / "w.json") == file
    raw = json.loads((tmp_path / "w.json").read_text())
    assert list(raw) == ["domain_ids", "domain_weights", "size", "epoch", "meta"]
    assert raw["epoch"] == pytest.approx({"a": 5.0, "b": 1.0, "c": 1 / 3})
    assert [p.name for p in tmp_path.iterdir()] == ["w.json"]  # no temporary file left


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    write_weights(path, WeightFile({"a": 1.0}, {"a": 5}))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"sum to 0\.5"):
        write_weights(path, WeightFile({"a": 0.5}, {"a": 5}))
    with pytest.raises(TypeError):
        write_weights(path, WeightFile({"a": 1.0}, {"a": 5}, {"measure": object()}))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def valid() -> dict[str, Any]:
    return {
        "domain_ids": {"a": 0, "b": 1, "c": 2},
        "domain_weights": {"a": 0.5, "b": 0.3, "c": 0.2},
        "size": dict(SIZES),
        "epoch": {"a": 5.0, "b": 1.0, "c": 1 / 3},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("domain_weights"), "lacks 'domain_weights'"),
        (lambda raw: raw.pop("size"), "lacks 'size'"),
        (lambda raw: raw["size"].pop("a"), "differ in tasks: a"),
        (lambda raw: raw["domain_ids"].update(a=7), "0 to 2"),
        (lambda raw: raw["domain_weights"].update(a=-0.5), "weight of 'a' is -0.5"),
        (lambda raw: raw["domain_weights"].update(a=float("nan")), "weight of 'a' is nan"),
        (lambda raw: raw["domain_weights"].update(a="0.5"), "weight of 'a' is '0.5'"),
        (lambda raw: raw["domain_weights"].update(a=0.6), "sum to 1.1"),
        (lambda raw: raw["size"].update(a=0), "size of 'a' is 0"),
        (lambda raw: [raw[k].clear() for k in ("domain_ids", "domain_weights", "size")], "lists no task"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(change: Any, message: str, tmp_path: Path) -> None:
    raw, path = valid(), tmp_path / "bad.json"
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=message) as caught:
        read_weights(path)
    assert "bad.json" in str(caught.value)


def test_unreadable_files_and_unknown_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_weights(tmp_path / "none.json")
    path = tmp_path / "w.json"
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_weights(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="JSON object"):
        read_weights(path)
    path.write_text(json.dumps(valid()))
    assert read_weights(path, known=["c", "b", "a", "d"]).tasks == ["a", "b", "c"]
    with pytest.raises(DataError, match="no task 'a' in the store"):
        read_weights(path, known=["b", "c"])


def test_domain_ids_give_the_order(tmp_path: Path) -> None:
    raw = valid()
    raw["domain_ids"] = {"a": 2, "b": 0, "c": 1}
    (tmp_path / "w.json").write_text(json.dumps(raw))
    assert read_weights(tmp_path / "w.json").tasks == ["b", "c", "a"]


def test_top_k_keeps_at_least_one_and_breaks_ties_by_order() -> None:
    assert select.select_top({"a": 0.2, "b": 0.4, "c": 0.4}, 70) == {"b": 0.5, "c": 0.5}
    assert select.select_top({"a": 0.4, "b": 0.4, "c": 0.2}, 1) == {"a": 1.0}
    for percent in (0, 101, -5):
        with pytest.raises(ConfigError, match="not valid"):
            select.select_top({"a": 1.0}, percent)


def test_selection_by_amount_never_keeps_more_data_than_asked() -> None:
    weights = {"a": 0.5, "b": 0.2, "c": 0.3}
    assert select.select_amount(weights, SIZES, 0.7) == {"a": 0.5, "c": 0.5}  # 700 of 1000 rows
    assert select.select_amount(weights, SIZES, 0.69) == {"a": 1.0}
    assert select.select_amount({"a": 0.1, "b": 0.1, "c": 0.8}, SIZES, 0.1) == {"c": 1.0}  # the first always stays
    assert select.kept_share({"a": 0.5, "c": 0.5}, SIZES) == pytest.approx(0.7)
    assert set(select.select_amount(weights, SIZES, 1)) == set(SIZES)


def test_baselines() -> None:
    assert select.proportional(SIZES) == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6})
    assert select.temperature(SIZES, 0) == pytest.approx(select.uniform(SIZES))
    root = select.temperature({"a": 100, "b": 400}, 0.5)
    assert root == pytest.approx({"a": 1 / 3, "b": 2 / 3})


def test_mixing_with_an_even_share() -> None:
    assert select.mixed({"a": 0.9, "b": 0.1}, 0.5) == pytest.approx({"a": 0.7, "b": 0.3})
    assert select.mixed({"a": 0.9, "b": 0.1}, 0) == {"a": 0.9, "b": 0.1}
    with pytest.raises(ConfigError, match="even share"):
        select.mixed({"a": 1.0}, 1.5)


def test_capped_weights_by_hand() -> None:
    # limits at 2 repeats of 1000 draws: a 0.2, b 0.6, c 1.2; a gives up 0.4, of which b and c get 0.3 and 0.1
    assert select.cap_repeats({"a": 0.6, "b": 0.3, "c": 0.1}, SIZES, 2) == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})
    # the surplus of a brings b over its own limit of 0.3: c takes the rest
    assert select.cap_repeats({"a": 0.6, "b": 0.3, "c": 0.1}, SIZES, 1.2) == pytest.approx(
        {"a": 0.12, "b": 0.36, "c": 0.52}
    )
    untouched = {"a": 0.1, "b": 0.3, "c": 0.6}
    assert select.cap_repeats(untouched, SIZES, 1.5) == pytest.approx(untouched)
    with pytest.raises(ConfigError, match=r"Allow at least 2\.5 repeats"):
        select.cap_repeats({"a": 0.5, "b": 0.5, "c": 0.0}, SIZES, 2)


@given(
    tasks=st.dictionaries(
        st.text(min_size=1, max_size=3), st.tuples(st.floats(1e-6, 1), st.integers(1, 10**6)), min_size=1, max_size=8
    ),
    slack=st.floats(1, 20),
)
def test_caps_hold_sum_to_one_and_keep_the_ratio_of_free_tasks(tasks: dict, slack: float) -> None:
    weights = select.normalised({t: w for t, (w, _) in tasks.items()})
    sizes = {t: n for t, (_, n) in tasks.items()}
    capped = select.cap_repeats(weights, sizes, slack)
    assert sum(capped.values()) == pytest.approx(1)
    drawn = select.repeats(capped, sizes)
    assert all(r <= slack * (1 + 1e-6) for r in drawn.values())
    free = [t for t in capped if drawn[t] < slack * (1 - 1e-6)]
    scale = [capped[t] / weights[t] for t in free]
    assert scale == pytest.approx(scale[:1] * len(scale), rel=1e-6)
    assert all(s >= 1 - 1e-9 for s in scale)  # nobody below the cap loses


def test_trajectory_round_trip(tmp_path: Path) -> None:
    alpha = torch.rand(3, 2, dtype=torch.float64)
    signal = np.arange(6).reshape(3, 2)
    write_trajectory(tmp_path / "t.parquet", [0, 5, 7], ["b", "a"], alpha, signal)
    read = read_trajectory(tmp_path / "t.parquet")
    assert read.steps == [0, 5, 7] and read.tasks == ["b", "a"]
    assert np.array_equal(read.alpha_SG, alpha.numpy()) and np.array_equal(read.signal_SG, signal)
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column_names == ["step", "task", "alpha", "signal"]
    assert table.slice(3, 1).to_pylist() == [{"step": 5, "task": "a", "alpha": alpha[1, 1].item(), "signal": 3.0}]


def test_bad_trajectories_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    with pytest.raises(ValueError, match="shape"):
        write_trajectory(path, [0], ["a", "b"], np.ones((2, 2)), np.ones((2, 2)))
    with pytest.raises(DataError, match="cannot be read"):
        read_trajectory(path)
    path.write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        read_trajectory(path)
    pq.write_table(pa.table({"step": [0], "task": ["a"], "alpha": [1.0]}), path)
    with pytest.raises(DataError, match="lacks the column signal"):
        read_trajectory(path)
    uneven = {"step": [0, 0, 1], "task": ["a", "b", "a"], "alpha": [0.5, 0.5, 1.0], "signal": [0.0] * 3}
    pq.write_table(pa.table(uneven), path)
    with pytest.raises(DataError, match="once per step"):
        read_trajectory(path)
