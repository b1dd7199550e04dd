"""An application of Ray Serve: an ingress and replicas, and Ray itself where there is none yet."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from engine.cores import usable_cores
from engine.errors import EngineError
from server.ray_cluster import Cluster
from server.ray_ingress import Ingress
from server.ray_replica import Replica
from server.ray_router import AdapterRouter
from server.settings import Settings

logger = logging.getLogger(__name__)

APP_NAME = "infmoe"
NUM_INGRESSES = 2  # so that the death of one is not that of the service
INGRESS_REQUESTS = 4096
OBJECT_STORE_BYTES = 128 * 2**20  # bodies and nothing else pass through it
STATS_S = 1.0
HEALTH_S = 1.0
NUM_STARTS = 2  # of replicas that fail before a deployment is given up; Serve would try 3 for each
CLOSE_S = 10.0  # beyond the drain, for what is left to end
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # replicas log each request


def build_application(settings: Settings, cluster: Cluster) -> serve.Application:
    """What `serve.run` takes. The settings must hold on all machines: paths above all."""
    resources: dict[str, float] = {
        "num_cpus": cluster.replica_cpus,
        "num_gpus": cluster.replica_gpus,
    }
    if settings.memory is not None:
        resources["memory"] = settings.memory  # so that no machine gets more than it can hold
    replicas = serve.deployment(
        Replica,
        name="Replica",
        ray_actor_options=resources,
        # the engine has a queue and says no when it is full; Serve should not wait before it
        max_ongoing_requests=settings.max_rows + settings.max_queue,
        graceful_shutdown_timeout_s=settings.drain_s + CLOSE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_S,
        max_constructor_retry_count=NUM_STARTS,
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter,
            request_router_kwargs={"busy": settings.max_rows},
            request_routing_stats_period_s=STATS_S,
        ),
        **how_many(settings, cluster),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=NUM_INGRESSES,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_s + CLOSE_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return ingress.bind(replicas.bind(settings), bounds_of(settings))


def how_many(settings: Settings, cluster: Cluster) -> dict[str, object]:
    """A fixed number of replicas, or as many as it takes that few requests wait for a row."""
    if cluster.max_replicas == cluster.replicas:
        return {"num_replicas": cluster.replicas}
    scaling = AutoscalingConfig(
        min_replicas=cluster.replicas,
        max_replicas=cluster.max_replicas,
        target_ongoing_requests=settings.max_rows,  # Serve counts those that wait too
    )
    return {"autoscaling_config": scaling}


def bounds_of(settings: Settings) -> Settings:
    """What the ingress goes by: without the model, so that another one leaves it alone."""
    names = (
        *("host", "allowed_hosts", "allow_unauthenticated", "keys_file", "api_key"),
        *("max_body_bytes", "max_bodies_bytes", "max_upload_bytes", "body_timeout_s"),
        *("request_timeout_s", "log_level", "log_format"),
    )
    return Settings.model_validate({name: getattr(settings, name) for name in names})


@contextmanager
def connected(settings: Settings, cluster: Cluster) -> Iterator[None]:
    """Join the Ray at the address, or start one that ends with this context.

    Raises EngineError if there is none, or it does not start.
    """
    is_own = cluster.address is None
    own = {
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "num_cpus": usable_cores(),
    }
    try:
        ray.init(
            address="local" if is_own else cluster.address,
            logging_level=logging.WARNING,
            **(own if is_own else {}),
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(f"Ray: {error}") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            http_options=HTTPOptions(host=settings.host, port=settings.port), logging_config=QUIET
        )
        yield
        if is_own:
            serve.shutdown()
    finally:
        ray.shutdown()


def deploy(settings: Settings, cluster: Cluster) -> None:
    """Deploy the application, or put it in the place of the one that runs, replica by replica.

    Returns when all replicas have loaded. Raises EngineError if they cannot.
    """
    try:
        serve.run(build_application(settings, cluster), name=APP_NAME, logging_config=QUIET)
    except RuntimeError as error:
        raise EngineError(f"the replicas do not start, the log tells why: {error}") from error


def drain(settings: Settings, number: int) -> None:
    """Let all replicas take nothing more and finish the rest; Serve answers meanwhile, and says so.

    At SIGTERM for at least as long as `infmoe serve` would, so that load balancers see it.
    """
    delay_s = settings.drain_delay_s if number == signal.SIGTERM else 0.0
    until_s = time.monotonic() + delay_s
    handle = serve.get_deployment_handle("Replica", APP_NAME)
    try:
        handle.broadcast("drain").results()
    except (RayActorError, RayServeException) as error:  # what is dead has nothing to finish
        logger.warning("not all replicas were there to drain: %s", error)
    time.sleep(max(0.0, until_s - time.monotonic()))


def wait_for_signal() -> int:
    """Sleep until SIGTERM or SIGINT, and tell which it was."""
    told = threading.Event()
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)  # after ray.init, which sets its own
    told.wait()
    return came[0]
