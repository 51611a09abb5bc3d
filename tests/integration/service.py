"""A service on a Ray of its own, in a process of its own: ray.serve reads the environment once per process.

`python service.py '{"model": …, "index": …, "proxy": "haproxy", "options": {…}}'` serves and prints its URL; a line
"stop" on its input stops the application, as Ctrl-C does for `tdro serve`; end of input ends Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Service:
    """A running service; `process` is the driver."""

    url: str
    process: subprocess.Popen[str]

    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        found = {p.pid: p for p in tree if "ServeReplica" in _title(p) and "Retriever" in _title(p)}
        # What a replica forks has its title until it becomes another program.
        return sorted(pid for pid, p in found.items() if _parent(p) not in found)

    def stop(self) -> None:
        """Ask for the application's end; returns at once."""
        assert self.process.stdin is not None
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.ppid()
    return 0


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()[:1])
    return ""


@contextlib.contextmanager
def service(model: Path, index: Path | None, proxy: str = "ray", **options: Any) -> Iterator[Service]:
    """Serve while the context lasts; `options` are those of `deployment.start`."""
    asked = {"model": str(model), "index": str(index) if index else None, "proxy": proxy, "options": options}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, __file__, json.dumps(asked)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            url = next((line.split()[1] for line in process.stdout if line.startswith("serving ")), "")
            assert url, "the service did not start; its error is above"
            yield Service(url, process)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(60)


def write_index(model: Path, out: Path, texts: list[str]) -> Path:
    """Write an index of texts without Ray."""
    from tdro_ray.index import faiss_index, store, versions
    from tdro_ray.model.encoder import Encoder

    vectors = Encoder.load(model).encode(texts, "passage")
    documents = [(f"d{i}", "", text, {"year": i}) for i, text in enumerate(texts)]
    with versions.new_version(out) as (name, folder):
        _, fields = store.write_documents(folder / "documents.lance", documents)
        store.add_vectors(folder / "documents.lance", vectors, fields)
        index, facts = faiss_index.build(lambda: iter([vectors]), len(texts), vectors.shape[1], "Flat")
        faiss_index.save(index, folder / "index.faiss")
        made_with = {"name": model.name, "hash": versions.model_hash(model)}
        record = {"version": name, "dim": vectors.shape[1], "documents": len(texts), "model": made_with, **facts}
        versions.write_manifest(folder, record)
    assert np.isfinite(vectors).all()
    return out


def main(asked: dict[str, Any]) -> None:
    """Serve what is asked until the input says otherwise."""
    from cluster.ingress import prepare

    prepare(asked["proxy"], starts_ray=True)
    import ray

    from serve import deployment

    ray.init(
        num_cpus=4, include_dashboard=False, log_to_driver=False
    )  # more than there are: replicas come back while others end
    print("serving", deployment.start(asked["model"], asked["index"], port=0, **asked["options"]), flush=True)
    if sys.stdin.readline():
        deployment.stop()
        print("stopped", flush=True)
        sys.stdin.readline()
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
