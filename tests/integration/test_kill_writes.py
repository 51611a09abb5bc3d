"""A real server is killed with SIGKILL while clients write and merges run: what it acknowledged is there, and no half of a request."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tdro_ray.index.base import RetrievalIndex

UNIT = Path(__file__).parents[1] / "unit"
DOCUMENTS = 30
SERVER = """
import sys
sys.path.insert(0, sys.argv[3])
import socket, uvicorn
from test_documents import open_engine
from pathlib import Path
from serve.api import create_app

engine = open_engine(Path(sys.argv[1]), merge_after=8)
engine.writer.start(0.05)  # besides the app's own look every two seconds
config = uvicorn.Config(create_app(engine), log_level="warning", loop="asyncio")
print("ready", flush=True)
uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[2]))])
"""


class Client(threading.Thread):
    """Writes pairs of documents in one request each, and deletes, one after the other, and keeps what was acknowledged."""

    def __init__(self, port: int, who: int) -> None:
        super().__init__(daemon=True)
        self.port, self.who, self.stop = port, who, threading.Event()
        self.acknowledged: dict[str, int] = {}  # pair or single id -> number of the last acknowledged write, 0 deleted
        self.tried: dict[str, set[int]] = {}  # numbers tried since
        self.written, self.unanswered = 0, 0

    def run(self) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            single = f"{self.who}-single"  # written and deleted in turn
            self.note(
                single, number, "POST", "/documents", [{"id": single, "text": "quagga", "metadata": {"n": number}}]
            )
            self.note(single, 0, "DELETE", f"/documents/{single}")
            pair = f"{self.who}-{number % 5}"
            documents = [{"id": f"{pair}-{half}", "text": f"zebra {half}", "metadata": {"n": number}} for half in "ab"]
            self.note(pair, number, "POST", "/documents", documents)

    def note(self, key: str, number: int, method: str, path: str, documents: list[dict] | None = None) -> None:
        """Send one request, and note what may be and what must be from now on."""
        self.tried.setdefault(key, set()).add(number)
        if self.ask(method, path, None if documents is None else {"documents": documents}):
            self.acknowledged[key], self.tried[key] = number, set()
            self.written += 1
        else:
            self.unanswered += 1
            self.stop.wait(0.02)

    def ask(self, method: str, path: str, body: object) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"content-type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status == 200, (answer.status, said)
            return True
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def check(self, found: dict[str, int]) -> None:
        """`found` maps ids to numbers: each pair is whole, and as acknowledged or as tried since."""
        for pair in self.tried:
            ids = [pair] if pair.endswith("single") else [f"{pair}-a", f"{pair}-b"]
            halves = {found.get(id, 0) for id in ids}
            assert len(halves) == 1, f"half a request of {pair}: {halves}"
            assert halves <= {self.acknowledged.get(pair, 0), *self.tried[pair]}, (
                pair,
                halves,
                self.acknowledged.get(pair),
            )


def numbers(index: RetrievalIndex) -> dict[str, int]:
    view = index.overlay.view()
    base = {id: metadata["n"] for id, _, _, metadata in index.store.documents() if id[0] != "d"}
    hidden = set(index.store.take(view.hidden)[i]["id"] for i in range(len(view.hidden)))
    overlay = [view.document(place) for place in view.live.nonzero()[0].tolist()]
    return {id: n for id, n in base.items() if id not in hidden} | {d["id"]: d["metadata"]["n"] for d in overlay}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_no_acknowledged_write_is_lost(kills: int, tmp_path: Path) -> None:
    sys.path.insert(0, str(UNIT))
    from test_serve_api import write_index

    write_index(tmp_path, DOCUMENTS)
    rng = random.Random(kills)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        port = listening.getsockname()[1]
        clients = [Client(port, who) for who in range(3)]

        def serve() -> subprocess.Popen[str]:
            arguments = [str(tmp_path), str(listening.fileno()), str(UNIT)]
            server = subprocess.Popen(
                [sys.executable, "-c", SERVER, *arguments],
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[listening.fileno()],
                cwd=UNIT.parents[1],
            )
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            return server

        server = serve()
        for client in clients:
            client.start()
        try:
            for _ in range(kills):
                before = sum(client.written for client in clients)
                while sum(client.written for client in clients) < before + 10:
                    assert server.poll() is None and all(c.is_alive() for c in clients)
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.5))
                server.send_signal(signal.SIGKILL)
                server.wait()
                server = serve()
        finally:
            for client in clients:
                client.stop.set()
            for client in clients:
                client.join(120)
            server.send_signal(signal.SIGKILL)
            server.wait()
    index = RetrievalIndex.open(tmp_path)
    found = numbers(index)
    for client in clients:
        assert not client.is_alive()
        client.check(found)
    assert len(index) == DOCUMENTS + len(found)
    assert sum(client.unanswered for client in clients) > 0  # some were under way when the server died
    assert int(index.version) > 1, "merges ran"
