"""The service on Ray Serve: `serve run serve.deployment:app model=… index=…`, `serve deploy serve/config.yaml`,
and `start` / `stop` for the command line. The only file of this room that imports Ray.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `app` as a class.

import os
import socket
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import ray
from pydantic import Field
from ray import serve as ray_serve

from serve.api import create_app
from serve.engine import Engine
from serve.guard import KEYS_VARIABLE, check_binding, parse_keys
from serve.schemas import Body, Limits
from tdro_ray.errors import CheckpointError, ConfigError, ResourceError, TdroError
from tdro_ray.index import versions
from tdro_ray.model.load import Backend, Dtype

APP_NAME = "tdro-retriever"  # on the dashboard and in `serve status`


class Args(Body):
    """What one application serves and what each replica asks of Ray."""

    model: str  # model folder
    index: str | None = None  # index folder; none serves embeddings only
    device: str = "cpu"  # or "cuda"
    backend: Backend = "auto"  # "torch" or "onnx": what the model folder holds; auto takes either
    dtype: Dtype = (
        "auto"  # of torch's matrix products: "float32", "bfloat16"; auto: bfloat16 where fast and exact enough
    )
    compile: bool = False  # torch.compile: a start takes half a minute longer and needs a C++ compiler
    index_device: str = "cpu"  # or "cuda": FAISS on a GPU, for Flat and IVF kinds
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.5, ge=0)  # per replica; half a CPU lets two of them, or a stage beside it, fit two cores
    num_gpus: float = Field(0.0, ge=0)  # per replica
    threads: int = Field(
        0, ge=0
    )  # of a forward and a search; 0: the node's CPUs shared by num_replicas, at least num_cpus
    cache_mb: int = Field(64, ge=0)  # MiB per replica of vectors of texts seen before; 0 keeps none
    merge_cpus: float = Field(
        0.0, ge=0
    )  # of the Ray task that merges changes, also its threads; 0 waits for none, and has one
    key_digests: tuple[str, ...] = ()  # SHA-256 of API keys, beside those in the replicas' environment
    limits: Limits = Limits()


class Retriever:
    """One replica: it loads the model and the index, and answers HTTP by the routes of `serve.api`."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.args = Args.model_validate(args)
        # A replica trusts neither the driver nor the YAML: it looks at the address that this Serve listens on.
        self.key_digests = (*self.args.key_digests, *parse_keys(os.environ.get(KEYS_VARIABLE, "")))
        listening = _listening()
        if listening is not None:
            check_binding(listening[0], self.key_digests)
        self.engine = Engine.open(
            self.args.model,
            self.args.index,
            self.args.device,
            self.args.limits,
            backend=self.args.backend,
            dtype=self.args.dtype,
            threads=_threads(self.args),
            compile=self.args.compile,
            cache_bytes=self.args.cache_mb << 20,
            merger=partial(_merge_in_task, num_cpus=self.args.merge_cpus),
            index_device=self.args.index_device,
        )

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.engine, self.key_digests)

    def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        if not (self.engine.embedder.alive and self.engine.searcher.alive and self.engine.writer.batcher.alive):
            raise RuntimeError("A worker thread of the engine has ended.")


