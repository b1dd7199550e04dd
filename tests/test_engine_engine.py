"""Requests together give what they give alone, however they come, go and fail."""

import weakref
from dataclasses import replace
from time import perf_counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache import STEP, RowCache
from engine.engine import Engine
from engine.errors import CheckpointError, TokenizerError
from engine.failures import DeviceLost
from engine.generation import generate
from engine.pressure import GOOD_TURNS
from engine.request import Failed, Finished
from engine.scheduler import Limits
from tests.engine_jobs import (
    TOKENIZER,
    Job,
    alone,
    broken_model,
    late_job,
    make_request,
    pieces,
    run,
    without_times,
)
from tests.tiny import DENSE, MOE, random_ids, tiny_model

# in double precision no two scores are so near that the order of sums decides between them
MODELS = {config: tiny_model(config, seed=5).double() for config in (MOE, DENSE)}


TEXTS = st.text("abc <", min_size=1, max_size=30)
PLANS = st.lists(
    st.tuples(
        TEXTS,
        st.booleans(),
        st.integers(1, 8),
        st.sampled_from([0.0, 1.0, 1.7]),
        st.integers(0, 8),
        st.one_of(st.none(), st.integers(0, 14)),
        st.sampled_from([(), ("a",), ("\x00",), ("bc", "q")]),
        st.sampled_from([{}, {"top_k": 4}, {"min_p": 0.2, "presence_penalty": 1.0}]),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=500)
@given(
    plans=PLANS,
    max_rows=st.integers(1, 5),
    sweep=st.integers(1, 60),
    config=st.sampled_from([MOE, DENSE]),
)
def test_together_equals_alone(plans, max_rows, sweep, config):
    model = MODELS[config]
    engine = Engine(
        model, TOKENIZER, Limits(max_rows=max_rows, max_sweep_tokens=sweep, window_s=0.0)
    )
    jobs, cancel_at, arrivals = [], {}, {}
    for number, (text, fill, length, temperature, turn, cancel, stop, more) in enumerate(plans):
        if fill:
            text = f"{text}<span>x<span>"
        request = make_request(
            text,
            config,
            fill,
            str(number),
            max_tokens=length,
            temperature=temperature,
            seed=number,
            stop=stop,
            **more,
        )
        flags = []
        job = Job(request, is_cancelled=lambda flags=flags: bool(flags))
        jobs.append((job, cancel))
        arrivals.setdefault(turn, []).append(job)
        if cancel is not None:
            cancel_at[cancel] = flags
    events = run(engine, arrivals, cancel_at)
    for job, cancel in jobs:
        expected, got = alone(model, job.request), events[job]
        if cancel is None or (got and isinstance(got[-1], Finished)):
            assert pieces(got) == pieces(expected)
            assert without_times(got[-1]) == without_times(expected[-1])
            assert len([e for e in got if isinstance(e, Finished | Failed)]) == 1
        else:
            assert got == expected[: len(got)]
    assert engine.running == 0


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=8),
    room=st.floats(0, 3),
)
def test_caches_stay_within_their_bytes_but_for_one_row_alone(lengths, room):
    model = MODELS[DENSE]
    one = RowCache(model)
    longest = max(sum(pair) for pair in lengths)
    with torch.no_grad():
        one.append(
            torch.zeros(1, longest, DENSE.d_model, dtype=torch.float64), [longest], [longest]
        )
    limit = int(one.nbytes * room)
    engine = Engine(model, TOKENIZER, Limits(cache_bytes=limit))
    jobs = [
        Job(make_request([65] * source, DENSE, max_tokens=target, seed=0, temperature=1.0))
        for source, target in lengths
    ]
    for job in jobs:
        engine.add(job)
    ends = 0
    while engine.running or len(engine.scheduler):
        ends += sum(isinstance(event, Finished) for _, event in engine.turn())
        batch = engine._batch
        assert len(batch) <= 1 or batch._cache.nbytes <= limit
    assert ends == len(jobs)


def test_equal_texts_go_through_the_encoder_once():
    model = MODELS[DENSE]
    sizes = []
    inner = model.encode_layers

    class Counting:
        def __getattr__(self, name):
            return getattr(model, name)

        def encode_layers(self, tokens, segments, x):
            sizes.append(tuple(tokens.shape))
            return inner(tokens, segments, x)

    engine = Engine(Counting(), TOKENIZER, Limits())
    jobs = [Job(make_request("same", DENSE, max_tokens=4, seed=i)) for i in range(6)]
    run(engine, {0: jobs})
    assert sizes == [(1, 5)]


