"""What scores, vectors and searches hold of their texts is within the bytes of the caches."""

from dataclasses import replace

import pytest
import torch

from engine.batch import MAX_PREFIX
from engine.beam import _start
from engine.demands import held_bytes, search_bytes
from engine.engine import Engine
from engine.footprint import Workload, cache_bytes
from engine.generation import Generation
from engine.request import Finished, Pooling
from engine.room import TEXTS_SHARE
from engine.scheduler import Limits
from engine.sources import gather
from tests.engine_jobs import TOKENIZER, Job, make_request
from tests.test_engine_tasks import assert_as_library, score_of, search_for, vector_of
from tests.tiny import DENSE, LLAMA, MIXTRAL, MOE, tiny_model

MODELS = {config: tiny_model(config, seed=5).double() for config in (MOE, DENSE, LLAMA, MIXTRAL)}
LONG = "a long text that is read once and held until the last of its choices is scored"


def rows_of(config, number, **lengths):
    """Bytes of the caches of some rows."""
    return cache_bytes(config, torch.float64, Workload(rows=number, **lengths))


def encoded(model, request):
    with torch.no_grad():
        return model.encode(*gather(model, [request.source]))


@pytest.mark.parametrize("config", [DENSE, LLAMA, MIXTRAL])
@pytest.mark.parametrize("text", ["x y", LONG])
def test_held_are_the_bytes_of_what_was_made_of_the_text(config, text):
    model = MODELS[config]
    asked = score_of(text, config=config)
    assert held_bytes(asked, model) == encoded(model, asked).nbytes
    assert held_bytes(make_request(text, config), model) == 0
    assert held_bytes(search_for(text, config=config), model) == 0
    vector = replace(asked, task=Pooling())
    assert held_bytes(vector, model) == held_bytes(asked, model)


@pytest.mark.parametrize("config", [DENSE, LLAMA])
@pytest.mark.parametrize("beams", [1, 4])
def test_a_search_takes_no_more_than_is_counted(config, beams):
    model, request = MODELS[config], search_for(LONG, beams, config, max_tokens=9)
    encoded_1SD = encoded(model, request)
    with torch.no_grad():
        cache = _start(model, Generation(request, TOKENIZER, config), encoded_1SD, beams)
    tensors = (*cache.self_keys, *cache.self_values, *cache.cross_keys, *cache.cross_values)
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    taken = sum(storages.values()) + encoded_1SD.nbytes
    counted = search_bytes(request, model)
    assert taken <= counted
    if config.is_decoder_only:  # else what the beams share is counted for each
        length = request.source.num_positions
        first = rows_of(config, 1, source_tokens=length, target_tokens=9)  # gone by now
        slack = rows_of(config, beams + 1, source_tokens=8, target_tokens=2 * MAX_PREFIX)
        assert counted <= taken + first + slack


def turns(engine, jobs):
    """Take turns until all have ended; yields after each, with what was told."""
    for job in jobs:
        engine.check(job.request)
        engine.add(job)
    while engine.running or len(engine.scheduler):
        yield engine.turn()


@pytest.mark.parametrize("config", [DENSE, LLAMA, MIXTRAL])
@pytest.mark.parametrize("num_rows", [2, 6])
def test_a_burst_of_scores_stays_within_the_caches(config, num_rows):
    """Many long texts, each with many choices of which some are scored at a time."""
    model = MODELS[config]
    limit = rows_of(config, num_rows, source_tokens=90, target_tokens=30)
    limits = Limits(window_s=0.0, cache_bytes=limit, max_sweep_tokens=200, max_rows=16)
    engine = Engine(model, TOKENIZER, limits)
    choices = ["xyz"[: 1 + i % 3] for i in range(9)]
    jobs = [Job(score_of(f"{i} {LONG}", choices, config, name=str(i))) for i in range(12)]
    if num_rows > 2:
        jobs[5] = Job(search_for(LONG, 2, config, max_tokens=4, ignore_eos=True))
    jobs += [Job(make_request("b", config, name=f"row {i}", max_tokens=6)) for i in range(4)]
    told = {job: [] for job in jobs}
    most_held = 0
    for outcome in turns(engine, jobs):
        for job, event in outcome:
            told[job].append(event)
        courses, batch = engine._courses, engine._batch
        if len(courses) + len(batch) > 1:
            assert courses.nbytes + batch.nbytes <= limit
        most_held = max(most_held, courses.held_bytes)
    assert 0 < most_held <= limit
    assert (engine._courses.nbytes, engine._courses.held_bytes) == (0, 0)
    for job in jobs:
        if job.request.task is not None:
            assert_as_library(model, job.request, told[job], abs=1e-6)
        else:
            assert isinstance(told[job][-1], Finished)


@pytest.mark.parametrize("config", [DENSE, LLAMA])
def test_scores_come_and_go_beside_rows_that_decode_on(config):
    model = MODELS[config]
    limit = rows_of(config, 16, source_tokens=30, target_tokens=40)
    engine = Engine(model, TOKENIZER, Limits(window_s=0.0, cache_bytes=limit, max_rows=8))
    first = Job(score_of("abc", config=config, name="first"))
    for _ in turns(engine, [first]):
        pass
    row = Job(make_request("b", config, name="row", max_tokens=30, ignore_eos=True))
    scores = [Job(score_of("c" * i, config=config, name=str(i))) for i in range(2, 7)]
    ended = []
    for outcome in turns(engine, [row, *scores]):
        ended += [job for job, event in outcome if isinstance(event, Finished)]
    assert ended[-1] is row


def test_what_is_set_aside_is_a_share_and_nothing_for_who_never_scores():
    limit = rows_of(LLAMA, 8, source_tokens=60, target_tokens=12)

    def most_rows(jobs):
        engine = Engine(MODELS[LLAMA], TOKENIZER, Limits(window_s=0.0, cache_bytes=limit))
        long = {"max_tokens": 8, "ignore_eos": True}
        rows = [Job(make_request("a" * 60, LLAMA, name=str(i), **long)) for i in range(8)]
        most = 0
        for _ in turns(engine, [*jobs, *rows]):
            most = max(most, len(engine._batch))
        assert engine._room._texts_bytes == (int(limit * TEXTS_SHARE) if jobs else 0)
        return most

    few = most_rows([Job(score_of("abc", config=LLAMA))])
    assert few < most_rows([])
    assert few >= 4


@pytest.mark.parametrize("config", [DENSE, LLAMA])
def test_one_score_alone_may_hold_more_than_there_is(config):
    """As a row may: the text fits the model, and nobody is beside it."""
    model = MODELS[config]
    engine = Engine(model, TOKENIZER, Limits(window_s=0.0, cache_bytes=1000))
    jobs = [Job(score_of(LONG[:60], config=config, name=str(i))) for i in range(3)]
    told = {job: [] for job in jobs}
    for outcome in turns(engine, jobs):
        for job, event in outcome:
            told[job].append(event)
        assert engine.running <= 1
    for job in jobs:
        assert_as_library(model, job.request, told[job], abs=1e-6)


def test_vectors_are_counted_too():
    model = MODELS[DENSE]
    jobs = [Job(vector_of("v" * i, DENSE, name=str(i))) for i in range(1, 9)]
    limit = 4 * held_bytes(jobs[-1].request, model)
    engine = Engine(model, TOKENIZER, Limits(window_s=0.0, cache_bytes=limit))
    for _ in turns(engine, jobs):
        assert engine._courses.nbytes <= limit
