"""Ingest on a real Ray: source order, determinism, what is redone, what a kill leaves, what bad input says."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdro_ray.config import Recipe
from tdro_ray.data.collection import CollectionStore, write_beir
from tdro_ray.data.ingest import ingest
from tdro_ray.errors import DataError
from tdro_ray.types import Passage, RetrievalTest

RAY = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 200 << 20}


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    import ray

    ray.init(**RAY)
    yield
    ray.shutdown()


def recipe(source: Path, **data: object) -> Recipe:
    return Recipe.model_validate({"data": {"sources": [str(source)], "dev_queries": 5, "dev_corpus": 20, **data}})


def make_task(folder: Path, rows: int, offset: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps([f"query {n} of {folder.name}", f"positive {n % 97 + offset} " * 20, f"negative {n % 89}"])
        for n in range(rows)
    ]
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    write_beir(
        folder,
        RetrievalTest((Passage("t", "test passage"),), {"q": "query 3  of " + folder.name.upper()}, {"q": {"t": 1}}),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("one", "two", "three"):
        make_task(tmp_path / "source" / name, 500)
    return tmp_path / "source"


def test_rows_are_in_source_order_and_twice_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ingest(recipe(source), tmp_path / "a")
    assert first == ingest(recipe(source), tmp_path / "b")
    assert list(first) == ["one", "three", "two"]
    collection = CollectionStore(tmp_path / "a")["one"]
    numbers = [int(q.split()[1]) for q in collection.take_rows(range(len(collection)))["query"].to_pylist()]
    assert numbers == sorted(numbers) and 3 not in numbers
    assert first["one"].counts["decontaminated"] == 1 and first["one"].test_queries == 1


def test_chunks_keep_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    for part in range(3):
        lines = (json.dumps([f"query {part * 10_000 + n}", f"positive {part} {n} " + "x" * 400]) for n in range(10_000))
        (folder / f"part{part}.jsonl").write_text("\n".join(lines))
    manifest = ingest(recipe(folder, dev_queries=0), tmp_path / "store")["big"]
    collection = CollectionStore(tmp_path / "store")["big"]
    assert collection.take_rows(range(30_000))["query"].to_pylist() == [f"query {n}" for n in range(30_000)]
    assert manifest.rows == manifest.passages == 30_000


def test_only_changed_tasks_are_read_again(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = ingest(recipe(source), store)
    times = {name: (store / name / "rows.lance").stat().st_mtime_ns for name in first}
    make_task(source / "two", 400)
    lines: list[str] = []
    second = ingest(recipe(source), store, lines.append)
    assert second["two"].rows != first["two"].rows
    assert {n: m for n, m in second.items() if n != "two"} == {n: m for n, m in first.items() if n != "two"}
    assert [line for line in lines if "up to date" in line] == [
        f"{n}: up to date, {first[n].rows:,} rows" for n in ("one", "three")
    ]
    assert all((store / n / "rows.lance").stat().st_mtime_ns == times[n] for n in ("one", "three"))


def test_touched_file_of_same_content_leaves_the_task_alone(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = ingest(recipe(source), store)["one"]
    before = (store / "one" / "rows.lance").stat().st_ino
    os.utime(source / "one" / "train.jsonl.gz", ns=(1, 1))
    again = ingest(recipe(source), store)["one"]
    assert again.hash == first.hash and again.source_key != first.source_key
    assert (store / "one" / "rows.lance").stat().st_ino == before


def test_overrides_reach_the_manifest(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ingest(recipe(source), store)
    manifests = ingest(recipe(source, tasks={"one": {"symmetric": True, "temperature": 0.1}}), store)
    assert (
        manifests["one"].info.symmetric
        and manifests["one"].info.temperature == 0.1
        and not manifests["two"].info.symmetric
    )
    with pytest.raises(DataError, match="Did you mean 'one'"):
        ingest(recipe(source, tasks={"oen": {"symmetric": True}}), store)


def test_environment_tasks_are_written_and_kept(tmp_path: Path) -> None:
    settings = Recipe.model_validate(
        {"data": {"environment": {"max_rows": 50, "test_queries": 10, "max_files": 200}, "dev_queries": 2}}
    )
    lines: list[str] = []
    first = ingest(settings, tmp_path / "store", lines.append)
    assert sum(m.rows > 0 and m.test_queries > 0 for m in first.values()) >= 3
    assert ingest(settings, tmp_path / "store", lines.append) == first
    assert lines[-1].startswith("environment: up to date")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\xff binary \n" * 50, r"50 of 50 input lines were refused .*bad UTF-8.*bad.rejects.jsonl"),
        (b"", "no training row left"),
        (b'["q", "p"]\n[3, "p"]\n', r"1 of 2 input lines.*train.jsonl:2: wrong type"),
    ],
)
def test_bad_files_say_so_and_leave_nothing(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ingest(recipe(tmp_path / "bad"), tmp_path / "store")
    assert not list((tmp_path / "store").glob(".tmp-*")) and CollectionStore(tmp_path / "store").names() == []


def test_truncated_gzip_is_one_clear_message(source: Path, tmp_path: Path) -> None:
    path = source / "one" / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"Task 'one': .*train.jsonl.gz cannot be read as jsonl: .* damaged") as error:
        ingest(recipe(source), tmp_path / "store")
    assert "Traceback" not in str(error.value)


KILLED = """
import sys, ray
from pathlib import Path
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
from tdro_ray.config import Recipe
from tdro_ray.data.ingest import ingest
recipe = Recipe.model_validate({"data": {"sources": [sys.argv[1]], "dev_queries": 5, "dev_corpus": 20}})
ingest(recipe, Path(sys.argv[2]), lambda line: print(line, flush=True))
"""


def test_kill_in_the_middle_then_again_gives_the_same(tmp_path: Path) -> None:
    source, store = tmp_path / "source", tmp_path / "store"
    make_task(source / "a", 300)
    folder = source / "b"
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        file.writelines(json.dumps([f"query {n}", f"positive {n} " * 50]) + "\n" for n in range(40_000))
    whole = ingest(recipe(source), tmp_path / "whole")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(store)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while not list(store.glob(".tmp-b-*/rows.arrow")):
        assert child.poll() is None and time.monotonic() < deadline, "the ingest of b must begin"
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)  # the driver and the Ray that it started
    child.wait()
    assert CollectionStore(store).names() == ["a"] and list(store.glob(".tmp-b-*"))
    assert ingest(recipe(source), store) == whole
    assert not list(store.glob(".tmp-*"))


def test_real_collections(tmp_path: Path) -> None:
    shared = Path(os.environ.get("TDRO_SHARED") or Path(__file__).parents[2] / ".." / "shared") / "data" / "train"
    if not shared.is_dir():
        pytest.skip(f"{shared} is not there; set TDRO_SHARED to the folder of the real collections")
    manifests = ingest(recipe(shared, dev_queries=50, dev_corpus=1000), tmp_path / "store")
    assert len(manifests) == 18
    assert sum(m.counts["lines"] for m in manifests.values()) == sum(
        m.rows + m.counts["dev_rows"] + m.counts["duplicates"] for m in manifests.values()
    )
    assert all(m.test_queries >= 298 and m.dev_queries == 50 and not m.rejects for m in manifests.values())
