"""Experts on their way to the computation: residents at once, the others as they arrive."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

from offload.device import Arrival, Bytes, Device
from offload.slots import Key, SlotTable

Read = Callable[[Key, Bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStats:
    """Counts since the start.

    Experts found in a slot or read, bytes read, seconds spent waiting.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    read_bytes: int = 0
    stall_s: float = 0.0

    def __sub__(self, earlier: "PipelineStats") -> "PipelineStats":
        """What was counted since an earlier snapshot."""
        return PipelineStats(
            hits=self.hits - earlier.hits,
            misses=self.misses - earlier.misses,
            evictions=self.evictions - earlier.evictions,
            read_bytes=self.read_bytes - earlier.read_bytes,
            stall_s=self.stall_s - earlier.stall_s,
        )

    @property
    def hit_rate(self) -> float:
        """Share of wanted experts that were there; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class ExpertPipeline:
    """Streams the wanted experts of a layer through the slots of a device. For one thread only.

    Reads of the misses begin at once, as far as slots are to be had, while the residents compute;
    the slot of an expert is kept until the loop body that borrowed it is over.
    """

    def __init__(self, device: Device, num_slots: int, slot_bytes: int, read: Read) -> None:
        self._device = device
        self._table = SlotTable(num_slots)
        self._slot_bytes = slot_bytes
        self._read = read
        self._stats = PipelineStats()

    def preload(self, keys: Sequence[Key], on_each: Callable[[int], None] | None = None) -> None:
        """Read experts and pin them; they are never evicted. `on_each` is given the number done.

        Raises what the reading raises, and ValueError if they do not leave a slot for the others.
        """
        if len(keys) > self._table.num_slots:
            raise ValueError(f"{len(keys)} experts to pin, but {self._table.num_slots} slots")
        by_layer: dict[str, list[int]] = {}
        for key in keys:
            by_layer.setdefault(key.layer, []).append(key.expert)
        done = 0
        for layer, experts in by_layer.items():
            for expert, _ in self.stream(layer, experts):
                self._table.pin(Key(layer, expert))
                done += 1
                if on_each:
                    on_each(done)
        self._stats = PipelineStats()

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, Bytes]]:
        """Yield (expert, bytes of its slot) for each wanted expert: residents, then as they arrive.

        The bytes are borrowed: they are valid until the next item is asked for.
        Raises what the reading raises; whatever happens, no slot stays held and no read goes on.
        """
        keys = [Key(layer, expert) for expert in wanted]
        hits = deque((key, slot) for key in keys if (slot := self._table.hold(key)) is not None)
        found = {key for key, _ in hits}
        misses = deque(key for key in keys if key not in found)
        arriving: deque[tuple[Key, int, Arrival]] = deque()
        self._count(hits=len(hits), misses=len(misses))
        lent: Key | None = None
        try:
            self._start_reads(misses, arriving)
            while hits or arriving:
                if hits:
                    lent, slot = hits.popleft()
                else:
                    lent, slot, arrival = arriving.popleft()
                    self._wait(lent, arrival)
                yield lent.expert, self._device.view(slot)
                self._table.release(lent)
                lent = None
                self._start_reads(misses, arriving)
            assert not misses
        finally:
            self._clean_up(lent, hits, arriving)

    def _start_reads(self, misses: deque[Key], arriving: deque[tuple[Key, int, Arrival]]) -> None:
        while misses:
            slot = self._table.take(misses[0])
            if slot is None:
                return
            key = misses.popleft()
            arriving.append((key, slot, self._device.start(slot, partial(self._read, key))))

    def _wait(self, key: Key, arrival: Arrival) -> None:
        began = perf_counter()
        try:
            arrival.wait()
        except BaseException:
            arrival.cancel()  # nobody may write to a slot that is given away
            self._table.drop(key)  # what is in it is not the expert
            raise
        self._count(stall_s=perf_counter() - began, read_bytes=self._slot_bytes)

    def _clean_up(
        self,
        lent: Key | None,
        hits: deque[tuple[Key, int]],
        arriving: deque[tuple[Key, int, Arrival]],
    ) -> None:
        """Leave nothing held after an error or a loop that was left early."""
        held = [key for key, _ in hits]
        if lent is not None and lent in self._table.resident():
            held.append(lent)
        for key in held:
            self._table.release(key)
        for key, _, arrival in arriving:
            arrival.cancel()
            self._table.drop(key)

    def _count(self, **more: float) -> None:
        self._stats = replace(
            self._stats,
            **{name: getattr(self._stats, name) + value for name, value in more.items()},
        )

    @property
    def stats(self) -> PipelineStats:
        """A snapshot of the counts."""
        return replace(self._stats, evictions=self._table.evictions)

    def resident(self) -> set[Key]:
        """The experts that are in a slot now."""
        return self._table.resident()

    def close(self) -> None:
        """End the device's readers."""
        self._device.close()
