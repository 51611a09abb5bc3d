"""The index: recall by factory, filters against brute force, atomic versions, errors that name the mend."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tdro_ray.errors import CheckpointError, ConfigError, DataError, ResourceError
from tdro_ray.index import base, faiss_index, store, versions
from tdro_ray.index.base import RetrievalIndex
from tdro_ray.index.filters import FilterError, to_sql

DIM = 32


def clustered(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """Unit vectors around fifty centres, as embeddings of text are."""
    centres = np.random.default_rng(99).standard_normal((50, dim))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 50, count)] + 0.7 * rng.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def documents(count: int) -> list[store.Document]:
    def metadata(i: int) -> dict:
        record = {
            "task": ("nq", "fever", "o'brien")[i % 3],
            "year": 1990 + i % 30,
            "price": i / 7,
            "open": i % 2 == 0,
            "tags": ["a"],
        }
        return record if i % 5 else {"task": "bare"}

    return [(f"d{i}", f"Title {i}" if i % 4 else "", f"text of document {i}", metadata(i)) for i in range(count)]


def make_version(out: Path, docs: list[store.Document], vectors: np.ndarray, factory: str = "Flat") -> dict:
    """What `build_index` does, with given vectors in place of a model and Ray."""
    with versions.new_version(out) as (name, folder):
        count, fields = store.write_documents(folder / "documents.lance", docs)
        store.add_vectors(folder / "documents.lance", vectors, fields)
        blocks = store.DocumentStore(folder / "documents.lance").vector_blocks
        index, facts = faiss_index.build(blocks, count, vectors.shape[1], factory)
        faiss_index.save(index, folder / "index.faiss")
        versions.write_manifest(folder, {"version": name, "dim": vectors.shape[1], "documents": count, **facts})
    return versions.manifest(versions.current(out))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine the threads of an OpenMP team wait for each other far longer than they work."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(4000)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> Path:
    out = tmp_path_factory.mktemp("index")
    make_version(out, documents(len(vectors)), vectors)
    return out


def brute_force(vectors: np.ndarray, queries: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    scores = queries @ vectors[allowed].T
    return allowed[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


# ---------------------------------------------------------------- FAISS


@pytest.mark.parametrize(
    ("factory", "least"),
    [
        ("Flat", 1.0),
        ("HNSW32", 0.98),
        ("IVF32,Flat", 0.98),
        ("SQ8", 0.95),
        ("HNSW32,SQ8", 0.95),
        ("IVF16,PQ8x4fs,RFlat", 0.7),
    ],
)
def test_every_kind_reaches_its_recall_and_survives_the_disk(
    factory: str, least: float, vectors: np.ndarray, tmp_path: Path
) -> None:
    blocks = lambda: (vectors[i : i + 1000] for i in range(0, len(vectors), 1000))  # noqa: E731
    index, facts = faiss_index.build(blocks, len(vectors), DIM, factory)
    assert facts["factory"] == factory
    assert least <= facts["recall@10"] <= 1.0
    # the measured recall is that of an independent brute force on other queries, to within sampling
    queries = clustered(200, seed=1)
    truth = brute_force(vectors, queries, np.arange(len(vectors)), 10)
    found = faiss_index.search(index, queries, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])
    assert recall >= facts["recall@10"] - 0.1
    faiss_index.save(index, tmp_path / "i.faiss")
    scores, rows = faiss_index.search(faiss_index.load(tmp_path / "i.faiss"), queries, 10)
    expected_scores, expected_rows = faiss_index.search(index, queries, 10)
    assert np.array_equal(rows, expected_rows) and np.array_equal(scores, expected_scores)


def test_search_is_widened_no_further_than_needed(vectors: np.ndarray) -> None:
    blocks = lambda: iter([vectors])  # noqa: E731
    _, narrow = faiss_index.build(blocks, len(vectors), DIM, "IVF64,Flat", target_recall=0.5)
    _, wide = faiss_index.build(blocks, len(vectors), DIM, "IVF64,Flat", target_recall=0.999)
    assert narrow["search"]["nprobe"] < wide["search"]["nprobe"]
    assert narrow["recall@10"] >= 0.5 and wide["recall@10"] >= 0.999


def test_equal_documents_do_not_lower_the_recall() -> None:
    vectors = np.repeat(clustered(20), 50, axis=0)  # fifty copies of each: the ten best are any ten of fifty
    _, facts = faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, "SQ8")
    assert facts["recall@10"] >= 0.98  # of copies counted one by one a tenth would be found


@pytest.mark.parametrize("factory", ["Flatt", "", "HNSW32,Nonsense", "LSH", "IVF5000,Flat"])
def test_bad_factory_is_a_config_error_that_names_it(factory: str, vectors: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"index\.factory"):
        faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, factory)


def test_recall_below_the_floor_fails(vectors: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"below the floor 0\.900"):
        faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, "PQ1x4", min_recall=0.9)


def test_preset_follows_the_size() -> None:
    assert faiss_index.preset(1000) == "Flat"
    assert faiss_index.preset(1_000_000) == "HNSW32"
    assert faiss_index.preset(10_000_000).startswith("IVF")


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF16,Flat", "SQ8", "PCA16,Flat", "IVF16,Flat,RFlat"])
def test_selector_keeps_to_the_allowed_rows(factory: str, vectors: np.ndarray) -> None:
    index, _ = faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, factory)
    allowed = np.flatnonzero(np.arange(len(vectors)) % 2)
    queries = clustered(20, seed=2)
    rows = faiss_index.search(index, queries, 10, allowed)[1]
    assert np.isin(rows[rows >= 0], allowed).all()
    if factory == "Flat":
        assert np.array_equal(rows, brute_force(vectors, queries, allowed, 10))


def test_kind_without_selector_refuses_a_wide_filter(vectors: np.ndarray) -> None:
    index, _ = faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, "PQ8x4fs")
    with pytest.raises(FilterError, match="IndexPQFastScan cannot search under a filter"):
        faiss_index.search(index, vectors[:1], 3, np.arange(3000))


def test_a_device_that_is_not_there_is_a_config_error(
    vectors: np.ndarray, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(ConfigError, match=r"index\.device=cuda needs FAISS for GPUs; FAISS .* is built for CPUs"):
        faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, "Flat", device="cuda")
    with pytest.raises(ConfigError, match=r"or set index\.device=cpu"):
        RetrievalIndex.open(built, "cuda")
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(ConfigError, match="sees no GPU"):
        RetrievalIndex.open(built, "cuda")


def test_an_index_built_on_a_device_comes_back_and_is_the_same(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls alone, with a stand-in for the GPU."""
    import faiss

    went: list[str] = []

    class Resources:
        pass

    def there(resources: Resources, device: int, index: object) -> object:
        if isinstance(faiss.downcast_index(index), faiss.IndexHNSW):
            raise RuntimeError("not implemented on GPU")
        went.append(f"gpu {device}")
        return index

    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", there, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: went.append("cpu") or index, raising=False)
    facts = faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, "IVF16,Flat", device="cuda")[1]
    assert (
        went == ["gpu 0", "cpu"]
        and facts == faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, "IVF16,Flat")[1]
    )
    with pytest.raises(ConfigError, match="IndexHNSWFlat runs on CPUs only"):
        faiss_index.build(lambda: iter([vectors]), len(vectors), DIM, "HNSW32", device="cuda")