def first_expert(model, request, layer):
    """The expert of a layer that the first step of a request wants."""
    seen = []
    broken = broken_model(lambda name, wanted: seen.append((name, tuple(wanted))))
    next(generate(broken, TOKENIZER, request), None)
    return next(wanted for name, wanted in seen if name == layer)


@pytest.mark.parametrize("layer", ["encoder-1", "decoder-1"])
def test_an_expert_that_cannot_be_read_fails_only_those_that_need_it(layer):
    model = MODELS[MOE]
    requests = [
        make_request(text, name=text, max_tokens=5, temperature=1.0, seed=1)
        for text in ("first", "second one", "the third of them")
    ]
    bad = set(first_expert(model, requests[0], layer))
    error = CheckpointError("cannot be read")
    broken = broken_model(
        lambda name, wanted: error if name == layer and bad & set(wanted) else None
    )
    engine = Engine(broken, TOKENIZER, Limits(max_rows=8))
    jobs = [Job(request) for request in requests]
    events = run(engine, {0: jobs})
    assert isinstance(events[jobs[0]][-1], Failed)
    for job in jobs:
        try:
            expected = list(generate(broken, TOKENIZER, job.request))
        except CheckpointError:
            assert isinstance(events[job][-1], Failed)
        else:
            assert pieces(events[job]) == pieces(expected)
    assert engine.running == 0


def test_a_failure_that_passes_is_retried_row_by_row_and_nobody_notices():
    left = [3]

    def fails(layer, wanted):
        if layer == "decoder-1" and len(wanted) > 1 and left[0]:
            left[0] -= 1
            return CheckpointError("cannot be read")
        return None

    model = broken_model(fails)
    requests = [make_request(t, name=t, max_tokens=6, seed=1) for t in ("one", "two", "three a")]
    jobs = [Job(request) for request in requests]
    events = run(Engine(model, TOKENIZER, Limits()), {0: jobs})
    assert left[0] < 3
    for job in jobs:
        assert pieces(events[job]) == pieces(alone(MODELS[MOE], job.request))


def test_scores_that_are_not_finite_fail_their_row_only():
    model = tiny_model(MOE, seed=5).double()
    inner = model.logits

    class Spoiled:
        def __getattr__(self, name):
            return getattr(model, name)

        def logits(self, hidden):
            scores = inner(hidden).clone()
            scores[0] = torch.nan
            return scores

    jobs = [Job(make_request(t, name=t, max_tokens=3)) for t in ("one", "two")]
    events = run(Engine(Spoiled(), TOKENIZER, Limits()), {0: jobs})
    ends = [events[job][-1] for job in jobs]
    assert any(isinstance(end, Failed) and "not finite" in end.message for end in ends)


@torch.no_grad()
def test_rows_leave_and_join_without_disturbing_the_others():
    model = MODELS[DENSE]
    cache = RowCache(model)
    encoded = [model.encode(random_ids(1, n, n), torch.ones(1, n)) for n in (3, STEP + 5, 4)]
    caches = []
    for encoded_1SD in encoded:
        cache.append(encoded_1SD, [encoded_1SD.shape[1]], [10])
        ones = torch.ones(encoded_1SD.shape[:2])
        caches.append(model.start_cache(encoded_1SD, ones, 10))
    tokens = random_ids(3, 6, 1)
    for position in range(2):
        model.step(tokens[:, position : position + 1], cache.view())
        cache.advance(0, 3, 1)
    cache.remove(0)
    assert len(cache) == 2
    cache.append(encoded[0], [3], [STEP + 1])  # the arenas grow
    for row, text in ((0, 2), (1, 1)):  # the last took the place of the first
        model.step(tokens[text : text + 1, :2], caches[text])
        got = model.step(tokens[text : text + 1, 2:4], cache.view(row, row + 1))
        expected = model.step(tokens[text : text + 1, 2:4], caches[text])
        torch.testing.assert_close(got, expected)
    expected = model.step(tokens[:1, :3], caches[0])
    torch.testing.assert_close(model.step(tokens[:1, :3], cache.view(2)), expected)
    assert cache.nbytes > 0


def without_memory(is_too_much):
    """A model that finds no memory for the caches of some texts, by the shape of the encoded."""
    model = tiny_model(DENSE, seed=5).double()
    attention = model.decoder.blocks()[0].cross_attention
    project = attention.project

    def checked(encoded_BSD):
        if is_too_much(*encoded_BSD.shape[:2]):
            raise MemoryError
        return project(encoded_BSD)

    attention.project = checked
    return model