def app(args: Args) -> ray_serve.Application:
    """Return the Serve application of `args`: the import path of `serve run`, `serve build` and `serve deploy`."""
    resolved = args.model_copy(
        update={
            "model": str(Path(args.model).resolve()),
            "index": str(Path(args.index).resolve()) if args.index else None,
        }
    )
    deployment = ray_serve.deployment(
        ray_serve.ingress()(Retriever),
        name="Retriever",
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        # Refusing is the engine's work, with an error body and Retry-After: Ray must pass on more than its queue holds.
        max_ongoing_requests=args.limits.max_waiting + 64,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=args.limits.timeout_s + 5,
        max_constructor_retry_count=2,  # a wrong folder stays wrong
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(resolved.model_dump())


def start(
    model_folder: str | Path,
    index_folder: str | Path | None,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_replicas: int = 1,
    name: str = APP_NAME,
    *,
    timeout_s: float = 180.0,
    **options: Any,
) -> str:
    """Serve on the connected Ray and return the URL once it answers; port 0 takes a free one. `options` are more of `Args`.

    API keys come from the environment of the caller and reach the replicas as digests. Raises ConfigError (address
    without keys), CheckpointError or DataError (folders), ResourceError (port taken, no CPUs, failure to start).
    """
    digests = parse_keys(os.environ.get(KEYS_VARIABLE, ""))
    check_binding(host, digests)
    args = Args(
        model=str(model_folder),
        index=str(index_folder) if index_folder else None,
        num_replicas=num_replicas,
        key_digests=digests,
        **{"num_gpus": 1.0 if "cuda" in (options.get("device"), options.get("index_device")) else 0.0, **options},
    )
    _check_inputs(args)
    port = _claim(host, port)
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as err:  # Serve replaces a proxy that is slow
        raise ResourceError(
            "Ray Serve's HTTP proxy did not start in time: the machine is too busy, or its log in the dashboard says why. "
            "Try again when other work is done."
        ) from err
    url = f"http://{_reachable(host)}:{port}"
    replaces = name in ray_serve.status().applications
    try:
        target = ray_serve.RunTarget(app(args), name=name, route_prefix="/")
        ray_serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        deadline = time.monotonic() + timeout_s
        _wait_running(name, deadline, timeout_s, args)
        _wait_ready(url, deadline, timeout_s)
    except BaseException:  # Ctrl-C too: nothing half-started stays behind
        if not replaces:
            stop(name)
        raise
    return url


def stop(name: str = APP_NAME) -> None:
    """Stop one application, after its requests under way; the last one takes Serve and its port with it."""
    applications = ray_serve.status().applications
    if name in applications:
        ray_serve.delete(name)
    if not set(applications) - {name}:
        ray_serve.shutdown()


def _check_inputs(args: Args) -> None:
    """Find the user's mistakes here, where a message is a message, and not in a replica's log."""
    model_folder = Path(args.model)
    if not (model_folder / "tdro.json").is_file():
        raise CheckpointError(
            f"{model_folder} is not a tdro model folder: it has no tdro.json. Give a folder that `tdro finetune` wrote."
        )
    if args.index is not None:
        versions.check_same_model(
            versions.manifest(versions.current(args.index)), model_folder.name, versions.model_hash(model_folder)
        )
    have = ray.cluster_resources() if ray.is_initialized() else {}
    for resource, each in (("CPU", args.num_cpus), ("GPU", args.num_gpus)):
        need = each * args.num_replicas
        if have and need > have.get(resource, 0):
            raise ResourceError(
                f"{args.num_replicas} replicas of {each:g} {resource} need {need:g}, the cluster has {have.get(resource, 0):g}. "
                "Set serve.num_replicas lower, or add nodes."
            )


def _claim(host: str, port: int) -> int:
    """Return the port to serve on. Raises ResourceError where it cannot be had."""
    listening = _listening()
    if listening is not None:
        if host == listening[0] and port in (0, listening[1]):
            return listening[1]
        raise ResourceError(
            f"Ray Serve already listens on {listening[0]}:{listening[1]} in this cluster, and all its applications share that "
            f"address; {host}:{port} was asked for. Set serve.port={listening[1]}, or stop the other with `serve shutdown`."
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as err:
            raise ResourceError(
                f"Cannot serve on {host}:{port}: {err.strerror}. Set serve.port to a free port (0 takes any), or serve.host to an "
                "address of this machine."
            ) from err
        return int(probe.getsockname()[1])


def _listening() -> tuple[str, int] | None:
    """Host and port of the Serve that runs in the connected cluster, or None."""
    # Ray has no public call for this: `serve.status()` tells applications, not the address.
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


def _wait_running(name: str, deadline: float, timeout_s: float, args: Args) -> None:
    while time.monotonic() < deadline:
        state = ray_serve.status().applications.get(name)
        if state is not None and state.status == "RUNNING":
            return
        if state is not None and state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise _failure([state.message, *(d.message for d in state.deployments.values())])
        time.sleep(0.2)
    raise ResourceError(
        f"Application {name!r} did not start within {timeout_s:.0f} s. It asks for {args.num_replicas} x {args.num_cpus} CPU and "
        f"{args.num_replicas} x {args.num_gpus} GPU: see `ray status` for what is free, and the replica's log in the dashboard."
    )


def _failure(messages: list[str]) -> TdroError:
    """The replica's own error, without the tracebacks around it."""
    lines = [line.strip() for message in messages for line in message.splitlines()]
    for kind in (ConfigError, CheckpointError, ResourceError, TdroError):
        for line in lines:
            before, marker, text = line.partition(f"{kind.__name__}: ")
            if marker and before.endswith("."):
                return kind(text)
    last = next((line for line in reversed(lines) if line), "no reason given")
    return ResourceError(f"The service failed to start: {last} The replica's log in the dashboard says more.")


def _wait_ready(url: str, deadline: float, timeout_s: float) -> None:
    """The proxy learns of a running application a little later than the controller."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy of the environment
    while time.monotonic() < deadline:
        try:
            with opener.open(f"{url}/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.1)
    raise ResourceError(f"{url}/ready did not answer within {timeout_s:.0f} s; see the proxy's log in the dashboard.")


def _reachable(host: str) -> str:
    """The address under which a client on this machine reaches a server on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _merge_in_task(folder: Path, num_cpus: float) -> dict[str, Any] | None:
    """Merge an index folder's changes in a Ray task, away from the replica that answers; errors are the merge's own."""
    from tdro_ray.index.merge import merge

    try:
        return ray.get(ray.remote(merge).options(num_cpus=num_cpus, max_retries=0, name="tdro-merge").remote(folder))
    except ray.exceptions.RayTaskError as err:
        raise (err.cause if isinstance(err.cause, Exception) else err) from None


def _threads(args: Args) -> int:
    """The threads of this replica. Ray sets OMP_NUM_THREADS to the CPUs that a replica reserves, which are few so that
    others fit beside it; cores that idle would stay idle."""
    node = ray.get_runtime_context().get_node_id()
    cpus = next((n["Resources"].get("CPU", 1) for n in ray.nodes() if n["NodeID"] == node), 1)
    return args.threads or max(1, int(args.num_cpus), int(cpus) // args.num_replicas)