def test_torch_and_faiss_share_a_process(vectors: np.ndarray) -> None:
    import torch

    blocks = lambda: iter([vectors])  # noqa: E731
    index, _ = faiss_index.build(blocks, len(vectors), DIM, "Flat")
    expected = torch.topk(torch.from_numpy(vectors[:64]) @ torch.from_numpy(vectors).T, 5).values.numpy()
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(faiss_index.search(index, vectors[:64], 5)[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    torch.mm(torch.ones(300, 300), torch.ones(300, 300))
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for scores in results:
        np.testing.assert_allclose(scores, expected, atol=1e-5)


# ---------------------------------------------------------------- filters


FILTERS = [
    ({"task": "nq"}, lambda i, m: m.get("task") == "nq"),
    ({"task": {"eq": "o'brien"}}, lambda i, m: m.get("task") == "o'brien"),
    ({"task": {"in": ["nq", "bare"]}}, lambda i, m: m.get("task") in ("nq", "bare")),
    ({"year": {"gte": 1995, "lte": 1999}}, lambda i, m: 1995 <= m.get("year", -1) <= 1999),
    ({"year": {"gt": 1995, "lt": 1999}}, lambda i, m: 1995 < m.get("year", -1) < 1999),
    ({"price": {"lt": 3.5}}, lambda i, m: m.get("price", 9e9) < 3.5),
    ({"price": {"gte": 100}}, lambda i, m: m.get("price", -1) >= 100),
    ({"price": {"lt": 1e300}}, lambda i, m: "price" in m),
    ({"open": True}, lambda i, m: m.get("open") is True),
    ({"open": {"ne": True}}, lambda i, m: m.get("open") is not True),
    ({"year": None}, lambda i, m: "year" not in m),
    ({"year": {"ne": None}}, lambda i, m: "year" in m),
    ({"id": {"in": ["d7", "d8", "nope"]}}, lambda i, m: i in (7, 8)),
    ({"not": {"year": {"gte": 1995}}}, lambda i, m: not m.get("year", -1) >= 1995),
    ({"or": [{"task": "nq"}, {"id": "d4"}]}, lambda i, m: m.get("task") == "nq" or i == 4),
    (
        {"and": [{"task": "nq"}, {"not": {"open": True}}]},
        lambda i, m: m.get("task") == "nq" and m.get("open") is not True,
    ),
    ({"task": "nq", "year": {"lt": 2000}}, lambda i, m: m.get("task") == "nq" and m.get("year", 9999) < 2000),
    ({"task": "'; DROP TABLE documents; --"}, lambda i, m: False),
    ({"task": "a\\' OR true"}, lambda i, m: False),
]


@pytest.mark.parametrize(("filter", "keep"), FILTERS, ids=[json.dumps(f) for f, _ in FILTERS])
def test_filter_equals_a_python_predicate_and_the_search_equals_brute_force(
    filter, keep, built: Path, vectors: np.ndarray
) -> None:
    index = RetrievalIndex.open(built)
    docs = documents(len(vectors))
    allowed = np.array([i for i, d in enumerate(docs) if keep(i, d[3])], np.int64)
    assert np.array_equal(index.store.where(filter), allowed)
    queries = clustered(5, seed=3)
    hits = index.search(queries, 7, filter)
    expected = brute_force(vectors, queries, allowed, 7)
    assert [[h.id for h in row] for row in hits] == [[docs[i][0] for i in row] for row in expected]


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"yaer": 1}, "Unknown filter field 'yaer'. Did you mean 'year'"),
        ({"tags": "a"}, "Unknown filter field 'tags'"),
        ({"year": {"between": [1, 2]}}, "Unknown filter operator 'between'"),
        ({"year": {}}, "is empty"),
        ({}, "at least one field"),
        ({"year": "1999"}, "compares with an integer"),
        ({"year": 1.5}, "compares with an integer"),
        ({"year": True}, "compares with an integer"),
        ({"year": 2**63}, "compares with an integer"),
        ({"year": 10**5000}, "more than 30 digits"),
        ({"price": 10**5000}, "more than 30 digits"),
        ({"price": float("nan")}, "compares with a number"),
        ({"task": "\ud800"}, "compares with a string"),
        ({"task": ["nq"]}, "compares with a string"),
        ({"task": {"in": []}}, "at least one value"),
        ({"task": {"in": "nq"}}, "at least one value"),
        ({"and": []}, "at least one filter"),
        ({"and": {"task": "nq"}}, "at least one filter"),
        ({"not": []}, "must be an object"),
        ({"id": {"in": ["a"] * 10_001}}, "more than 10000 values"),
    ],
)
def test_bad_filter_is_named(filter: dict, message: str, built: Path) -> None:
    with pytest.raises(FilterError, match=message):
        RetrievalIndex.open(built).store.where(filter)


