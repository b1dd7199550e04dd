"""Scores, vectors and searches in the engine are those of the library, however they come and go."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters import Adapter, Slots
from engine.beam import answer_text, beam_search
from engine.engine import Engine
from engine.errors import CheckpointError, RequestError
from engine.generation import Generation
from engine.request import (
    BeamParams,
    Continuations,
    Embedded,
    Failed,
    Finished,
    Piece,
    Pooling,
    SamplingParams,
    Scored,
    Searched,
)
from engine.scheduler import Limits
from engine.scoring import Question, score
from engine.sources import gather
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
from tests.tiny import DENSE, MOE, tiny_model

MODELS = {config: tiny_model(config, seed=5).double() for config in (MOE, DENSE)}
FLOATS = {config: tiny_model(config, seed=5) for config in (MOE, DENSE)}


def search_for(text="hello", beams=3, config=MOE, name="r", **params):
    task = BeamParams(num_beams=beams, length_penalty=0.6)
    return replace(make_request(text, config, name=name, **params), task=task)


def score_of(text="hello", choices=("x", "yy"), config=MOE, top=0, name="r"):
    ids = tuple(tuple(TOKENIZER.encode(choice)) for choice in choices)
    return replace(make_request(text, config, name=name), task=Continuations(choices=ids, top=top))


def vector_of(text="hello", config=MOE, name="r", adapter=None):
    return replace(make_request(text, config, name=name), task=Pooling(), adapter=adapter)


def make_adapter(slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompt_PD = torch.randn(slots.num_vectors, DENSE.d_model, generator=generator).double()
    return Adapter(name="a", version="1", prompt_PD=prompt_PD, slots=slots)


def expected_of(model, request):
    """The events of a request by the functions of the library."""
    task = request.task
    if isinstance(task, BeamParams):
        found = beam_search(model, TOKENIZER, request, task)
        return [(one.token_ids, one.score) for one in found]
    if isinstance(task, Continuations):
        (scores,) = score(model, TOKENIZER, [Question(request, task.choices, task.top)])
        return scores
    source = gather(model, [request.source])
    with torch.no_grad():
        encoded_SD = model.encode(*source)[0]
    vectors = set(request.source.vector_positions())
    text = [row for i, row in enumerate(encoded_SD.float()) if i not in vectors]
    return torch.stack(text).mean(0)


def assert_as_library(model, request, events, **tolerance):
    outcome, end = events
    assert isinstance(end, Finished)
    expected = expected_of(model, request)
    if isinstance(outcome, Searched):
        assert [(one.token_ids) for one in outcome.answers] == [ids for ids, _ in expected]
        scores = [one.score for one in outcome.answers]
        assert scores == pytest.approx([found for _, found in expected], **tolerance)
    elif isinstance(outcome, Scored):
        for got, wanted in zip(outcome.scores, expected, strict=True):
            assert got.logprobs == pytest.approx(wanted.logprobs, **tolerance)
            assert got.is_greedy == wanted.is_greedy
    else:
        assert isinstance(outcome, Embedded)
        torch.testing.assert_close(torch.tensor(outcome.vector), expected)


@pytest.mark.parametrize("config", [MOE, DENSE])
def test_alone_each_task_equals_the_library_bit_for_bit(config):
    model = FLOATS[config]
    for request in (
        search_for(config=config, beams=4, max_tokens=9),
        search_for(config=config, beams=1, max_tokens=3),
        score_of(choices=("x", "yyy", "a longer one"), config=config, top=3),
    ):
        job = Job(request)
        events = run(Engine(model, TOKENIZER, Limits()), {0: [job]})
        assert_as_library(model, request, events[job], abs=0, rel=0)
    job = Job(vector_of(config=config))
    ((vector, end),) = run(Engine(model, TOKENIZER, Limits()), {0: [job]}).values()
    assert vector.vector == tuple(expected_of(model, job.request).tolist())
    assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("stop", 6, 0)


def test_a_search_tells_texts_reasons_and_all_tokens():
    model = FLOATS[MOE]
    request = search_for(beams=3, max_tokens=7, stop=("z",))
    ((searched, end),) = run(Engine(model, TOKENIZER, Limits()), {0: [Job(request)]}).values()
    found = beam_search(model, TOKENIZER, request, request.task)
    texts = [answer_text(request, TOKENIZER, MOE, one) for one in found]
    assert [answer.text for answer in searched.answers] == texts
    closing = Generation(request, TOKENIZER, MOE).closing
    for answer, one in zip(searched.answers, found, strict=True):
        whole = answer_text(replace(request, params=SamplingParams()), TOKENIZER, MOE, one)
        if "z" in whole:
            assert (answer.reason, answer.stop_reason) == ("stop", "z")
        else:
            ends_itself = answer.token_ids[-1] in closing
            assert answer.reason == ("stop" if ends_itself else "length")
    assert (end.reason, end.stop_reason) == (
        searched.answers[0].reason,
        searched.answers[0].stop_reason,
    )
    assert end.completion_tokens == sum(len(answer.token_ids) for answer in searched.answers)


def test_no_answer_of_a_search_is_shorter_than_it_may_be():
    model = tiny_model(MOE, seed=5)
    with torch.no_grad():
        model.lm_head.weight[1] *= 9  # ends early if it may
    short = beam_search(model, TOKENIZER, search_for(max_tokens=9), BeamParams(num_beams=4))
    request = search_for(max_tokens=9, min_tokens=3)
    long = beam_search(model, TOKENIZER, request, BeamParams(num_beams=4))
    assert min(len(one.token_ids) for one in short) < 4
    # the end mark is a token as well
    assert {len(one.token_ids) for one in long} - {9}
    assert min(len(one.token_ids) for one in long) >= 4


def test_the_likeliest_are_of_the_same_numbers_as_the_scores():
    model = FLOATS[MOE]
    choices = ("x" * 70, "yy")  # more positions than are looked at together
    request = score_of(choices=choices, top=5)
    ((scored, _),) = run(Engine(model, TOKENIZER, Limits()), {0: [Job(request)]}).values()
    for found, choice in zip(scored.scores, request.task.choices, strict=True):
        assert [token.token_id for token in found.tokens] == list(choice)
        assert tuple(token.logprob for token in found.tokens) == found.logprobs
        for token in found.tokens:
            values = [value for _, value in token.top]
            assert len(values) == 5
            assert values == sorted(values, reverse=True)
            assert token.logprob <= values[0]
            assert dict(token.top).get(token.token_id, token.logprob) == token.logprob


@pytest.mark.parametrize(
    "slots", [Slots(front=3), Slots(front=1, middle=2, back=1, middle_after=2)]
)
def test_vectors_of_an_adapter_are_not_pooled_but_read(slots):
    model = MODELS[DENSE]
    request = vector_of(config=DENSE, adapter=make_adapter(slots))
    jobs = [Job(request), Job(vector_of(config=DENSE))]
    first, second = run(Engine(model, TOKENIZER, Limits()), {0: jobs}).values()
    assert_as_library(model, request, first)
    assert first[0] != second[0]


TASKS = st.one_of(
    st.tuples(st.just("search"), st.integers(1, 4)),
    st.tuples(st.just("score"), st.integers(1, 4)),
    st.tuples(st.just("vector"), st.just(0)),
    st.tuples(st.just("text"), st.just(0)),
)
MIXES = st.lists(
    st.tuples(
        TASKS,
        st.text("abc <", min_size=1, max_size=20),
        st.integers(1, 6),
        st.integers(0, 8),
        st.one_of(st.none(), st.none(), st.integers(0, 10)),
        st.sampled_from([None, "s", "t"]),
        st.sampled_from(["", "k1", "k2"]),
        st.integers(-1, 1),
        st.sampled_from([(), (65,), (70, 71, 72)]),
    ),
    min_size=1,
    max_size=7,
)


def make_mixed(number, config, plan):
    (kind, count), text, length, _, _, salt, key, priority, given = plan
    if kind == "search":
        request = search_for(text, count, config, str(number), max_tokens=length)
    elif kind == "score":
        choices = ["xyz"[: 1 + i % 3] * (1 + i) for i in range(count)]
        request = score_of(text, choices, config, top=i if (i := number % 3) else 0)
    elif kind == "vector":
        request = vector_of(text, config)
    else:
        request = make_request(
            text, config, max_tokens=length, temperature=1.3, seed=number, min_p=0.05
        )
    return replace(
        request,
        request_id=str(number),
        salt=salt,
        key=key,
        priority=priority,
        decoder_ids=given if kind != "vector" else (),
    )


@settings(max_examples=200, deadline=None)
@given(
    plans=MIXES,
    max_rows=st.integers(1, 5),
    sweep=st.integers(1, 60),
    config=st.sampled_from([MOE, DENSE]),
    cache_bytes=st.sampled_from([None, 40_000, 300_000]),
)
def test_any_mix_equals_the_library(plans, max_rows, sweep, config, cache_bytes):
    model = MODELS[config]
    limits = Limits(
        max_rows=max_rows,
        max_sweep_tokens=sweep,
        window_s=0.0,
        cache_bytes=cache_bytes,
        encoder_cache_bytes=20_000,
    )
    engine = Engine(model, TOKENIZER, limits)
    jobs, cancel_at, arrivals = [], {}, {}
    for number, plan in enumerate(plans):
        flags = []
        request = make_mixed(number, config, plan)
        job = Job(request, is_cancelled=lambda flags=flags: bool(flags))
        jobs.append((job, plan[4]))
        arrivals.setdefault(plan[3], []).append(job)
        if plan[4] is not None:
            cancel_at[plan[4]] = flags
    events = run(engine, arrivals, cancel_at)
    for job, cancel in jobs:
        got, request = events[job], job.request
        if cancel is not None and not (got and isinstance(got[-1], Finished)):
            assert not [event for event in got if not isinstance(event, Piece)]
        elif request.task is None:
            expected = alone(model, request)
            assert pieces(got) == pieces(expected)
            assert without_times(got[-1]) == without_times(expected[-1])
        else:
            assert_as_library(model, request, got, abs=1e-6)
    assert (engine.running, len(engine._jobs)) == (0, 0)
    assert engine._courses.nbytes == 0


def test_a_long_score_goes_on_a_pass_at_a_time_between_the_tokens_of_a_row():
    model = MODELS[DENSE]
    engine = Engine(model, TOKENIZER, Limits(max_sweep_tokens=24, window_s=0.0))
    row = Job(make_request("abc", DENSE, max_tokens=40, ignore_eos=True, temperature=1.0, seed=1))
    scores = [Job(score_of("hello", ["x"] * 9, DENSE)) for _ in range(2)]
    for job in (row, *scores):
        engine.add(job)
    passes, decode = [], model.decode
    model.decode = lambda *args: passes.append(len(args[0])) or decode(*args)
    try:
        while engine.running or len(engine.scheduler):
            before = len(passes)
            told = engine.turn()
            assert len(passes) - before <= 1
            if len(passes) > before:
                assert any(job is row for job, _ in told)
    finally:
        del model.decode
    assert sum(passes) == 18
    assert len(passes) == 6  # three rows of eight positions at a time, of each


def test_beams_take_rows_and_bytes_of_the_caches():
    model = MODELS[DENSE]
    searching = Job(search_for("abc", 3, DENSE, max_tokens=20, ignore_eos=True))
    rows = [
        Job(make_request("abc", DENSE, max_tokens=20, ignore_eos=True, seed=i)) for i in range(6)
    ]
    limit = 400_000
    engine = Engine(model, TOKENIZER, Limits(max_rows=5, window_s=0.0, cache_bytes=limit))
    for job in (rows[0], searching, *rows[1:]):
        engine.add(job)
    most = beside = 0
    ended = []
    while engine.running or len(engine.scheduler):
        ended += [job for job, event in engine.turn() if isinstance(event, Finished)]
        most = max(most, len(engine._batch) + engine._courses.num_rows)
        beside = max(beside, min(len(engine._batch), len(engine._courses)))
        assert engine._batch.nbytes + engine._courses.nbytes <= limit
    assert (most, beside, len(ended)) == (5, 1, 7)


@pytest.mark.parametrize("limit", [60_000, 120_000, 200_000])
def test_searches_and_rows_wait_for_each_other_where_caches_are_small(limit):
    model = MODELS[DENSE]
    jobs = []
    for number in range(12):
        make = search_for if number % 3 == 0 else make_request
        jobs.append(Job(make("abc", config=DENSE, max_tokens=3 + number % 5, name=str(number))))
    engine = Engine(model, TOKENIZER, Limits(window_s=0.0, cache_bytes=limit))
    for job in jobs:
        engine.check(job.request)
        engine.add(job)
    ended, together = [], 0
    while engine.running or len(engine.scheduler):
        ended += [job for job, event in engine.turn() if isinstance(event, Finished)]
        together = max(together, engine.running)
        if len(engine._batch) + len(engine._courses) > 1:
            assert engine._batch.nbytes + engine._courses.nbytes <= limit
    assert sorted(ended, key=jobs.index) == jobs
    assert together > 1


def test_a_search_of_more_beams_than_rows_runs_alone():
    model = MODELS[DENSE]
    engine = Engine(model, TOKENIZER, Limits(max_rows=2, window_s=0.0))
    jobs = [Job(search_for("abc", n, DENSE, max_tokens=4)) for n in (1, 4, 2)]
    for job, events in run(engine, {0: jobs}).items():
        assert_as_library(model, job.request, events, abs=1e-6)


def test_a_search_that_can_never_have_its_caches_is_refused():
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits(cache_bytes=10_000))
    with pytest.raises(RequestError, match="a search of 8 beams takes .* there are 10,000"):
        engine.check(search_for("abc", 8, DENSE, max_tokens=50))
    engine.check(make_request("abc", DENSE, max_tokens=50))


@pytest.mark.parametrize("make", [search_for, score_of, vector_of])
def test_a_task_that_nobody_waits_for_leaves_at_once(make):
    engine = Engine(MODELS[MOE], TOKENIZER, Limits(max_sweep_tokens=8, window_s=0.0))
    flags = []
    request = make() if make is vector_of else make(text="ab")
    if make is score_of:
        request = replace(request, task=Continuations(choices=((65,),) * 9))
    job = Job(request, is_cancelled=lambda: bool(flags))
    engine.add(job)
    for _ in range(MOE.num_encoder_layers + 1):
        assert engine.turn() == [] or make is vector_of
    flags.append(True)
    assert engine.turn() == []
    assert (engine.running, engine._courses.nbytes, len(engine._jobs)) == (0, 0, 0)


@pytest.mark.parametrize("make", [search_for, score_of])
def test_an_expert_that_cannot_be_read_fails_the_task_only(make):
    broken_now = []

    def fails(layer, wanted):
        return CheckpointError("cannot be read") if broken_now and layer == "decoder-1" else None

    model = broken_model(fails)
    engine = Engine(model, TOKENIZER, Limits(window_s=0.0))
    bad, row = Job(make()), Job(make_request("abc", max_tokens=6, temperature=1.0, seed=2))
    events = {bad: [], row: []}
    courses_step = engine._courses.step

    def step():
        broken_now.append(True)
        try:
            return courses_step()
        finally:
            broken_now.clear()

    engine._courses.step = step
    for job in events:
        engine.add(job)
    while engine.running or len(engine.scheduler):
        for job, event in engine.turn():
            events[job].append(event)
    assert events[bad] == [Failed("the engine could not go on: cannot be read")]
    assert pieces(events[row]) == pieces(alone(MODELS[MOE], row.request))


class Spoiling:
    """A model that spoils what it has encoded of some texts, or its scores."""

    def __init__(self, model, is_spoiled=lambda length: False, logits=None):
        self._model, self._is_spoiled = model, is_spoiled
        self._logits = logits

    def __getattr__(self, name):
        return getattr(self._model, name)

    def encode_layers(self, *args):
        encoded_BSD = (yield from self._model.encode_layers(*args)).clone()
        for row, ids in enumerate(args[0]):
            if self._is_spoiled(int((ids != 0).sum())):
                encoded_BSD[row] = torch.nan
        return encoded_BSD

    def logits(self, hidden):
        return (self._logits or (lambda scores: scores))(self._model.logits(hidden))


@pytest.mark.parametrize("make", [search_for, score_of, vector_of])
def test_numbers_that_are_not_finite_fail_the_task_only(make):
    model = MODELS[MOE]
    jobs = [Job(make(text=text)) for text in ("abc", "spoiled", "de")]
    engine = Engine(Spoiling(model, lambda length: length == 8), TOKENIZER, Limits())
    events = run(engine, {0: jobs})
    ((failed,),) = [events[jobs[1]]]
    assert isinstance(failed, Failed)
    assert "not finite" in failed.message
    for job in (jobs[0], jobs[2]):
        assert_as_library(model, job.request, events[job], abs=1e-6)


def test_choices_for_which_there_is_no_memory_together_are_scored_one_by_one():
    model = tiny_model(MOE, seed=5).double()
    decode, sizes = model.decode, []

    def hungry(tokens_BT, *args):
        sizes.append(len(tokens_BT))
        if len(tokens_BT) > 1:
            raise MemoryError
        return decode(tokens_BT, *args)

    model.decode = hungry
    request = replace(make_request("ab"), task=Continuations(choices=((65,), (66, 67), (68,))))
    job = Job(request)
    events = run(Engine(model, TOKENIZER, Limits()), {0: [job]})
    assert sizes == [3, 1, 1, 1]
    assert_as_library(MODELS[MOE], request, events[job], abs=1e-9)


def test_an_error_of_torch_fails_the_task_by_its_name_only():
    def logits(_):
        raise RuntimeError("secret")

    job = Job(search_for())
    events = run(Engine(Spoiling(MODELS[MOE], logits=logits), TOKENIZER, Limits()), {0: [job]})
    assert events[job] == [Failed("the engine could not go on: RuntimeError")]


def test_a_task_is_late_as_a_whole():
    engine = Engine(MODELS[MOE], TOKENIZER, Limits(window_s=0.0))
    jobs = [late_job(replace(make(), deadline_s=9.0), -0.5) for make in (search_for, score_of)]
    long = replace(search_for(max_tokens=64, ignore_eos=True), deadline_s=9.0)
    jobs[0] = late_job(long, -0.5)
    for job in jobs:
        engine.add(job)
    ends = {}
    while engine.running or len(engine.scheduler):
        ends |= {job: event for job, event in engine.turn() if isinstance(event, Failed)}
        for job in jobs:
            object.__setattr__(job, "submitted", job.submitted - 0.2)
    assert ends[jobs[0]].is_late
    assert "the deadline of 9 s passed" in ends[jobs[0]].message
    assert engine._courses.num_rows == 0


@pytest.mark.parametrize(
    ("change", "message", "field"),
    [
        ({"choices": ()}, "at least one choice", "choices"),
        ({"choices": ((65,), ())}, "no empty one", "choices"),
        ({"choices": ((65,), (9999,))}, "token id 9999 is outside", "choices"),
        ({"choices": ((-1,),)}, "token id -1 is outside", "choices"),
        ({"choices": ((65,) * 2000,)}, "a choice has 2000 tokens", "choices"),
        ({"choices": ((65,),), "top": 21}, "top is 21; allowed: 0 to 20", "logprobs"),
        ({"choices": ((65,),), "top": -1}, "top is -1", "logprobs"),
    ],
)
def test_impossible_tasks_are_refused(change, message, field):
    engine = Engine(MODELS[MOE], TOKENIZER, Limits())
    request = replace(make_request(), task=Continuations(**change))
    with pytest.raises(RequestError, match=message) as caught:
        engine.check(request)
    assert caught.value.field == field


def test_a_search_that_fills_blanks_is_refused():
    engine = Engine(MODELS[MOE], TOKENIZER, Limits())
    request = replace(make_request("a <span>", fill=True), task=BeamParams())
    with pytest.raises(RequestError, match="does not fill blanks"):
        engine.check(request)
