"""Hugging Face datasets as sources, by a local folder that the library reads just like a hub id."""

import os
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tdro_ray.data.count import count_rows
from tdro_ray.data.formats import Reject, located, read
from tdro_ray.data.hub import HubDataset
from tdro_ray.data.sources import discover
from tdro_ray.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "all-pairs"
    made.mkdir()
    for part in range(2):
        rows = [f"q{part * 10 + n}" for n in range(10)]
        columns = {"anchor": rows, "positive": [f"p of {q}" for q in rows]}
        pq.write_table(pa.table(columns), made / f"train-{part:05d}-of-00002.parquet")
    pq.write_table(pa.table({"anchor": ["t", ""], "positive": ["p of t", "p"]}), made / "test-00000-of-00001.parquet")
    return made


@pytest.mark.parametrize(
    ("source", "name", "dataset"),
    [
        ("hf:org/name", "name", HubDataset("org/name")),
        ("hf:org/name?config=pair&split=dev", "name-pair-dev", HubDataset("org/name", "pair", "dev")),
        ("hf:name?revision=v1.0", "name", HubDataset("name", revision="v1.0")),
    ],
)
def test_a_source_and_back(source: str, name: str, dataset: HubDataset) -> None:
    assert located(source) == dataset and str(dataset) == source and dataset.name == name


def test_rows_in_order(folder: Path) -> None:
    (task,) = discover([f"hf:{folder}"])
    assert task.name == "all-pairs" and task.info.source == f"hf:{folder}"
    ((dataset, name),) = task.files
    rows = list(read(dataset, name))
    assert [(r.id, r.query, r.positives[0].text) for r in rows] == [
        (f"all-pairs:{n + 1}", f"q{n}", f"p of q{n}") for n in range(20)
    ]
    assert count_rows(task) == (0, False), "a folder has no card that counts them"


def test_another_split_and_a_reject(folder: Path) -> None:
    row, reject = read(HubDataset.parse(f"hf:{folder}?split=test"), "hf")
    assert (row.query, row.id) == ("t", "all-pairs:1")
    assert isinstance(reject, Reject) and (reject.line, reject.reason) == (2, "empty query")
    assert reject.file == f"hf:{folder}?split=test"


def test_the_fingerprint_is_that_of_the_files(folder: Path) -> None:
    first = discover([f"hf:{folder}"])[0].fingerprint()
    assert discover([f"hf:{folder}"])[0].fingerprint() == first
    os.utime(folder / "train-00001-of-00002.parquet", (1, 1))
    assert discover([f"hf:{folder}"])[0].fingerprint() != first


def test_it_is_a_stream(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    texts = [f"{n} " + "x" * 1000 for n in range(20_000)]
    pq.write_table(
        pa.table({"query": texts, "positive": texts}), tmp_path / "big" / "train.parquet", row_group_size=500
    )
    rows = read(HubDataset(str(tmp_path / "big")), "hf")
    next(rows)
    tracemalloc.start()
    assert sum(1 for _ in rows) == 19_999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 << 20, "40 MB of rows must not be held at once"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", "names no dataset. Write hf:org/name"),
        ("hf:org/name?splt=dev", "no option 'splt'. Did you mean 'split'"),
        ("hf:org/nowhere", "Couldn't reach 'org/nowhere' on the Hub .*without a way to the hub give a folder"),
        ("hf:{folder}?split=nope", r"Bad split: nope. Available splits: \['train', 'test'\]"),
        ("hf:{folder}?config=nope", "'nope' not found"),
    ],
)
def test_what_cannot_be_read_is_one_message(folder: Path, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        for task in discover([source.format(folder=folder)]):
            task.fingerprint()
            list(read(*task.files[0]))


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'tdro-ray\[hf\]'"):
        discover([f"hf:{folder}"])[0].fingerprint()
