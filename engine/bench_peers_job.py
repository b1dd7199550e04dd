"""What a process of `infmoe bench-peers` is told to load."""

from dataclasses import dataclass
from pathlib import Path

from engine.bench_peers_models import Paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A contender and its model. `max_tokens`: of a text, prompt and answer. Memory in bytes."""

    contender: str
    paths: Paths
    threads: int
    max_rows: int
    max_tokens: int
    expert_memory: int = 0
    vllm_python: Path | None = None
