"""A thousand adapters in one process, and what many in a batch cost."""

from dataclasses import replace

import pytest
import torch

from engine.adapter_table import AdapterTable
from engine.bench_engine_adapters import NUM_VECTORS, make_adapters, measure_adapters
from engine.bench_engine_contenders import Text
from engine.engine import Engine
from engine.model.transformer import set_invariant
from engine.prompt import build_request
from engine.request import Failed, SamplingParams
from engine.scheduler import Limits
from tests.tiny import DENSE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
CONFIG = replace(DENSE, max_positions=256)  # room for 100 vectors
NUM_ADAPTERS, NUM_ROWS = 1000, 64


class Job:
    """A request as the engine sees it."""

    submitted = 0.0

    def __init__(self, request):
        self.request = request
        self.pieces = []

    def is_cancelled(self):
        return False


def run(model, requests):
    engine = Engine(model, TOKENIZER, Limits(max_rows=NUM_ROWS, window_s=0.0))
    jobs = [Job(request) for request in requests]
    for job in jobs:
        engine.add(job)
    while engine.running or engine.num_waiting():
        for job, event in engine.turn():
            assert not isinstance(event, Failed), event
            job.pieces.append(getattr(event, "logprobs", None))
    return [job.pieces for job in jobs]


@pytest.mark.slow
def test_a_thousand_adapters_and_64_of_them_in_one_batch():
    model = tiny_model(CONFIG)
    set_invariant(model)
    made = make_adapters(model, NUM_ADAPTERS)
    nbytes = NUM_ADAPTERS * NUM_VECTORS * CONFIG.d_model * 4
    table = AdapterTable(nbytes)
    for adapter in made:
        table.add(adapter)
    assert table.nbytes == nbytes
    assert len(table.known()) == NUM_ADAPTERS
    params = SamplingParams(max_tokens=4, logprobs=2, ignore_eos=True)
    requests = [
        build_request(
            f"text {number}",
            TOKENIZER,
            CONFIG,
            params,
            str(number),
            adapter=table.resolve(f"adapter-{number * 15}"),
        )
        for number in range(NUM_ROWS)
    ]
    together = run(model, requests)
    assert len({str(pieces) for pieces in together}) == NUM_ROWS
    for request, expected in zip(requests, together, strict=True):
        assert run(model, [request]) == [expected]
    assert table.nbytes == nbytes


def test_many_adapters_are_measured_against_one():
    model = tiny_model(replace(CONFIG, continuation_sentinel=None))
    texts = [Text((5, 6, 7 + number), 3) for number in range(4)]
    found = measure_adapters(model, texts, repeats=3)
    assert (found["rows"], found["vectors"]) == (4, NUM_VECTORS)
    assert found["one"]["median"] > 0
    ratio = found["each_its_own"]["median"] / found["one"]["median"]
    assert found["each_its_own_over_one"] == pytest.approx(ratio, rel=0.01, abs=0.001)


def test_adapters_are_random_and_of_the_model():
    model = tiny_model(CONFIG).bfloat16()
    one, other = make_adapters(model, 2)
    assert one.prompt_PD.dtype == torch.bfloat16
    assert one.prompt_PD.shape == (NUM_VECTORS, CONFIG.d_model)
    assert not torch.equal(one.prompt_PD, other.prompt_PD)
