"""How much is done together: steps and their rows, sweeps and their texts."""

import asyncio

from engine.request import Request, SamplingParams
from engine.stats import WorkStats
from engine.worker import LoadedModel, Worker
from tests.tiny import byte_tokenizer, tiny_model
from tests.waiting import wait_for


def test_steps_and_sweeps_are_added_up():
    work = WorkStats().with_sweep(3, 40).with_step(3).with_step(2).with_step(0)
    assert work == WorkStats(steps=2, rows=5, sweeps=1, texts=3, tokens=40)


def test_a_worker_counts_what_it_does_together():
    worker = Worker("tiny", lambda _: LoadedModel(tiny_model(), byte_tokenizer()))

    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        texts = [(5, 6, 7), (5, 6, 7), (8, 9, 10, 11)]
        requests = [
            Request(request_id=str(i), encoder_ids=ids, params=params)
            for i, ids in enumerate(texts)
        ]
        streams = [worker.submit(request) for request in requests]
        for stream in streams:
            async for _ in stream:
                pass

    asyncio.run(asyncio.wait_for(scenario(), 300))
    work = worker.stats().work
    assert worker.drain(60)
    assert work.rows == 12  # a row each for five tokens, of which the first needs no step
    assert 4 <= work.steps <= 12
    assert 1 <= work.sweeps <= 3
    assert work.sweeps <= work.texts <= 3
    assert 7 <= work.tokens <= 10
