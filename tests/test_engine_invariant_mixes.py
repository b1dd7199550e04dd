"""In invariant mode a request gives the same bits alone and in any mix of requests.

Requests are of a fixed set, so that each is carried out alone once and not once for each mix.
"""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters import Adapter, Slots
from engine.engine import Engine
from engine.generation import generate
from engine.model.layers import Linear
from engine.model.packed import can_pack, pack_linears
from engine.model.transformer import set_invariant
from engine.prepare import prepare
from engine.prompt import build_request
from engine.request import (
    BeamParams,
    Continuations,
    Failed,
    Finished,
    Pooling,
    Request,
    SamplingParams,
)
from engine.scheduler import Limits
from tests.tiny import DENSE, MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
CONFIGS = {
    "dense": DENSE,
    "relu, tied, scaled": replace(
        DENSE, activation="relu", gated=False, tied_embeddings=True, scale_logits=True
    ),
    "moe": MOE,
    "base_layer": replace(MOE, router="base_layer"),
    "uneven": replace(DENSE, d_ff=100),  # no whole vectors
}
KINDS = [
    *((name, dtype) for name in CONFIGS for dtype in (torch.float32, torch.bfloat16)),
    *(("packed", dtype) for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype)),
]
SERVED = [  # as a server prepares a model: with kernels, where they can be had
    (f"served {name}", dtype) for name in CONFIGS for dtype in (torch.float32, torch.bfloat16)
]
SAMPLED = {"temperature": 1.5, "ignore_eos": True}
PARAMS = [  # requests are numbered through it, and through lengths, adapters and blanks
    {"logprobs": 3, "ignore_eos": True},
    {"ignore_eos": True},
    {**SAMPLED, "logprobs": 0},
    {**SAMPLED, "top_k": 20, "repetition_penalty": 1.5, "logprobs": 1},
    {**SAMPLED, "top_p": 0.7, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {**SAMPLED, "min_p": 0.01, "stop_token_ids": tuple(range(3, 259, 4)), "logprobs": 2},
    {"temperature": 0.8, "typical_p": 0.6, "min_tokens": 2},
    {**SAMPLED, "stop": tuple("aeiou lrst"), "include_stop": True, "logprobs": 1},
    {"stop": ("e", "ab"), "logit_bias": ((104, 30.0), (105, 30.0)), "frequency_penalty": 2.0},
    {**SAMPLED, "allowed_token_ids": tuple(range(100, 120)), "prompt_logprobs": 2},
    {**SAMPLED, "bad_words": ((100,), (101, 102)), "stop": ("\n",)},
    {"stop_token_ids": tuple(range(3, 384, 3)), "logprobs": 0},
]
TASKS = [
    Continuations(choices=((100, 101, 102), (104,), (99,) * 9), top=2),
    Pooling(),
    BeamParams(num_beams=3),
]
NUM_REQUESTS = 30
NUM_MIXES = 500  # half of them by torch's operators, half with kernels


@dataclass(frozen=True, eq=False)
class Job:
    """A request as the engine sees it; nobody waits for it any more once `cancelled` holds."""

    request: Request
    cancelled: list[bool]
    submitted: float = 0.0

    def is_cancelled(self) -> bool:
        return bool(self.cancelled)


@cache
def invariant_model(name, dtype):
    config = CONFIGS.get(name.removeprefix("served "), DENSE)
    model = tiny_model(config, seed=5).to(dtype)
    if name == "packed":
        pack_linears(model, Linear)
    if name.startswith("served "):
        prepare(model)
    set_invariant(model)
    return model


@cache
def adapters(dtype):
    generator = torch.Generator().manual_seed(9)
    slots = [Slots(front=3), Slots(front=1, middle=2, back=1, middle_after=2), Slots(back=9)]
    return [
        Adapter(
            name=f"a{number}",
            version="1",
            prompt_PD=torch.randn(each.num_vectors, 32, generator=generator).to(dtype),
            slots=each,
        )
        for number, each in enumerate(slots)
    ]


@cache
def requests(name, dtype):
    """All that may be in a mix: each length, adapter, task and row of parameters, in turns."""
    config = invariant_model(name, dtype).config
    made = []
    for number in range(NUM_REQUESTS):
        text = "abc d"[number % 3 :] * (1 + 5 * number % 17)
        is_fill = number % 7 == 3
        params = SamplingParams(
            **{"max_tokens": 2 + number // 2 % 5, "seed": number, **PARAMS[number % len(PARAMS)]}
        )
        request = build_request(
            f"{text}<span>x<span>" if is_fill else text,
            TOKENIZER,
            config,
            params,
            str(number),
            fill=is_fill,
            adapter=[None, None, *adapters(dtype)][number % 5],
            decoder_prompt=None if is_fill or number % 4 else [100 + number, 99],
        )
        task = TASKS[number // 9 % len(TASKS)] if number % 9 == 8 else None
        made.append(replace(request, task=task, salt="s" if number % 2 else None))
    return made


def without_times(event):
    if not isinstance(event, Finished):
        return event
    return (event.reason, event.stop_reason, event.completion_tokens, event.seed)


def run(model, arrivals, cancels, limits):
    """Events of each job; they arrive at their turns, and are cancelled after them."""
    engine = Engine(model, TOKENIZER, limits)
    events = {job: [] for jobs in arrivals.values() for job in jobs}
    turn = 0
    while turn <= max(arrivals) or engine.running or engine.num_waiting():
        for job in arrivals.get(turn, ()):
            engine.add(job)
        for job, event in engine.turn():
            assert not isinstance(event, Failed), event
            events[job].append(without_times(event))
        for job in cancels.get(turn, ()):
            job.cancelled.append(True)
        turn += 1
        assert turn < 2000, "the engine does not come to an end"
    return events


@cache
def alone(kind, number):
    """What a request gives by itself, which is the same with an engine and without."""
    model, request = invariant_model(*kind), requests(*kind)[number]
    job = Job(request, [])
    found = run(model, {0: [job]}, {}, Limits(max_rows=1, window_s=0.0))[job]
    if request.task is None:
        assert found == [without_times(event) for event in generate(model, TOKENIZER, request)]
    return found


PLAN = st.tuples(
    st.integers(0, NUM_REQUESTS - 1), st.integers(0, 6), st.sampled_from([None, None, 0, 1, 3])
)


MIXES = {
    "plans": st.lists(PLAN, min_size=2, max_size=7),
    "max_rows": st.integers(2, 7),
    "sweep": st.sampled_from([40, 200, 1000]),
    "kept_bytes": st.sampled_from([0, 1 << 20]),
}


@settings(max_examples=NUM_MIXES // 2)
@given(kind=st.sampled_from(KINDS), **MIXES)
def test_in_a_mix_as_alone_bit_for_bit(kind, plans, max_rows, sweep, kept_bytes):
    assert_as_alone(kind, plans, max_rows, sweep, kept_bytes)


@settings(max_examples=NUM_MIXES // 2)
@given(kind=st.sampled_from(SERVED), **MIXES)
def test_as_it_is_served_bit_for_bit(kind, plans, max_rows, sweep, kept_bytes):
    assert_as_alone(kind, plans, max_rows, sweep, kept_bytes)


def assert_as_alone(kind, plans, max_rows, sweep, kept_bytes):
    arrivals, cancels, numbers = {}, {}, {}
    for number, turn, cancelled_after in plans:
        job = Job(requests(*kind)[number], [])
        numbers[job] = number
        arrivals.setdefault(turn, []).append(job)
        if cancelled_after is not None:
            cancels.setdefault(turn + cancelled_after, []).append(job)
    limits = Limits(
        max_rows=max_rows, max_sweep_tokens=sweep, window_s=0.0, encoder_cache_bytes=kept_bytes
    )
    for job, found in run(invariant_model(*kind), arrivals, cancels, limits).items():
        expected = alone(kind, numbers[job])
        assert found == (expected[: len(found)] if job.cancelled else expected)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_the_mixes_hold_all_kinds_of_ends(kind):
    """Else they would show less than they seem to."""
    ends = [alone(kind, number)[-1] for number in range(NUM_REQUESTS)]
    assert {reason for reason, *_ in ends} == {"stop", "length"}
    assert {type(detail) for _, detail, *_ in ends} == {type(None), str, int}
    assert {type(r.task) for r in requests(*kind)} == {type(None), *map(type, TASKS)}
    assert len({tuple(map(str, alone(kind, n))) for n in range(NUM_REQUESTS)}) == NUM_REQUESTS
