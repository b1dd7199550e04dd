"""Experts on their way to the computation: residents at once, the others as they arrive."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from time import perf_counter
from typing import NamedTuple

from offload.bank import HostBank
from offload.device import Arrival, Blob, Bytes, Device, IsCancelled
from offload.lookahead import Lookahead
from offload.planner import ExpertPlan
from offload.popularity import Popularity
from offload.slots import Key, SlotTable, Zone

Read = Callable[[Key, Bytes, IsCancelled], object]


class Guess(NamedTuple):
    """The experts that the next layer will probably want, the likeliest to matter first."""

    layer: str
    experts: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStats:
    """Counts since the start.

    `hits` were in a slot when they were wanted, `misses` were not: `host_loads` of them came from
    host memory, the others from disk. `prefetched` were fetched on a guess, which `prefetch_used`
    of them repaid so far and `prefetch_wasted` never will. `stall_s` is the time that the host
    waited for experts; `repinned` counts pins that went to an expert wanted more often.
    """

    hits: int = 0
    misses: int = 0
    host_loads: int = 0
    evictions: int = 0
    read_bytes: int = 0
    copied_bytes: int = 0
    stall_s: float = 0.0
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    repinned: int = 0

    def __sub__(self, earlier: "PipelineStats") -> "PipelineStats":
        """What was counted since an earlier snapshot."""
        names = (field.name for field in fields(self))
        return PipelineStats(
            **{name: getattr(self, name) - getattr(earlier, name) for name in names}
        )

    @property
    def hit_rate(self) -> float:
        """Share of wanted experts that were there; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class ExpertPipeline:
    """Streams the wanted experts of a layer through the slots of a device. For one thread only.

    Misses are fetched at once, as far as slots are to be had, while the residents compute; then, on
    a guess that has been right before, experts of the next layer. The slot of an expert is kept
    until the loop body that borrowed it is over.
    """

    def __init__(
        self,
        device: Device,
        plan: ExpertPlan,
        read: Read,
        bank: HostBank | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._device = device
        self._plan = plan
        self._read = read
        self._bank = bank
        self._clock = clock
        self._table = SlotTable(plan.zones)
        self._coming: dict[Key, Arrival] = {}  # fetched on a guess and on their way
        self._landed: dict[Key, Arrival] = {}  # fetched on a guess, there, and not yet waited for
        self._unproven: set[Key] = set()  # fetched on a guess and not wanted yet
        self._ending: deque[tuple[int, Zone, Arrival]] = deque()  # given up, maybe still written
        self._stats = PipelineStats()
        pinned = Counter(key.layer for key in plan.pinned)
        self._moving = {layer for layer in plan.layers if pinned[layer] < plan.experts_per_layer}
        # Pins may move where what loses its pin can be read again; beside a host bank it cannot:
        # placement is exclusive, and a pinned expert has no copy there.
        self._can_repin = bank is None and plan.num_decode > 0
        self._popularity = Popularity()
        self._coldest = 0.0  # no pinned expert has been wanted less often
        self.lookahead = Lookahead(device.trust)

    def preload(self, on_each: Callable[[int], None] | None = None) -> None:
        """Read the experts that the plan pins. `on_each` is given the number done.

        Raises what the reading raises.
        """
        arriving: dict[Key, Arrival] = {}
        try:
            for key in self._plan.pinned:
                slot = self._table.take(key, "pinned")
                assert slot is not None
                arriving[key] = self._fill(key, slot)
            for done, key in enumerate(self._plan.pinned, 1):
                arriving[key].wait()
                del arriving[key]
                self._table.release(key)
                if on_each:
                    on_each(done)
        finally:
            self._give_up(arriving)

    def stream(
        self, layer: str, wanted: Sequence[int], guess: Guess | None = None
    ) -> Iterator[tuple[int, Blob]]:
        """Yield (expert, bytes of its slot) for each wanted expert: residents, then as they arrive.

        The bytes are borrowed: they are valid until the next item is asked for. When nothing that
        is wanted waits to be fetched, `guess` says what to fetch next.
        Raises what the reading raises; whatever happens, no slot stays held.
        """
        keys = [Key(layer, expert) for expert in wanted]
        arriving, hits, misses = self._classify(layer, keys)
        if guess is not None:
            self.lookahead.note(guess.layer, self._absent(guess))
        lent: Key | None = None
        try:
            while hits or arriving or misses:
                self._begin(misses, arriving, must=not hits)
                key = self._next_hit(hits) if hits else self._land_next(arriving)
                lent = key
                blob = self._device.view(self._table.slot(key))
                if guess is not None and not misses and not arriving:
                    self._fetch_ahead(guess)
                    guess = None
                yield key.expert, blob
                lent = None
                self._return(key)
        finally:
            if lent is not None:
                self._return(lent)
            for key in hits:
                self._table.release(key)
            self._give_up(arriving)

    def _classify(
        self, layer: str, keys: list[Key]
    ) -> tuple[dict[Key, Arrival], deque[Key], deque[Key]]:
        """Those on their way, those there (held from now on), and those still to be fetched."""
        self.lookahead.judge(layer, [key.expert for key in keys])
        if self._can_repin and self._plan.zone(layer) == "decode" and self._popularity.note(keys):
            self._coldest = 0.0
        self._land_fetched()
        arriving = {key: self._coming.pop(key) for key in keys if key in self._coming}
        held = [key for key in keys if key not in arriving and self._table.hold(key)]
        hits = deque(sorted(held, key=self._landed.__contains__))  # what may still be copied last
        there = {*arriving, *hits}
        misses = deque(key for key in keys if key not in there)
        used = there & self._unproven
        self._unproven.difference_update(keys)
        self._count(hits=len(hits), misses=len(keys) - len(hits), prefetch_used=len(used))
        wrong = [key for key in self._coming if misses or key.layer == layer]
        self._give_up({key: self._coming.pop(key) for key in wrong})
        return arriving, hits, misses

    def _land_fetched(self) -> None:
        """Make residents of what came on a guess; what failed will fail again when it is wanted.

        Nobody waits for it before it is lent: on a GPU a copy that was issued counts as there.
        """
        for key in [key for key, arrival in self._coming.items() if arrival.is_ready()]:
            arrival = self._coming.pop(key)
            if arrival.has_failed():
                self._give_up({key: arrival})
            else:
                self._landed[key] = arrival
                self._table.release(key)
                self._count_load(key)

    def _next_hit(self, hits: deque[Key]) -> Key:
        """The next resident; one that came on a guess, once it can be computed with."""
        arrival = self._landed.get(hits[0])
        if arrival is not None:
            arrival.wait()
            del self._landed[hits[0]]
        return hits.popleft()

    def _begin(self, misses: deque[Key], arriving: dict[Key, Arrival], *, must: bool) -> None:
        """Start to fetch misses while there are slots; at least one if nothing else can go on."""
        while misses:
            slot = self._take(misses[0])
            if slot is None and must and not arriving:
                self._ending[0][2].join()
                continue
            if slot is None:
                return
            key = misses.popleft()
            arriving[key] = self._fill(key, slot)

    def _fetch_ahead(self, guess: Guess) -> None:
        """Fetch what a trusted guess names and is not there, as far as idle slots reach."""
        if not self.lookahead.is_trusted(guess.layer):
            return
        keys = [Key(guess.layer, expert) for expert in guess.experts]
        there = [key for key in keys if self._table.hold(key)]  # they must not make room
        try:
            for key in keys:
                if key in self._table:
                    continue
                slot = self._take(key)
                if slot is None:
                    break
                self._coming[key] = self._fill(key, slot)
                self._unproven.add(key)
                self._count(prefetched=1)
        finally:
            for key in there:
                self._table.release(key)

    def _absent(self, guess: Guess) -> list[int]:
        """What would have to be fetched for a guess: only that can be worth it or not."""
        return [e for e in guess.experts if Key(guess.layer, e) not in self._table]

    def _take(self, key: Key) -> int | None:
        """A slot for an expert that is not there, held; None if all of its zone are in use."""
        for _ in range(len(self._ending)):
            slot, zone, arrival = self._ending.popleft()
            if arrival.is_ready():
                self._table.give_back(slot, zone)
            else:
                self._ending.append((slot, zone, arrival))
        taken = self._table.take(key, self._plan.zone(key.layer))
        for evicted in [other for other in self._landed if other not in self._table]:
            del self._landed[evicted]
        return taken

    def _fill(self, key: Key, slot: int) -> Arrival:
        """Begin to fill a slot; if that cannot begin, the slot is free and the expert not there."""
        source = self._bank.get(key) if self._bank else None
        try:
            if source is not None:
                return self._device.copy(slot, source)
            return self._device.read(slot, partial(self._read, key))
        except BaseException:
            zone = self._table.zone(key)
            self._table.give_back(self._table.detach(key), zone)
            raise

    def _land_next(self, arriving: dict[Key, Arrival]) -> Key:
        """Wait for an expert, one that is there already if any is."""
        ready = (key for key, arrival in arriving.items() if arrival.is_ready())
        key = next(ready, next(iter(arriving)))
        began = self._clock()
        arriving[key].wait()
        self._count(stall_s=self._clock() - began)
        del arriving[key]
        self._count_load(key)
        return key

    def _return(self, key: Key) -> None:
        self._device.release(self._table.slot(key))
        self._table.release(key)
        if self._can_repin and self._table.zone(key) == "decode":
            self._repin(key)

    def _repin(self, key: Key) -> None:
        """Give an expert the pin of the one wanted least, if it is wanted clearly more often."""
        if not self._popularity.deserves(key, self._coldest):
            return
        pinned = [k for k in self._table.in_zone("pinned") if self._plan.zone(k.layer) == "decode"]
        if not pinned:
            return
        coldest = min(pinned, key=self._popularity.count)
        self._coldest = self._popularity.count(coldest)
        if self._popularity.deserves(key, self._coldest):
            self._table.swap_zones(key, coldest)
            self._count(repinned=1)

    def _give_up(self, arriving: dict[Key, Arrival]) -> None:
        """Forget what is on its way; its slots are free once nobody writes to them."""
        for key, arrival in arriving.items():
            arrival.stop()
            zone = self._table.zone(key)
            self._ending.append((self._table.detach(key), zone, arrival))

    def _count_load(self, key: Key) -> None:
        size = self._plan.slot_bytes
        if self._bank and self._bank.get(key) is not None:
            self._count(host_loads=1, copied_bytes=size)
        else:
            self._count(read_bytes=size)

    def _count(self, **more: float) -> None:
        self._stats = replace(
            self._stats,
            **{name: getattr(self._stats, name) + value for name, value in more.items()},
        )

    @property
    def stats(self) -> PipelineStats:
        """A snapshot of the counts."""
        stats = self._stats
        open_ = sum(key in self._table for key in list(self._unproven))
        wasted = stats.prefetched - stats.prefetch_used - open_
        return replace(stats, evictions=self._table.evictions, prefetch_wasted=max(wasted, 0))

    def wants_guess(self, layer: str) -> bool:
        """Whether it is worth guessing now what a layer will want."""
        return layer in self._moving and self.lookahead.is_asked(layer)

    def resident(self) -> set[Key]:
        """The experts that are in a slot now, or on their way."""
        return self._table.resident()

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What the device does in a slower way than it should, and why."""
        return self._device.fallbacks()

    def close(self) -> None:
        """End what is under way, and the device."""
        self._device.close()