def test_deeply_nested_filter_is_refused() -> None:
    filter: dict = {"id": "a"}
    for _ in range(100):
        filter = {"not": filter}
    with pytest.raises(FilterError, match="nested deeper"):
        to_sql(filter, {"id": "string"}, str)


def test_wide_filter_goes_through_the_selector(
    built: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = clustered(5, seed=4)
    index = RetrievalIndex.open(built)
    exact = index.search(queries, 9, {"open": True})
    monkeypatch.setattr(base, "EXACT_ROWS", 0)
    assert [[h.id for h in row] for row in index.search(queries, 9, {"open": True})] == [
        [h.id for h in row] for row in exact
    ]


# ---------------------------------------------------------------- store and index


def test_documents_come_back_as_given(built: Path, vectors: np.ndarray) -> None:
    index = RetrievalIndex.open(built)
    docs = documents(len(vectors))
    rows = [7, 3, 7, 3999]
    assert index.store.take(rows) == [
        dict(zip(("id", "title", "text", "metadata"), docs[i], strict=True)) for i in rows
    ]
    assert index.store.take([]) == []
    assert np.array_equal(index.store.vectors(np.array([3, 7])), vectors[[3, 7]])
    assert np.array_equal(np.concatenate(list(index.store.vector_blocks())), vectors)
    hit = index.search(vectors[41:42], 1)[0][0]
    assert (hit.id, hit.title, hit.text, hit.metadata) == docs[41]
    assert hit.score == pytest.approx(1, abs=1e-5)


def test_scores_are_cosines_whatever_the_length(built: Path, vectors: np.ndarray) -> None:
    index = RetrievalIndex.open(built)
    plain = index.search(vectors[:3], 5)
    for factor in (1e-200, 0.5, 1e300):
        scaled = index.search(vectors[:3].astype(np.float64) * factor, 5)
        assert [[h.id for h in row] for row in scaled] == [[h.id for h in row] for row in plain]
        assert scaled[0][0].score == pytest.approx(plain[0][0].score, abs=1e-5)


def test_more_hits_than_documents(tmp_path: Path) -> None:
    make_version(tmp_path, documents(3), clustered(3))
    assert sorted(h.id for h in RetrievalIndex.open(tmp_path).search(clustered(1), 50)[0]) == ["d0", "d1", "d2"]
    assert RetrievalIndex.open(tmp_path).search(clustered(1), 50, {"id": "none"}) == [[]]


@pytest.mark.parametrize(
    "bad", [np.zeros((1, DIM)), np.full((1, DIM), np.nan), np.full((1, DIM), np.inf), np.ones((1, 5)), np.ones(DIM)]
)
def test_vectors_without_direction_or_of_wrong_shape_are_refused(bad: np.ndarray, built: Path) -> None:
    with pytest.raises(DataError):
        RetrievalIndex.open(built).search(bad, 3)


def test_field_types_are_inferred(tmp_path: Path) -> None:
    docs = [
        (
            "a",
            "",
            "t",
            {
                "n": 1,
                "x": 1,
                "mixed": 1,
                "Lang": "de",
                "lang": "de",
                "odd key": "v",
                "id": "z",
                "none": None,
                "not": "v",
            },
        ),
        ("b", "", "t", {"n": None, "x": 1.5, "mixed": "one", "list": [1], "big": 2**70}),
    ]
    _, fields = store.write_documents(tmp_path / "d.lance", docs)
    assert fields == {"n": "int64", "x": "double", "Lang": "string"}
    store.add_vectors(tmp_path / "d.lance", clustered(2), fields)
    opened = store.DocumentStore(tmp_path / "d.lance")
    assert opened.where({"x": {"gte": 1.2}}).tolist() == [1]
    assert opened.where({"Lang": "de"}).tolist() == [0]
    assert opened.take([0])[0]["metadata"] == docs[0][3]


def test_hits_are_shown_from_the_mapped_file_as_lance_has_them(built: Path) -> None:
    opened = store.DocumentStore(versions.current(built) / "documents.lance")
    in_lance = [dict(zip(("id", "title", "text", "metadata"), d, strict=True)) for d in opened.documents()]
    assert opened.take(range(4000)) == in_lance and len(opened.lookup) == 4000
    rows = np.array([3999, 0, 7, 7, 1234])
    assert opened.take(rows) == [in_lance[row] for row in rows] and opened.take([]) == []


def test_a_mapped_file_that_does_not_fit_is_named(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "out")
    file = versions.current(tmp_path / "out") / "documents.arrow"
    whole = file.read_bytes()
    store.write_documents(tmp_path / "few.lance", documents(3))
    shutil.copy(tmp_path / "few.arrow", file)
    with pytest.raises(DataError, match="does not fit together"):
        RetrievalIndex.open(tmp_path / "out")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"documents.arrow cannot be read: .*tdro index"):
        RetrievalIndex.open(tmp_path / "out")
    file.unlink()
    with pytest.raises(DataError, match=r"documents.arrow cannot be read: .*tdro index"):
        RetrievalIndex.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("docs", "message"),
    [
        ([], "no documents"),
        ([("a", "", "t", {}), ("a", "", "t", {})], "Document 1 .*occurs twice"),
        ([("", "", "t", {})], "id must be a string"),
        ([("a", "", None, {})], "text must be a string"),
        ([("a", "", "\ud800", {})], "lone surrogate"),
        ([("a", "", "t", {"x": float("nan")})], "metadata cannot be written"),
        ([("a", "", "t", {"x": object()})], "metadata cannot be written"),
        ([("a", "", "t", {"x": "\ud800"})], "metadata cannot be written"),
        ([("a", "", "t", [])], "metadata must be a dict"),
        ([*documents(5000), ("d1", "", "t", {})], "Document 5000 .*occurs twice"),  # in a later batch
    ],
)
def test_bad_document_is_named(docs: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        store.write_documents(tmp_path / "d.lance", docs)


# ---------------------------------------------------------------- versions


def test_versions_switch_and_roll_back(tmp_path: Path) -> None:
    for expected in ("1", "2", "3"):
        assert make_version(tmp_path, documents(5), clustered(5))["version"] == expected
    assert versions.names(tmp_path) == ["2", "3"]  # the last two stay
    assert versions.current(tmp_path).name == "3"
    versions.select(tmp_path, "2")
    assert RetrievalIndex.open(tmp_path).version == "2"
    assert make_version(tmp_path, documents(5), clustered(5))["version"] == "4"
    with pytest.raises(DataError, match="no version '9'"):
        versions.select(tmp_path, "9")


def test_failed_and_killed_builds_leave_the_old_version(tmp_path: Path) -> None:
    make_version(tmp_path, documents(5), clustered(5))
    with pytest.raises(RuntimeError), versions.new_version(tmp_path) as (_, folder):
        (folder / "half").write_text("x")
        raise RuntimeError
    (tmp_path / "versions" / ".building-7").mkdir()  # what a killed build leaves
    (tmp_path / "versions" / "9").mkdir()  # renamed by hand, without a manifest: not a version
    assert versions.current(tmp_path).name == "1"
    assert RetrievalIndex.open(tmp_path).search(clustered(1), 1)
    assert make_version(tmp_path, documents(5), clustered(5))["version"] == "10"
    assert not list(tmp_path.glob("versions/.building-*"))


def test_killed_build_lets_go_of_its_lock(tmp_path: Path) -> None:
    make_version(tmp_path, documents(5), clustered(5))
    code = (
        "import os, signal, sys\nfrom tdro_ray.index import versions\n"
        "with versions.new_version(sys.argv[1]) as (name, folder):\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL and (tmp_path / "versions" / ".building-2" / "half").exists()
    assert versions.current(tmp_path).name == "1"
    assert make_version(tmp_path, documents(5), clustered(5))["version"] == "2"


def test_old_version_answers_while_a_new_one_is_built_and_after(tmp_path: Path) -> None:
    make_version(tmp_path, documents(50), clustered(50))
    old = RetrievalIndex.open(tmp_path)
    before = old.search(clustered(3, seed=5), 3)
    make_version(tmp_path, documents(60), clustered(60, seed=9))
    assert old.search(clustered(3, seed=5), 3) == before
    assert len(RetrievalIndex.open(tmp_path)) == 60


def test_two_builds_into_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match="Another build"),
        versions.new_version(tmp_path),
        versions.new_version(tmp_path),
    ):
        pass


def test_missing_or_damaged_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tdro index"):
        RetrievalIndex.open(tmp_path)
    make_version(tmp_path, documents(5), clustered(5))
    file = versions.current(tmp_path) / "index.faiss"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read"):
        RetrievalIndex.open(tmp_path)


def test_model_hash_follows_what_the_encoder_reads(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = versions.model_hash(tmp_path)
    (tmp_path / "README.md").write_text("a model card")
    assert first == versions.model_hash(tmp_path)
    (tmp_path / "tdro.json").write_text("{}")
    second = versions.model_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert len({first, second, versions.model_hash(tmp_path)}) == 3
    with pytest.raises(CheckpointError, match="holds no weights"):
        versions.model_hash(tmp_path / "none")
