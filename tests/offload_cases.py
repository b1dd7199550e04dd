"""What a pipeline must hold on any device: the cases that fakes and real GPUs have in common.

A rig is a device and a way to compute on its slots: `check` gives out a computation that wants the
bytes of an expert in a slot, `finish` waits for all and fails if one found anything else.
"""

import zlib
from typing import Protocol

import numpy as np
import pytest
from hypothesis import strategies as st

from offload.bank import fill_bank
from offload.device import Blob, Device
from offload.lookahead import Lookahead
from offload.pipeline import ExpertPipeline, Guess
from offload.planner import ExpertPlan, plan_experts
from offload.slots import Key

POISON = 0xEE
LAYERS = ("encoder-0", "encoder-1", "decoder-0", "decoder-1")
EXPERTS_PER_LAYER = 8
ALL_KEYS = [Key(layer, expert) for layer in LAYERS for expert in range(EXPERTS_PER_LAYER)]

EXPERTS = st.lists(
    st.integers(0, EXPERTS_PER_LAYER - 1), unique=True, min_size=1, max_size=EXPERTS_PER_LAYER
)
GUESSES = st.one_of(st.none(), st.tuples(st.sampled_from(LAYERS), EXPERTS))
STEPS = st.lists(st.tuples(st.sampled_from(LAYERS), EXPERTS, GUESSES), min_size=1, max_size=10)


class Rig(Protocol):
    device: Device
    slot_bytes: int

    def check(self, blob: Blob, key: Key) -> None: ...
    def read(self, key: Key, out: np.ndarray, is_cancelled=...) -> None: ...
    def finish(self) -> None: ...


class Trusting(Lookahead):
    """Believes every guess."""

    def is_trusted(self, layer):
        return True


def content(key: Key, size: int) -> np.ndarray:
    """What a slot must hold for an expert; never the poison."""
    seed = zlib.crc32(repr(tuple(key)).encode())
    return np.random.default_rng(seed).integers(0, POISON, size, dtype=np.uint8)


def make_plan(slot_bytes: int, budget: int, num_host: int = 0) -> ExpertPlan:
    """A plan for all layers, with budgets in experts."""
    return plan_experts(
        slot_bytes, LAYERS, EXPERTS_PER_LAYER, budget * slot_bytes, num_host * slot_bytes
    )


def open_pipeline(rig: Rig, plan: ExpertPlan, read=None) -> ExpertPipeline:
    """Fill the bank and the pinned slots."""
    bank = fill_bank(plan.host, plan.slot_bytes, rig.read, rig.device) if plan.host else None
    pipeline = ExpertPipeline(rig.device, plan, read or rig.read, bank)
    pipeline.preload()
    return pipeline


def borrow(rig: Rig, pipeline, layer, wanted, guess=None) -> list[int]:
    """Compute on every wanted expert; returns their order."""
    order = []
    for expert, blob in pipeline.stream(layer, wanted, guess):
        rig.check(blob, Key(layer, expert))
        order.append(expert)
    return order


def lends_every_wanted_expert(rig: Rig, steps, budget: int, num_host: int) -> None:
    """Whatever is asked for in whatever order, computations find the right bytes."""
    plan = make_plan(rig.slot_bytes, budget, num_host)
    pipeline = open_pipeline(rig, plan)
    pipeline.lookahead = Trusting(rig.device.trust)
    total = 0
    for layer, wanted, guess in steps:
        order = borrow(rig, pipeline, layer, wanted, guess and Guess(*guess))
        assert sorted(order) == sorted(wanted)
        assert len(pipeline._table.in_zone("pinned")) == len(plan.pinned)
        total += len(wanted)
    assert pipeline.stats.hits + pipeline.stats.misses == total
    assert pipeline.stats.copied_bytes == pipeline.stats.host_loads * rig.slot_bytes
    rig.finish()


def a_loop_left_early_leaves_nothing_held(rig: Rig, num_lent: int) -> None:
    pipeline = open_pipeline(rig, make_plan(rig.slot_bytes, 3, 10))
    borrow(rig, pipeline, "decoder-0", [0, 1])
    stream = pipeline.stream("decoder-0", [0, 4, 5, 6])
    for _ in range(num_lent):
        expert, blob = next(stream)
        rig.check(blob, Key("decoder-0", expert))
    stream.close()
    for layer in ("decoder-1", "encoder-1"):
        assert sorted(borrow(rig, pipeline, layer, range(5))) == [0, 1, 2, 3, 4]
    rig.finish()


def a_read_that_fails_is_raised_and_the_next_step_is_served(rig: Rig, broken: int) -> None:
    failing = {Key("decoder-0", broken)}

    def read(key, out, is_cancelled):
        if key in failing:
            raise OSError(5, "Input/output error")
        rig.read(key, out, is_cancelled)

    pipeline = open_pipeline(rig, make_plan(rig.slot_bytes, 3), read)
    with pytest.raises(OSError, match="Input/output"):
        borrow(rig, pipeline, "decoder-0", range(5))
    assert Key("decoder-0", broken) not in pipeline.resident()
    failing.clear()
    assert sorted(borrow(rig, pipeline, "decoder-0", [4, 3, 2, 1, 0])) == [0, 1, 2, 3, 4]
    rig.finish()


def an_error_in_the_loop_body_leaves_nothing_held(rig: Rig) -> None:
    pipeline = open_pipeline(rig, make_plan(rig.slot_bytes, 2, 4))

    def body():
        for expert, blob in pipeline.stream("decoder-0", [0, 1, 2]):
            rig.check(blob, Key("decoder-0", expert))
            raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match="in the body"):
        body()
    assert sorted(borrow(rig, pipeline, "decoder-1", [0, 1, 2])) == [0, 1, 2]
    rig.finish()


def a_wrong_guess_is_given_up_and_never_taken_for_an_expert(rig: Rig, num_host: int) -> None:
    pipeline = open_pipeline(rig, make_plan(rig.slot_bytes, 3, num_host))
    pipeline.lookahead = Trusting(rig.device.trust)
    for wrong, right in ((3, 2), (5, 3), (6, 5)):
        borrow(rig, pipeline, "decoder-0", [0], Guess("decoder-1", [wrong]))
        assert borrow(rig, pipeline, "decoder-1", [right]) == [right]
    assert pipeline.stats.prefetched == 3
    rig.finish()
