"""What `serving.py` runs: servers on loopback in processes of their own, and a load that costs little beside them.

`python benchmarks/serve_load.py '{"kind": …}'` is one server: "ray" (Ray Serve), "uvicorn" (the same app in one bare
process), "bare" (FastAPI and FAISS in a few lines). It prints its URL and ends with its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
_RUNNING: dict[str, int] = {}  # URL -> process that leads the server


# ---------------------------------------------------------------- servers


@contextlib.contextmanager
def server(**asked: Any) -> Iterator[str]:
    """Yield the URL of a server of this file while the context lasts."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, json.dumps(asked)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            url = next((line.split()[1] for line in process.stdout if line.startswith("serving ")), "")
            if not url:
                raise RuntimeError(f"the server {asked} did not start; run it by hand: {command}")
            _RUNNING[url] = process.pid
            yield url
        finally:
            _RUNNING.pop(url, None)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(60)


@contextlib.contextmanager
def infinity(
    python: Path, model: Path, engine: str, dtype: str, compile: bool = False, seconds: float = 180
) -> Iterator[str]:
    """Yield the URL of an infinity server of its own virtual environment. Raises RuntimeError where it does not start."""
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    process = subprocess.Popen(
        [
            str(python.parent / "infinity_emb"), "v2", "--model-id", ".", "--served-model-name", "m", "--engine", engine,
            "--dtype", dtype, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning",
            "--no-bettertransformer", "--pooling-method", "mean", "--compile" if compile else "--no-compile",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=model,  # its optimum finds no file by an absolute path
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + seconds
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                said = process.stdout.read().decode(errors="replace") if process.stdout else ""
                raise RuntimeError(f"infinity --engine {engine} --dtype {dtype} did not start: {said[-600:]}")
            time.sleep(0.2)
        _RUNNING[url] = process.pid
        yield url
    finally:
        _RUNNING.pop(url, None)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


@contextlib.contextmanager
def alone(url: str = "") -> Iterator[None]:
    """Hold all servers but one still while the context lasts: three idle Rays take a third of two small cores."""
    held = []
    for at, leader in _RUNNING.items():
        if at != url:
            with contextlib.suppress(psutil.NoSuchProcess):
                held += [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
    try:
        for process in held:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in held:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b" 200 " in connection.recv(64)
    except OSError:
        return False


def _run_ray(asked: dict[str, Any]) -> None:
    from cluster.ingress import prepare

    prepare(asked.pop("proxy", "haproxy"), starts_ray=True)
    import ray

    from serve import deployment

    ray.init(include_dashboard=False, log_to_driver=False)
    print("serving", deployment.start(asked.pop("model"), asked.pop("index", None), port=0, **asked), flush=True)
    sys.stdin.read()
    deployment.stop()
    ray.shutdown()


def _run_uvicorn(app: Any) -> None:
    import threading

    import uvicorn

    one = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=free_port(), log_level="error"))
    thread = threading.Thread(target=one.run)
    thread.start()
    while not one.started and thread.is_alive():
        time.sleep(0.05)
    print(f"serving http://127.0.0.1:{one.config.port}", flush=True)
    sys.stdin.read()
    one.should_exit = True
    thread.join(20)


def _own_app(asked: dict[str, Any]) -> Any:
    from serve.api import create_app
    from serve.engine import Engine
    from serve.schemas import Limits

    options = {key: asked[key] for key in ("dtype", "backend", "compile") if key in asked}
    options["limits"] = Limits(**asked.get("limits", {}))
    return create_app(Engine.open(asked["model"], asked.get("index"), threads=os.cpu_count() or 1, **options))


class BareBody(BaseModel):
    """What the bare service takes."""

    vectors: list[list[float]]
    k: int = 10


def bare_app(index_file: str, ids: list[str], texts: list[str]) -> Any:
    """The service that one writes in an afternoon: vectors in, FAISS, the documents from memory out."""
    import faiss
    from fastapi import FastAPI

    app, index = FastAPI(), faiss.read_index(index_file)

    @app.post("/search")
    def search(body: BareBody) -> Any:
        scores, rows = index.search(np.array(body.vectors, np.float32), body.k)
        return {
            "results": [
                [{"id": ids[r], "score": float(s), "text": texts[r]} for s, r in zip(*pair, strict=True) if r >= 0]
                for pair in zip(scores, rows, strict=True)
            ]
        }

    @app.get("/health")
    def health() -> Any:
        return {}

    return app


def _bare(asked: dict[str, Any]) -> Any:
    import lance

    table = lance.dataset(str(Path(asked["version"]) / "documents.lance")).to_table(columns=["id", "text"])
    return bare_app(f"{asked['version']}/index.faiss", table["id"].to_pylist(), table["text"].to_pylist())


# ---------------------------------------------------------------- load


@dataclass
class Load:
    """What a load saw: when each request began and how long it took, in seconds, and what was not a 200."""

    began: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0
    last: bytes = b""

    def quantile(self, q: float) -> float:
        """Return a quantile of the time per request, in milliseconds."""
        return float(np.quantile(self.took, q) * 1000) if self.took else float("nan")


class Connection:
    """One keep-alive HTTP connection, with no more than the load needs."""

    def __init__(self, url: str) -> None:
        self.host, _, self.port = url.removeprefix("http://").partition(":")
        self.reader: Any = None

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of a POST of JSON; a connection that was closed is opened again once."""
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        for attempt in (0, 1):
            if self.reader is None:
                self.reader, self.writer = await asyncio.open_connection(self.host, int(self.port), limit=1 << 26)
            try:
                self.writer.write(head.encode() + body)
                return await self._answer()
            except (ConnectionError, asyncio.IncompleteReadError):
                self.close()
                if attempt:
                    raise
        raise AssertionError

    async def _answer(self) -> tuple[int, bytes]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
        return int(lines[0].split()[1]), await self.reader.readexactly(int(headers[b"content-length"]))

    def close(self) -> None:
        """Close it; the next request opens another."""
        if self.reader is not None:
            self.writer.close()
            self.reader = None


def load(
    url: str,
    path: str,
    bodies: Callable[[int], bytes],
    clients: int,
    seconds: float,
    stop: Callable[[Load], bool] = lambda _: False,
) -> Load:
    """Send `bodies(0)`, `bodies(1)`, … by as many clients, each waiting for its answer, for `seconds` or until `stop`."""
    found, numbers = Load(), iter(range(1 << 60))

    async def client(until: float) -> None:
        connection = Connection(url)
        while time.perf_counter() < until and not stop(found):
            body = bodies(next(numbers))
            began = time.perf_counter()
            try:
                status, found.last = await connection.post(path, body)
            except (OSError, asyncio.IncompleteReadError):
                status = 0
            found.began.append(began)
            found.took.append(time.perf_counter() - began)
            found.failed += status != 200
        connection.close()

    async def run() -> None:
        began = time.perf_counter()
        await asyncio.gather(*(client(began + seconds) for _ in range(clients)))
        found.seconds = time.perf_counter() - began

    asyncio.run(run())
    return found


def main(asked: dict[str, Any]) -> None:
    """Be one server."""
    kind = asked.pop("kind")
    if kind == "ray":
        _run_ray(asked)
    else:
        _run_uvicorn(_own_app(asked) if kind == "uvicorn" else _bare(asked))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
