import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.queue_limits import QueueLimits, Waiting


def fill(limits, key, waiting, num_tokens=10):
    """Let requests of a key wait until one is refused; returns how many there are."""
    count = 0
    while limits.find_refusal(waiting, [Waiting(key, num_tokens)]) is None:
        waiting.append(Waiting(key, num_tokens))
        count += 1
        assert count < 1000
    return count


def test_without_keys_the_whole_queue_is_there():
    waiting = []
    assert fill(QueueLimits(max_requests=5), "", waiting) == 5
    text = QueueLimits(max_requests=5).find_refusal(waiting, [Waiting("", 1)])
    assert text.startswith("5 requests are waiting already, and at most 5 requests may wait")


def test_no_key_takes_what_the_next_one_needs():
    limits, waiting = QueueLimits(max_requests=64), []
    assert [fill(limits, key, waiting) for key in "abcd"] == [32, 16, 8, 4]
    text = limits.find_refusal(waiting, [Waiting("a", 1)])
    assert "32 requests of this key, of which there may be 18" in text
    assert fill(limits, "", waiting) == 4


def test_tokens_are_bounded_as_requests_are_but_one_request_may_always_wait():
    limits, waiting = QueueLimits(max_requests=64, max_tokens=100), []
    assert limits.find_refusal([], [Waiting("", 5000)]) is None
    assert fill(limits, "a", waiting) == 5
    assert limits.find_refusal(waiting, [Waiting("b", 50)]) is None
    text = limits.find_refusal(waiting, [Waiting("b", 51)])
    assert "at most 100 tokens may wait (50 do, 51 more came)" in text
    assert "50 tokens of this key" in limits.find_refusal(waiting, [Waiting("a", 1)])


def test_several_at_once_are_refused_together():
    limits = QueueLimits(max_requests=4)
    assert limits.find_refusal([], [Waiting("", 1)] * 4) is None
    assert "5 more came" in limits.find_refusal([], [Waiting("", 1)] * 5)
    assert limits.find_refusal([Waiting("a", 1)] * 9, []) is None


@given(
    arrivals=st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(1, 60)), max_size=60),
    most=st.integers(1, 20),
    tokens=st.one_of(st.none(), st.integers(1, 300)),
)
def test_the_bounds_hold_whatever_comes(arrivals, most, tokens):
    limits, waiting = QueueLimits(max_requests=most, max_tokens=tokens), []
    for key, cost in arrivals:
        if limits.find_refusal(waiting, [Waiting(key, cost)]) is None:
            waiting.append(Waiting(key, cost))
    assert len(waiting) <= most
    if tokens is not None and len(waiting) > 1:
        assert sum(one.num_tokens for one in waiting) <= max(tokens, waiting[0].num_tokens)


@pytest.mark.parametrize("values", [{"max_requests": 0}, {"max_tokens": 0}])
def test_impossible_bounds_are_refused(values):
    with pytest.raises(ValueError, match="at least 1"):
        QueueLimits(**values)
