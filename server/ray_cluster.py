"""How much of Ray a service takes. Imports nothing of Ray: mistakes are told before it loads."""

from dataclasses import dataclass

from engine.cores import usable_cores
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """How many replicas there are and what each takes. `address` None: a Ray of our own."""

    replicas: int
    max_replicas: int
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"{self.replicas} replicas serve nobody; give 1 or more")
        if self.max_replicas < self.replicas:
            raise ConfigError(
                f"at most {self.max_replicas} replicas are fewer than the {self.replicas} to begin "
                "with; raise --max-replicas"
            )
        cores = usable_cores()
        needed = self.max_replicas * self.replica_cpus
        if self.address is None and needed > cores:
            raise ConfigError(
                f"{self.max_replicas} replicas of {self.replica_cpus:g} CPUs need {needed:g}; "
                f"there are {cores} here: lower --replica-cpus, or join more machines by --address"
            )
