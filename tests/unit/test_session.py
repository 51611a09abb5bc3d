"""What `connect` checks before Ray is asked for anything."""

import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from cluster import session  # noqa: E402
from tdro_ray.config import ScaleSettings  # noqa: E402
from tdro_ray.errors import ResourceError  # noqa: E402


@pytest.mark.parametrize(
    ("workers", "each", "task", "cpus"),
    [(2, 0.5, 0.25, 2), (3, 0.5, 0.25, 2), (1, 0.25, 0.25, 0.5), (7, 0.25, 0.25, 2), (3, 0.3, 0.1, 1)],
)
def test_workers_that_fit_pass(workers, each, task, cpus):
    session.check_fit(
        ScaleSettings(num_workers=workers, cpus_per_worker=each, cpus_per_data_task=task), cpus, 0, "here"
    )


@pytest.mark.parametrize(
    ("workers", "each", "task", "cpus", "most"),
    [(4, 0.5, 0.25, 2, 3), (2, 1.0, 0.25, 2, 1), (8, 0.25, 0.25, 2, 7), (4, 0.3, 0.1, 1, 3), (64, 0.5, 0.25, 16, 31)],
)
def test_workers_that_starve_the_data_tasks_are_refused_with_the_number_that_fits(workers, each, task, cpus, most):
    scale = ScaleSettings(num_workers=workers, cpus_per_worker=each, cpus_per_data_task=task)
    with pytest.raises(ResourceError, match=rf"here has {cpus}\..*scale\.num_workers to at most {most}\b"):
        session.check_fit(scale, cpus, 0, "here")
    session.check_fit(scale.model_copy(update={"num_workers": most}), cpus, 0, "here")


def test_where_no_worker_fits_no_number_is_offered():
    with pytest.raises(ResourceError, match=r"larger machine.*cpus_per_worker"):
        session.check_fit(ScaleSettings(num_workers=1, cpus_per_worker=4), 2, 0, "here")


def test_gpu_workers_need_gpus():
    scale = ScaleSettings(num_workers=2, use_gpu=True)
    session.check_fit(scale, 8, 2, "here")
    with pytest.raises(ResourceError, match=r"2 GPU workers need 2 GPUs; here has 1.*use_gpu=false"):
        session.check_fit(scale, 8, 1, "here")


def test_too_many_workers_are_refused_before_ray_starts(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ResourceError, match="this machine has"):
        session.connect(ScaleSettings(num_workers=10_000))
    assert not ray.is_initialized()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nonsense", "host:port", "no-such-host.invalid:6379"]
)
def test_an_address_without_a_cluster_is_refused_soon(monkeypatch, address):
    address = address.format(port=free_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"No Ray cluster answers at RAY_ADDRESS=.*ray start --head.*unset RAY_ADDRESS"
    ) as caught:
        session.connect(ScaleSettings())
    assert address in str(caught.value)
    assert time.monotonic() - began < 15
    assert not ray.is_initialized()


def test_an_address_that_never_accepts_is_refused_soon(monkeypatch):
    with socket.socket() as full:  # a listener whose queue is full neither refuses nor accepts
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        queued = [socket.socket() for _ in range(3)]
        for one in queued:
            one.setblocking(False)
            threading.Thread(target=one.connect_ex, args=(address,), daemon=True).start()
        time.sleep(0.2)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{address[1]}")
        monkeypatch.setattr(session, "ANSWER_SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(ResourceError, match="timed out"):
            session.connect(ScaleSettings())
        assert time.monotonic() - began < 5
        for one in queued:
            one.close()


def test_an_elastic_run_needs_its_fewest_workers():
    session.check_fit(ScaleSettings(num_workers=(1, 4000), cpus_per_worker=1), 2, 0, "here")
    with pytest.raises(ResourceError, match=r"2 GPU workers need 2 GPUs; here has 1"):
        session.check_fit(ScaleSettings(num_workers=(2, 4), use_gpu=True), 64, 1, "here")


def test_the_proxy_is_settled_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.ingress import SWITCH, prepare

    def after(before: dict[str, str], proxy: str, starts_ray: bool = True) -> dict[str, str]:
        environment = dict(before)
        monkeypatch.setattr(os, "environ", environment)
        prepare(proxy, starts_ray)
        return environment

    assert after({}, "auto") == {} and after({SWITCH: "1"}, "ray") == {SWITCH: "0"}
    assert after({}, "haproxy", starts_ray=False) == {SWITCH: "1"}  # the cluster has its own ports
    one, two = after({}, "haproxy"), after({SWITCH: "1"}, "auto")
    assert one[SWITCH] == "1" and "empty-response" in one["RAY_SERVE_HAPROXY_RETRY_ON"]
    for name in ("STATS_PORT", "METRICS_PORT", "SOCKET_PATH", "CONFIG_FILE_LOC", "SERVER_STATE_FILE"):
        assert one[f"RAY_SERVE_HAPROXY_{name}"] != two[f"RAY_SERVE_HAPROXY_{name}"]  # two Rays on one machine
    assert stat.S_IMODE(Path(one["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent.stat().st_mode) == 0o700
    assert after({**one, "RAY_SERVE_HAPROXY_STATS_PORT": "8404"}, "haproxy")["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"