def test_rows_for_which_there_is_no_memory_together_are_taken_in_one_by_one():
    model = without_memory(lambda rows, length: rows > 1)
    jobs = [Job(make_request(t, DENSE, max_tokens=5, seed=1)) for t in ("one", "two", "three")]
    events = run(Engine(model, TOKENIZER, Limits()), {0: jobs})
    for job in jobs:
        assert pieces(events[job]) == pieces(alone(MODELS[DENSE], job.request))
        assert isinstance(events[job][-1], Finished)


def test_a_row_for_which_there_is_no_memory_fails_alone():
    model = without_memory(lambda rows, length: length == 31)
    first, long, last = (
        Job(make_request(t, DENSE, max_tokens=9, seed=1)) for t in ("one", "a" * 30, "three")
    )
    engine = Engine(model, TOKENIZER, Limits())
    events = run(engine, {0: [first], 4: [long], 8: [last]})
    assert events[long] == [Failed("the engine could not go on: MemoryError")]
    for job in (first, last):
        assert pieces(events[job]) == pieces(alone(MODELS[DENSE], job.request))
    assert engine.running == 0


@pytest.mark.parametrize("name", ["step", "project"])
def test_what_a_failed_try_had_made_is_gone_before_the_next_one(name):
    model = tiny_model(DENSE, seed=5).double()
    place = model if name == "step" else model.decoder.blocks()[0].cross_attention
    inner, made, left = getattr(place, name), [], []

    def hungry(tensor, *args):
        left.append(sum(ref() is not None for ref in made))
        workspace = torch.zeros(9)
        made.append(weakref.ref(workspace))
        if len(tensor) > 1:
            raise MemoryError
        return inner(tensor, *args)

    setattr(place, name, hungry)
    jobs = [Job(make_request(t, DENSE, max_tokens=3, seed=1)) for t in ("one", "two")]
    events = run(Engine(model, TOKENIZER, Limits()), {0: jobs})
    assert all(isinstance(events[job][-1], Finished) for job in jobs)
    assert not any(left)


class Cramped(RowCache):
    """Has memory for so many arenas."""

    num_arenas = 100

    def _arena(self, rows, positions):
        self.num_arenas -= bool(rows)
        if self.num_arenas < 0:
            raise MemoryError
        return super()._arena(rows, positions)


@torch.no_grad()
def test_arenas_that_cannot_all_grow_stay_as_they_are():
    model = MODELS[DENSE]
    encoded = model.encode(random_ids(1, 3, 3), torch.ones(1, 3))
    cache = Cramped(model)
    cache.append(encoded, [3], [10])
    before = cache.nbytes
    cache.num_arenas = 1  # the second one finds no memory
    with pytest.raises(MemoryError):
        cache.append(encoded.expand(2, -1, -1), [3, 3], [10, 10])
    assert (len(cache), cache.nbytes) == (1, before)
    cache.num_arenas = 2
    cache.append(encoded.expand(2, -1, -1), [3, 3], [10, 10])
    tokens = random_ids(1, 2, 1)
    states = model.step(tokens.expand(3, -1), cache.view())
    torch.testing.assert_close(states[2], states[0])


class Spoiling:
    """A model that spoils some texts on their way through it."""

    def __init__(self, model, encode=lambda encoded: encoded, logits=lambda scores: scores):
        self._model, self._encode, self._logits = model, encode, logits

    def __getattr__(self, name):
        return getattr(self._model, name)

    def encode_layers(self, *args):
        encoded = yield from self._model.encode_layers(*args)
        return self._encode(encoded)

    def logits(self, hidden):
        return self._logits(self._model.logits(hidden).clone())


def test_scores_that_overflow_in_the_sampler_fail_their_row_only():
    text = "the engine could not go on: scores over the temperature are not finite"
    failed = Failed(text)

    def spoil(scores):
        scores[0] *= 1e33
        return scores

    jobs = [
        Job(make_request(t, name=t, max_tokens=3, temperature=1e-7, seed=1, ignore_eos=True))
        for t in ("one", "two")
    ]
    events = run(Engine(Spoiling(MODELS[MOE], logits=spoil), TOKENIZER, Limits()), {0: jobs})
    assert events[jobs[0]] == [failed]
    # the other has its place then, and is spoiled in turn
    assert events[jobs[1]][-1] == failed
    assert len(events[jobs[1]]) > 1


