"""What is kept of the encoder is found for the same text, adapter and salt only."""

import gc
import weakref
from copy import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters import Adapter, Slots
from engine.encoder_cache import EncoderCache
from engine.engine import Engine
from engine.request import Failed, Finished, Pooling
from engine.scheduler import Limits
from tests.engine_jobs import TOKENIZER, Job, alone, make_request, pieces, run, without_times
from tests.tiny import DENSE, MOE, tiny_model

MODELS = {config: tiny_model(config, seed=5).double() for config in (MOE, DENSE)}
KEEPING = Limits(encoder_cache_bytes=100_000, window_s=0.0)
ROW_BYTES = DENSE.d_model * 8  # of a position


def make_adapter(name="a", version="1", seed=0):
    slots = Slots(front=2)
    generator = torch.Generator().manual_seed(seed)
    prompt_PD = torch.randn(slots.num_vectors, DENSE.d_model, generator=generator).double()
    return Adapter(name=name, version=version, prompt_PD=prompt_PD, slots=slots)


def salted(text="same", salt="s", adapter=None, config=DENSE, **params):
    request = make_request(text, config, **{"max_tokens": 4, "seed": 1, **params})
    return replace(request, salt=salt, adapter=adapter)


def output(length=3, value=1.0):
    return torch.full((length, DENSE.d_model), value, dtype=torch.float64)


def test_only_the_same_ids_adapter_and_salt_find_it():
    cache = EncoderCache(100_000)
    adapter = make_adapter()
    request = salted(adapter=adapter)
    cache.keep(request, output())
    assert torch.equal(cache.find(request), output())
    assert cache.find(salted(adapter=copy(adapter))) is not None  # the table lends copies
    others = [
        salted(adapter=adapter, salt="t"),
        salted("other", adapter=adapter),
        salted(),
        salted(adapter=make_adapter(version="2")),
        salted(adapter=make_adapter(name="b")),
        salted(adapter=make_adapter(seed=1)),  # same name and version, other vectors
        salted(adapter=replace(adapter, slots=Slots(back=2))),
    ]
    for other in others:
        assert not cache.knows(other)
        assert cache.find(other) is None
    found = len(request.source.ids) + len(salted(adapter=adapter).source.ids)
    assert cache.stats == (2, len(others), 3 * ROW_BYTES, 0, found)


def test_without_a_salt_nothing_is_kept_or_found_or_counted():
    cache = EncoderCache(100_000)
    cache.keep(salted(salt=None), output())
    cache.keep(salted(), output())
    assert cache.find(salted(salt=None)) is None
    assert (len(cache), cache.stats) == (1, (0, 0, 3 * ROW_BYTES, 0, 0))


def test_the_one_used_longest_ago_makes_room():
    cache = EncoderCache(3 * ROW_BYTES)
    for text in "abc":
        cache.keep(salted(text), output(1))
    cache.find(salted("a"))
    cache.keep(salted("d"), output(1))
    assert [cache.knows(salted(text)) for text in "abcd"] == [True, False, True, True]
    cache.keep(salted("long"), output(4))
    assert len(cache) == 3
    cache.resize(ROW_BYTES)
    assert cache.knows(salted("d"))
    assert cache.stats.nbytes == ROW_BYTES
    cache.resize(0)
    assert (len(cache), cache.stats.nbytes) == (0, 0)


def test_what_is_not_finite_is_not_kept():
    cache = EncoderCache(100_000)
    cache.keep(salted(), output(value=torch.nan))
    assert len(cache) == 0


def test_vectors_are_not_held_and_their_place_is_taken_by_what_comes_after():
    cache = EncoderCache(100_000)
    adapter = make_adapter()
    vectors = weakref.ref(adapter.prompt_PD)
    cache.keep(salted(adapter=adapter), output())
    del adapter
    gc.collect()
    assert vectors() is None
    assert not cache.knows(salted())
    again = salted(adapter=make_adapter())
    assert not cache.knows(again)
    cache.keep(again, output(value=2.0))
    assert torch.equal(cache.find(again), output(value=2.0))
    assert cache.stats.nbytes == 3 * ROW_BYTES


@settings(max_examples=60)
@given(
    steps=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 6)), max_size=40),
    limit=st.integers(0, 12),
)
def test_bytes_stay_within_the_limit_and_are_those_of_what_is_there(steps, limit):
    cache = EncoderCache(limit * ROW_BYTES)
    for text, length in steps:
        request = salted(text)
        if cache.find(request) is None:
            cache.keep(request, output(length))
        kept = sum(entry.encoded_SD.nbytes for entry in cache._entries.values())
        assert kept == cache.stats.nbytes <= limit * ROW_BYTES
    assert cache.stats.hits + cache.stats.misses == len(steps)


class Counting:
    """A model that counts what it encodes."""

    def __init__(self, model):
        self._model, self.sizes = model, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def encode_layers(self, tokens, segments, x):
        self.sizes.append(tuple(tokens.shape))
        return self._model.encode_layers(tokens, segments, x)


