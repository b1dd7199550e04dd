"""What an engine is to be opened with, in plain values: they may go to another process."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """One model and its limits; sizes in bytes, times in seconds.

    What is None is chosen when the model is loaded, or is without a bound. `beside_bytes` is what
    other processes of the same server take of the memory. `threads` None leaves torch's own.
    """

    model: Path
    name: str
    dtype: str | None = None
    memory: int | None = None
    gpu_memory: int | None = None
    adapter_memory: int = 0
    beside_bytes: int = 0
    max_rows: int = 32
    max_model_len: int | None = None
    max_queue: int = 64
    max_queue_tokens: int | None = None
    encoder_cache: int = 0
    invariant: bool = False
    record_routing: Path | None = None
    stall_s: float | None = None
    threads: int | None = None