def test_what_a_failed_row_leaves_behind_spoils_nobody():
    def spoil(encoded):
        return encoded * torch.nan if encoded.shape[1] == 21 else encoded

    model = Spoiling(MODELS[DENSE], spoil)
    long, bad, short = (
        Job(make_request("a" * n, DENSE, max_tokens=60, seed=1, ignore_eos=True))
        for n in (40, 20, 3)
    )
    events = run(Engine(model, TOKENIZER, Limits()), {0: [long], 5: [bad], 15: [short]})
    assert isinstance(events[bad][-1], Failed)
    for job in (long, short):  # `short` stands where `bad` stood, and sees as far as `long` reaches
        assert pieces(events[job]) == pieces(alone(MODELS[DENSE], job.request))


def cancellable(text, **params):
    flags = []
    return Job(make_request(text, DENSE, **params), is_cancelled=lambda: bool(flags)), flags


def test_a_sweep_that_nobody_waits_for_ends_at_once():
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits())
    jobs = [cancellable(text, max_tokens=2) for text in ("one", "two")]
    for job, _ in jobs:
        engine.add(job)
    assert engine.turn() == []
    assert engine.running == 2
    for _, flags in jobs:
        flags.append(True)
    assert engine.turn() == []
    assert engine.running == 0


def test_a_text_that_nobody_waits_for_is_not_tried_again():
    sizes = []

    class Failing(Spoiling):
        def encode_layers(self, tokens, *args):
            sizes.append(len(tokens))
            raise RuntimeError
            yield

    engine = Engine(Failing(MODELS[DENSE]), TOKENIZER, Limits())
    jobs = [cancellable(text, max_tokens=2) for text in ("one", "two")]
    for job, _ in jobs:
        engine.add(job)
    engine.turn()
    for _, flags in jobs:
        flags.append(True)
    assert engine.running == 2
    assert engine.turn() == []
    assert (sizes, engine.running) == ([2], 0)


# --- deadlines


def timed(text="abc", deadline_s=60.0, **params):
    return replace(make_request(text, DENSE, **params), deadline_s=deadline_s)


def test_a_deadline_that_passes_in_the_queue_is_told_as_late():
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits(window_s=0.0))
    bad, good = late_job(timed(deadline_s=0.25)), Job(timed(), submitted=perf_counter())
    events = run(engine, {0: [bad, good]})
    text = "the deadline of 0.25 s passed before there was an answer"
    assert events[bad] == [Failed(text, is_late=True)]
    assert isinstance(events[good][-1], Finished)


def test_a_deadline_that_passes_in_the_encoder_is_told_as_late_and_others_go_on():
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits(window_s=0.0))
    bad, good = late_job(timed("ab"), -20.0), Job(make_request("abc", DENSE, max_tokens=3))
    for job in (bad, good):
        engine.add(job)
    assert engine.turn() == []
    assert engine.running == 2
    object.__setattr__(bad, "submitted", bad.submitted - 30.0)
    ((job, event),) = engine.turn()
    assert job is bad
    assert event.is_late
    events = []
    while engine.running:
        events += [event for job, event in engine.turn() if job is good]
    assert pieces(events) == pieces(alone(MODELS[DENSE], good.request))


def test_a_deadline_that_passes_after_the_first_token_ends_the_text_as_it_is():
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits(window_s=0.0))
    request = timed("abc", max_tokens=50, ignore_eos=True, seed=1, temperature=1.0, stop=("\x01",))
    job, other = late_job(request, -20.0), Job(make_request("xy", DENSE, max_tokens=50, seed=2))
    events = {job: [], other: []}
    for one in events:
        engine.add(one)
    turn = 0
    while engine.running or len(engine.scheduler):
        turn += 1
        if turn == 12:
            object.__setattr__(job, "submitted", job.submitted - 30.0)
        for one, event in engine.turn():
            events[one].append(event)
    end = events[job][-1]
    assert (end.reason, end.stop_reason) == ("length", "timeout")
    assert 1 < end.completion_tokens < 50
    tokens = [token for piece in pieces(events[job]) for token in piece.token_ids]
    whole = [token for piece in pieces(alone(MODELS[DENSE], request)) for token in piece.token_ids]
    assert tokens == whole[: len(tokens)]
    assert pieces(events[other]) == pieces(alone(MODELS[DENSE], other.request))


# --- who is whose