@pytest.mark.parametrize("config", [MOE, DENSE])
def test_a_hit_skips_the_sweep_joins_at_once_and_equals_the_uncached(config):
    model = Counting(MODELS[config])
    engine = Engine(model, TOKENIZER, KEEPING)
    requests = [
        salted(text, config=config, temperature=1.2, max_tokens=9, seed=seed)
        for seed, text in enumerate(("same", "another one"))
    ]
    first = run(engine, {0: [Job(request) for request in requests]})
    assert model.sizes == [(2, 12)]
    jobs = [Job(request) for request in requests]
    for job in jobs:
        engine.add(job)
    told = engine.turn()
    assert {job for job, _ in told} == set(jobs)  # a token each in the turn of their arrival
    events = {job: [event for other, event in told if other is job] for job in jobs}
    while engine.running:
        for job, event in engine.turn():
            events[job].append(event)
    assert model.sizes == [(2, 12)]
    for job, before in zip(jobs, first.values(), strict=True):
        assert pieces(events[job]) == pieces(before) == pieces(alone(MODELS[config], job.request))
        assert without_times(events[job][-1]) == without_times(before[-1])
        assert before[-1].cached_tokens == 0
        assert events[job][-1].cached_tokens == len(job.request.encoder_ids)
    assert engine.known[:2] == (2, 2)


def test_hits_do_not_wait_for_the_sweep_of_others():
    engine = Engine(MODELS[DENSE], TOKENIZER, KEEPING)
    run(engine, {0: [Job(salted())]})
    slow, hit = Job(salted("unknown")), Job(salted(max_tokens=1))
    engine.add(slow)
    engine.turn()
    assert engine._sweep is not None
    engine.add(hit)
    assert [type(event) for job, event in engine.turn() if job is hit][-1] is Finished


def test_neither_salts_nor_versions_leak():
    model = MODELS[DENSE]
    engine = Engine(model, TOKENIZER, KEEPING)
    for salt, adapter in (
        ("s", None),
        ("t", None),
        ("s", make_adapter(version="1", seed=1)),
        ("s", make_adapter(version="2", seed=2)),
        ("s", make_adapter(version="2", seed=3)),  # taken away, and given again with other vectors
    ):
        job = Job(salted(salt=salt, adapter=adapter, max_tokens=8, logprobs=0, ignore_eos=True))
        (events,) = run(engine, {0: [job]}).values()
        assert events[-1].cached_tokens == 0
        assert pieces(events) == pieces(alone(model, job.request))
    assert engine.known.hits == 0


def test_tasks_use_it_as_well():
    engine = Engine(MODELS[DENSE], TOKENIZER, KEEPING)
    request = replace(salted(), task=Pooling())
    (first,), (second,) = (run(engine, {0: [Job(request)]}).values() for _ in range(2))
    assert first[0] == second[0]
    assert second[1].cached_tokens == len(request.encoder_ids)


def test_off_by_default():
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits(window_s=0.0))
    for _ in range(2):
        (events,) = run(engine, {0: [Job(salted())]}).values()
        assert events[-1].cached_tokens == 0
    assert engine.known == (0, 2, 0, 0, 0)


def test_it_takes_its_bytes_from_those_of_the_caches_and_gives_them_to_one_long_row():
    model = MODELS[DENSE]
    limit = 200_000
    engine = Engine(
        model, TOKENIZER, Limits(cache_bytes=limit, encoder_cache_bytes=10**9, window_s=0.0)
    )
    taken = []
    long = Job(make_request("a" * 100, DENSE, max_tokens=80, seed=0, ignore_eos=True))
    jobs = [Job(salted("text" * n, max_tokens=6)) for n in range(1, 16)]
    for job in jobs:
        engine.add(job)
    while engine.running or len(engine.scheduler):
        engine.turn()
        taken.append(engine._batch.nbytes + engine.known.nbytes)
    kept = engine.known.nbytes
    assert 0 < kept <= limit // 2
    engine.add(long)
    while engine.running or len(engine.scheduler):
        engine.turn()
        taken.append(engine._batch.nbytes + engine.known.nbytes)
    assert engine.known.nbytes < kept
    assert max(taken) <= limit


class Full:
    """In place of the memory that a copy takes: there is none, so many times."""

    def __init__(self, call, times):
        self.call, self.times = call, times

    def __call__(self, *args, **more):
        self.times -= 1
        if self.times >= 0:
            raise MemoryError
        return self.call(*args, **more)


def test_without_memory_for_a_copy_the_text_is_answered_and_not_kept():
    engine = Engine(MODELS[DENSE], TOKENIZER, KEEPING)
    engine._room.known.keep = Full(engine._room.known.keep, 1)
    jobs = [Job(salted()) for _ in range(3)]
    events = run(engine, {0: jobs[:1], 20: jobs[1:2], 40: jobs[2:]})
    assert [events[job][-1].cached_tokens for job in jobs] == [0, 0, 5]
    assert all(pieces(events[job]) == pieces(events[jobs[0]]) for job in jobs)
    assert engine.scheduler.max_rows == KEEPING.max_rows // 2


@pytest.mark.parametrize(("times", "num_failed"), [(1, 0), (2, 1), (3, 2)])
def test_without_memory_for_kept_texts_each_goes_alone(times, num_failed):
    engine = Engine(MODELS[DENSE], TOKENIZER, KEEPING)
    first, *others = [Job(salted()) for _ in range(3)]
    events = run(engine, {0: [first]})
    engine._find_known = Full(engine._find_known, times)
    events = run(engine, {0: others})
    ends = [events[job][-1] for job in others]
    assert sum(isinstance(end, Finished) for end in ends) == 2 - num_failed
    failed = Failed("the engine could not go on: MemoryError")
    assert sum(end == failed for end in ends) == num_failed
    assert engine.running == 0
