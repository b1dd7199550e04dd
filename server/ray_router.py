"""The request router of Ray Serve that looks at adapters. Imported where Ray is installed only."""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.ray_calls import rank_replicas


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # Any to who checks without Ray
    """Sends a request to the replicas that tell that they hold its adapter, if they have room.

    Replicas tell what they hold, and the name of their model, as routing stats; the request names
    what it wants as multiplexed model id. Requests for no adapter go to the less loaded of two.
    """

    def initialize_state(self, busy: int) -> None:
        """From how many requests on a replica counts as busy."""
        self._busy = busy

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, the best first; Serve takes the least loaded of a group."""
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        if not replicas:
            return []
        wanted = pending_request.metadata.multiplexed_model_id if pending_request else ""
        stats = {key: replica.routing_stats or {} for key, replica in replicas.items()}
        if not wanted or any(told.get("model") == wanted for told in stats.values()):
            chosen = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
            return [chosen, candidate_replicas]
        held = {key: told.get("adapters", ()) for key, told in stats.items()}
        loads = {key: self.replica_queue_len_cache.get(key) or 0 for key in replicas}
        groups = rank_replicas(wanted, held, loads, self._busy)
        return [[replicas[key] for key in group] for group in groups]