def test_a_flood_of_long_texts_keeps_a_short_one_waiting_for_a_row_to_end_and_no_longer():
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits(max_rows=2, window_s=0.0))
    flood = [
        Job(replace(make_request("a" * 60, DENSE, max_tokens=20, ignore_eos=True), key="flood"))
        for _ in range(30)
    ]
    for job in flood[:15]:
        engine.add(job)
    ended, waited, short = [], None, None
    for turn in range(90):
        if turn == 5:
            short = Job(replace(make_request("b", DENSE, max_tokens=2), key="somebody"))
            engine.add(short)
        if turn % 4 == 0 and turn // 4 < 15:  # it never stops to ask for more
            engine.add(flood[15 + turn // 4])
        for job, event in engine.turn():
            if job is short and waited is None:
                waited = turn
            if isinstance(event, Finished):
                ended.append(job)
        if short in ended:
            break
    assert ended.index(short) <= 3  # the two that ran, and one that had waited as long
    assert waited <= 5 + 2 * 20 + 4


def test_keys_and_priorities_decide_who_goes_first():
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits(max_rows=1, window_s=0.0))
    requests = [
        replace(make_request("x", DENSE, name=name, max_tokens=1), key=key, priority=priority)
        for name, key, priority in (
            ("a0", "a", 0),
            ("a1", "a", 0),
            ("a2", "a", 0),
            ("b0", "b", 0),
            ("later", "b", -1),
            ("urgent", "a", 1),
        )
    ]
    for request in requests:
        engine.add(Job(request))
    ended = []
    while engine.running or len(engine.scheduler):
        ended += [
            job.request.request_id for job, event in engine.turn() if isinstance(event, Finished)
        ]
    assert ended[0] == "urgent"
    assert ended[-1] == "later"
    assert ended.index("b0") < ended.index("a1")


# --- what errors mean for others


def test_after_want_of_memory_fewer_rows_decode_together_and_slowly_more_again():
    model = tiny_model(DENSE, seed=5).double()
    step, most = model.step, [4]

    def hungry(tokens, cache):
        if len(tokens) > most[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step(tokens, cache)

    model.step = hungry
    engine = Engine(model, TOKENIZER, Limits(max_rows=8, window_s=0.0))
    jobs = [
        Job(make_request("abc", DENSE, max_tokens=30, seed=i, ignore_eos=True)) for i in range(16)
    ]
    for job in jobs:
        engine.add(job)
    seen, ends = [], 0
    while engine.running or len(engine.scheduler):
        ends += sum(isinstance(event, Finished) for _, event in engine.turn())
        seen.append(engine.scheduler.max_rows)
    assert ends == 16
    assert min(seen) < 8
    most[0] = 8
    lowest = engine.scheduler.max_rows
    for _ in range(GOOD_TURNS):
        engine.turn()
    assert engine.scheduler.max_rows == lowest + 1
    for _ in range(GOOD_TURNS * 9):
        engine.turn()
    assert engine.scheduler.max_rows == 8


def test_rows_that_fit_by_halves_go_on_by_halves_and_nothing_is_halved_again():
    model = tiny_model(DENSE, seed=5).double()
    step, most = model.step, [99]

    def hungry(tokens, cache):
        if len(tokens) > most[0]:
            raise MemoryError
        return step(tokens, cache)

    model.step = hungry
    engine = Engine(model, TOKENIZER, Limits(max_rows=8, window_s=0.0))
    texts = ["abc" * i for i in range(1, 9)]
    jobs = [Job(make_request(text, DENSE, max_tokens=30, ignore_eos=True)) for text in texts]
    events = {job: [] for job in jobs}
    for job in jobs:
        engine.add(job)
    turns = 0
    while engine.running or len(engine.scheduler):
        for job, event in engine.turn():
            events[job].append(event)
        turns += 1
        if turns == 9:  # all decode
            most[0] = 4
    assert engine.scheduler.max_rows == 4
    for job in jobs:
        assert pieces(events[job]) == pieces(alone(MODELS[DENSE], job.request))


def test_after_want_of_memory_in_a_sweep_it_takes_fewer_tokens_and_slowly_more_again():
    sizes = []

    class Hungry(Spoiling):
        def encode_layers(self, tokens, *args):
            sizes.append(tokens.numel())
            if len(tokens) > 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return (yield from self._model.encode_layers(tokens, *args))

    limits = Limits(max_rows=8, max_sweep_tokens=100, window_s=0.0)
    engine = Engine(Hungry(MODELS[DENSE]), TOKENIZER, limits)
    texts = ("abcd", "efgh", "ijkl", "mnop", "qrst", "uvwx", "yzab", "cdef")
    jobs = [Job(make_request(text, DENSE, max_tokens=2)) for text in texts]
    events = run(engine, {0: jobs[:4], 3: jobs[4:]})
    for job in jobs:
        assert pieces(events[job]) == pieces(alone(MODELS[DENSE], job.request))
    most = engine.scheduler.max_sweep_tokens
    assert (sizes[0], most) == (max(sizes), sizes[0] // 2)
    assert all(size <= most for size in sizes[1:])  # one by one, and then by twos
    assert engine.scheduler.max_rows == 8
    for _ in range(GOOD_TURNS):
        engine.turn()
    assert most < engine.scheduler.max_sweep_tokens < 100
    for _ in range(GOOD_TURNS * 8):
        engine.turn()
    assert engine.scheduler.max_sweep_tokens == 100


def test_after_want_of_memory_for_one_text_fewer_rows_decode():
    class Hungry(Spoiling):
        def encode_layers(self, *args):
            raise MemoryError
            yield

    engine = Engine(Hungry(MODELS[DENSE]), TOKENIZER, Limits(max_rows=8, window_s=0.0))
    job = Job(make_request("abc", DENSE))
    assert run(engine, {0: [job]})[job] == [
        Failed("the engine could not read the prompt: MemoryError")
    ]
    assert (engine.scheduler.max_rows, engine.scheduler.max_sweep_tokens) == (4, 8192)


def test_layers_of_a_sweep_go_together_while_a_step_takes_longer():
    model = tiny_model(replace(DENSE, num_encoder_layers=12), seed=5)
    turns, turns_of_layers = [], []

    class Counting(Spoiling):
        def encode_layers(self, *args):
            for _ in (inner := self._model.encode_layers(*args)):
                turns_of_layers.append(len(turns))
                yield
            assert inner.gi_frame is None
            return self._model.encode(*args)

        def step(self, *args):
            size = torch.randn(1500, 1500)
            for _ in range(4):
                size = size @ size  # longer than twelve such layers take
            return self._model.step(*args)

    engine = Engine(Counting(model), TOKENIZER, Limits(window_s=0.0))
    for text, num_layers in (("abc", 12), ("xyz", 24)):
        engine.add(Job(make_request(text, DENSE, max_tokens=60, ignore_eos=True)))
        while len(turns_of_layers) < num_layers or engine.work.steps < 2:
            engine.turn()
            turns.append(True)
    assert len(set(turns_of_layers[:12])) == 12  # nobody decodes: a turn for each
    assert len(set(turns_of_layers[12:])) < 12


@pytest.mark.parametrize("place", ["encoder-1", "decoder-1"])
def test_a_device_that_is_lost_is_no_matter_of_one_request(place):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    model = broken_model(lambda layer, wanted: error if layer == place else None)
    engine = Engine(model, TOKENIZER, Limits(window_s=0.0))
    engine.add(Job(make_request()))
    with pytest.raises(DeviceLost, match="the device has failed: CUDA error"):
        run(engine, {0: []})


class StumblingTokenizer:
    """Cannot tell the bytes of a token, or its sentinels, while it is told so."""

    def __init__(self, name):
        self.name, self.is_broken = name, True

    def __getattr__(self, name):
        if name == self.name and self.is_broken:
            raise TokenizerError("the vocabulary is damaged")
        return getattr(TOKENIZER, name)


def test_a_tokenizer_that_fails_at_the_start_fails_its_request_only():
    tokenizer = StumblingTokenizer("sentinel_id")
    engine = Engine(MODELS[DENSE], tokenizer, Limits(window_s=0.0))
    (events,) = run(engine, {0: [Job(make_request(config=DENSE))]}).values()
    assert events == [Failed("the engine could not go on: the vocabulary is damaged")]
    tokenizer.is_broken = False
    (events,) = run(engine, {0: [Job(make_request(config=DENSE))]}).values()
    assert isinstance(events[-1], Finished)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tokenizer_that_fails_on_the_way_fails_its_rows_only(temperature):
    tokenizer = StumblingTokenizer("spell")
    engine = Engine(MODELS[DENSE], tokenizer, Limits(window_s=0.0))
    request = make_request(config=DENSE, temperature=temperature, seed=1, ignore_eos=True)
    (events,) = run(engine, {0: [Job(request)]}).values()
    assert events == [Failed("the engine could not go on: the vocabulary is damaged")]
    tokenizer.is_broken = False
    (events,) = run(engine, {0: [Job(request)]}).values()
    assert pieces(events) == pieces(alone(MODELS[DENSE], request))
