"""Every format gives the rows that went in; every bad record becomes a reject with its line and reason."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tdro_ray.data import formats
from tdro_ray.data.formats import Reject, read
from tdro_ray.data.sources import discover
from tdro_ray.errors import DataError
from tdro_ray.types import Passage, Row

ROWS = [
    Row("a", "who?", (Passage("d1", "me"),), (Passage("d2", "you", "Title"),)),
    Row("b", "日本語\u2028の", (Passage("d3", "é\n\t"), Passage("d4", "x", "T")), ()),
]


def tevatron(row: Row) -> dict:
    def passage(p: Passage) -> dict:
        return {"docid": p.docid, "text": p.text} | ({"title": p.title} if p.title else {})

    return {
        "_id": row.id,
        "text": row.query,
        "positive_passages": list(map(passage, row.positives)),
        "negative_passages": list(map(passage, row.negatives)),
    }


def write_lines(path: Path, records: list) -> Path:
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.jsonl.zst"])
def test_tevatron_round_trip(tmp_path: Path, name: str) -> None:
    assert list(read(write_lines(tmp_path / name, [tevatron(r) for r in ROWS]))) == ROWS


def test_tevatron_parquet_round_trip(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([tevatron(r) for r in ROWS]), tmp_path / "train.parquet")
    assert list(read(tmp_path / "train.parquet")) == ROWS


@pytest.mark.parametrize(
    "records",
    [
        [{"query": "q1", "positive": "p1", "negative": "n1"}, {"query": "q2", "positive": "p2", "negative": None}],
        [{"anchor": "q1", "positive": "p1", "negative_1": "n1"}, {"anchor": "q2", "positive": "p2"}],
        [{"query": "q1", "pos": ["p1"], "neg": ["n1"]}, {"query": "q2", "pos": ["p2"], "neg": []}],
        [["q1", "p1", "n1"], ["q2", "p2"]],
    ],
)
def test_columns_and_lists(tmp_path: Path, records: list) -> None:
    rows = list(read(write_lines(tmp_path / "pairs.jsonl", records)))
    assert [(r.id, r.query, [p.text for p in r.positives], [p.text for p in r.negatives]) for r in rows] == [
        ("pairs:1", "q1", ["p1"], ["n1"]),
        ("pairs:2", "q2", ["p2"], []),
    ]


def test_parquet_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"anchor": ["q1", "q2"], "positive": ["p1", "p2"]}), tmp_path / "pairs.parquet")
    assert [(r.query, r.positives[0].text) for r in read(tmp_path / "pairs.parquet")] == [("q1", "p1"), ("q2", "p2")]


def write_beir_train(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    write_lines(
        folder / "corpus.jsonl.gz", [{"_id": f"d{i}", "title": "T" if i else "", "text": f"text {i}"} for i in range(5)]
    )
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}])
    (folder / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td0\t1\nq1\td3\t0\nq2\td1\t2\nq2\tmissing\t1\nq3\td1\t1\n"
    )


def test_beir_with_train_qrels(tmp_path: Path) -> None:
    write_beir_train(tmp_path / "task")
    rows = list(read(tmp_path / "task"))
    assert rows[0] == Row("q1", "one", (Passage("d0", "text 0"),), (Passage("d3", "text 3", "T"),))
    assert [(r.line, r.reason) for r in rows[1:] if isinstance(r, Reject)] == [(4, "wrong type"), (6, "wrong type")]


BAD = {
    b"{": "not JSON",
    b'{"query": "\xff", "positive": "p"}': "bad UTF-8",
    b'{"query": "\\ud800", "positive": "p"}': "bad UTF-8",
    b'{"query": " ", "positive": "p"}': "empty query",
    b'{"query": "q", "positive": []}': "no positive",
    b'{"query": "q", "positive": ""}': "empty positive",
    b'{"query": "q", "positive": "p", "negative": [""]}': "empty negative",
    b'{"query": 3, "positive": "p"}': "wrong type",
    b'{"query": "q", "positive": 3}': "wrong type",
    b'{"text": "q", "positive_passages": {"text": "p"}}': "wrong type",
    b'{"a": "q", "b": "p"}': "wrong shape",
    b'["q"]': "wrong shape",
    b"3": "wrong shape",
    b"[" * 100_000: "not JSON",
}


def test_bad_records_are_rejected_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([*BAD, b"", b'{"query": "q", "positive": "p"}']))
    *rejects, row = read(path)
    assert [(r.line, r.reason, r.file) for r in rejects] == [
        (n, reason, str(path)) for n, reason in enumerate(BAD.values(), 1)
    ]
    assert isinstance(row, Row) and row.id == f"x:{len(BAD) + 2}"


def test_line_numbers_do_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"\n".join(b"{" if n % 7 == 3 else json.dumps([f"q{n}", "p" * (n + 1)]).encode() for n in range(200))
    )
    whole = list(read(path))
    monkeypatch.setattr(formats, "CHUNK_BYTES", 50)
    assert list(read(path)) == whole
    assert [r.line for r in whole if isinstance(r, Reject)] == [n + 1 for n in range(200) if n % 7 == 3]


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst", "t.parquet"])
def test_damaged_files_are_data_errors(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b not what its ending says")
    with pytest.raises(DataError, match=r"cannot be read as .* damaged"):
        list(read(tmp_path / name))


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    line = json.dumps(["q", "p" * 1000]) + "\n"
    with path.open("w") as file:
        for _ in range(20_000):
            file.write(line)
    import tracemalloc

    tracemalloc.start()
    assert sum(1 for _ in read(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20, "20 MB of rows must not be held at once"


# Sources


def test_discover_folder_of_tasks(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl.gz", [["q", "p"]])
    write_beir_train(tmp_path / "c")
    (tmp_path / "a" / "task.yaml").write_text("symmetric: true\nlanguage: de\ntemperature: 0.05\n")
    (tmp_path / "notes").mkdir()
    notes: list[str] = []
    tasks = discover([str(tmp_path)], notes.append)
    assert [(t.name, t.files[0][1]) for t in tasks] == [("a", "jsonl"), ("b", "jsonl"), ("c", "beir")]
    assert tasks[0].info.symmetric and tasks[0].info.language == "de" and tasks[0].info.temperature == 0.05
    assert len(notes) == 1 and "notes" in notes[0]


def test_discover_one_task_folder_and_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "nq"
    folder.mkdir()
    file = write_lines(folder / "train.jsonl", [["q", "p"]])
    assert discover([str(folder)])[0].name == discover([str(file)])[0].name == "nq"
    with pytest.raises(DataError, match="Two tasks are called 'nq'"):
        discover([str(folder), str(file)])


def test_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "nq.jsonl", [["q", "p"]])
    before = discover([str(file)])[0].fingerprint()
    assert discover([str(file)])[0].fingerprint() == before
    write_lines(file, [["q", "other"]])
    assert discover([str(file)])[0].fingerprint() != before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds no task"),
        (lambda p: p.write_text("x"), "no known format"),
        (
            lambda p: (p.mkdir(), (p / "train.jsonl").touch(), (p / "task.yaml").write_text("symetric: true")),
            "Did you mean 'symmetric'",
        ),
        (
            lambda p: (p.mkdir(), (p / "train.jsonl").touch(), (p / "task.yaml").write_text("symmetric: 3")),
            "must be bool",
        ),
    ],
)
def test_bad_sources(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "s.txt")
    with pytest.raises(DataError, match=message):
        discover([str(tmp_path / "s.txt")])
