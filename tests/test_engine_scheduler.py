import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler import Demand, Limits, Scheduler

WIDE = Limits(max_rows=100, max_sweep_tokens=10**6, window_s=0.0)


def make_demand(key="", source=10, tokens=10, arrived=0.0, priority=0, **more):
    return Demand(
        source_tokens=source, max_tokens=tokens, arrived=arrived, key=key, priority=priority, **more
    )


def one_by_one(scheduler):
    """The order in which requests go, if there is room for one at a time."""
    order = []
    while len(scheduler):
        order += scheduler.next_sweep(10.0, scheduler.limits.max_rows - 1)
    return order


def test_first_come_first_served_within_a_key():
    scheduler = Scheduler(WIDE)
    for number in range(5):
        scheduler.add(make_demand(arrived=number), number)
    assert one_by_one(scheduler) == [0, 1, 2, 3, 4]


def test_keys_take_turns_however_many_requests_one_of_them_has():
    scheduler = Scheduler(WIDE)
    for number in range(6):
        scheduler.add(make_demand("batch job"), f"a{number}")
    for number in range(2):
        scheduler.add(make_demand("somebody", arrived=1.0), f"b{number}")
    assert one_by_one(scheduler) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_shares_are_of_tokens_not_of_requests():
    scheduler = Scheduler(WIDE)
    for number in range(3):
        scheduler.add(make_demand("long", source=90), f"a{number}")
    for number in range(9):
        scheduler.add(make_demand("short", source=10, arrived=1.0), f"b{number}")
    order = one_by_one(scheduler)
    assert order[:7] == ["a0", "b0", "b1", "b2", "b3", "b4", "a1"]


def test_a_key_that_was_idle_has_saved_nothing_up():
    scheduler = Scheduler(WIDE)
    for number in range(4):
        scheduler.add(make_demand("a"), f"a{number}")
    assert scheduler.next_sweep(0.0, 98) == ["a0", "a1"]
    scheduler.add(make_demand("late"), "b0")
    scheduler.add(make_demand("late"), "b1")
    assert one_by_one(scheduler) in (["a2", "b0", "a3", "b1"], ["b0", "a2", "b1", "a3"])


def test_a_key_with_many_adapters_gets_no_more_than_one_with_none():
    scheduler = Scheduler(WIDE)
    for number in range(9):
        scheduler.add(make_demand("a", adapter=str(number % 3)), f"a{number}")
    for number in range(3):
        scheduler.add(make_demand("b", arrived=1.0), f"b{number}")
    assert [item[0] for item in one_by_one(scheduler)[:6]] == list("ababab")


def test_within_a_key_no_adapter_starves_another():
    scheduler = Scheduler(WIDE)
    for number in range(5):
        scheduler.add(make_demand("a", adapter="job"), f"job {number}")
    scheduler.add(make_demand("a", adapter="other", arrived=1.0), "other")
    scheduler.add(make_demand("b", adapter="job", arrived=2.0), "b")
    assert one_by_one(scheduler)[:3] == ["job 0", "b", "other"]


def test_a_search_takes_as_many_rows_as_it_has_beams():
    scheduler = Scheduler(Limits(max_rows=5, window_s=0.0))
    for name, rows in (("a", 2), ("b", 4), ("c", 1)):
        scheduler.add(make_demand(rows=rows, own_bytes=1, is_row=False), name)
    assert scheduler.next_sweep(0.0, 0) == ["a"]
    assert scheduler.next_sweep(0.0, 2) == []
    assert scheduler.next_sweep(0.0, 0) == ["b", "c"]
    scheduler.add(make_demand(rows=9), "wide")
    assert scheduler.next_sweep(0.0, 1) == []
    assert scheduler.next_sweep(0.0, 0) == ["wide"]  # nobody beside it


def test_fewer_rows_may_be_allowed_for_a_while():
    scheduler = Scheduler(Limits(max_rows=5, window_s=0.0))
    for number in range(4):
        scheduler.add(make_demand(), number)
    scheduler.max_rows = 2
    assert scheduler.next_sweep(0.0, 0) == [0, 1]
    assert scheduler.next_sweep(0.0, 2) == []


def test_those_that_need_no_sweep_go_when_it_is_their_turn():
    scheduler = Scheduler(Limits(max_rows=4, max_sweep_tokens=1, window_s=99.0))
    for number, key in enumerate("aab"):
        scheduler.add(make_demand(key, arrived=number), f"{key}{number}")

    def room(demands):
        return len(demands) < 3

    assert scheduler.next_ready(1, room, lambda item: item != "a1") == ["a0", "b2"]
    assert scheduler.next_ready(1, room, lambda item: item != "a1") == []
    assert scheduler.next_ready(4, room, lambda _: True) == []
    assert [item for _, item in scheduler.waiting()] == ["a1"]


def test_priority_goes_before_shares():
    scheduler = Scheduler(WIDE)
    scheduler.add(make_demand("a"), "a")
    scheduler.add(make_demand("a", priority=1), "urgent 1")
    scheduler.add(make_demand("b", priority=-1), "later")
    scheduler.add(make_demand("a", priority=1), "urgent 2")
    assert one_by_one(scheduler) == ["urgent 1", "urgent 2", "a", "later"]


def test_a_sweep_takes_what_fits_with_its_padding_and_at_least_one_text():
    scheduler = Scheduler(Limits(max_rows=10, max_sweep_tokens=64, window_s=0.0))
    for number, source in enumerate((10, 20, 20, 20, 500, 5)):
        scheduler.add(make_demand(source=source), number)
    assert scheduler.next_sweep(0.0, 0) == [0, 1, 2]
    assert scheduler.next_sweep(0.0, 0) == [3]
    assert scheduler.next_sweep(0.0, 0) == [4]
    assert scheduler.next_sweep(0.0, 0) == [5]


def test_no_more_rows_than_are_free():
    scheduler = Scheduler(Limits(max_rows=4, window_s=0.0))
    for number in range(6):
        scheduler.add(make_demand(), number)
    assert scheduler.next_sweep(0.0, 1) == [0, 1, 2]
    assert scheduler.next_sweep(0.0, 4) == []
    assert scheduler.next_sweep(0.0, 0) == [3, 4, 5]
    assert scheduler.next_sweep(0.0, 0) == []


def test_while_others_run_texts_are_collected_for_a_short_window():
    scheduler = Scheduler(Limits(max_rows=4, window_s=0.5))
    scheduler.add(make_demand(arrived=1.0), "first")
    assert scheduler.next_sweep(1.1, 1) == []
    assert scheduler.wait_s(1.1) == pytest.approx(0.4)
    scheduler.add(make_demand(arrived=1.2), "second")
    assert scheduler.next_sweep(1.5, 1) == ["first", "second"]
    scheduler.add(make_demand(arrived=2.0), "alone")
    assert scheduler.next_sweep(2.0, 0) == ["alone"]  # nobody to wait for
    for number in range(3):
        scheduler.add(make_demand(arrived=3.0), number)
    assert scheduler.next_sweep(3.0, 1) == [0, 1, 2]  # all rows are taken: no use waiting


def test_unwanted_requests_are_taken_out():
    scheduler = Scheduler(WIDE)
    for number in range(4):
        scheduler.add(make_demand("ab"[number % 2]), number)
    assert sorted(scheduler.drop(lambda _, item: item in (1, 3))) == [1, 3]
    assert len(scheduler) == 2
    assert one_by_one(scheduler) == [0, 2]
    assert scheduler.wait_s(5.0) == WIDE.window_s


@given(
    demands=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.integers(-1, 1)), max_size=30
    ),
    max_rows=st.integers(1, 8),
    tokens=st.integers(1, 100),
)
def test_everybody_goes_exactly_once(demands, max_rows, tokens):
    scheduler = Scheduler(Limits(max_rows=max_rows, max_sweep_tokens=tokens, window_s=0.0))
    for number, (key, source, priority) in enumerate(demands):
        scheduler.add(make_demand(key, source, arrived=number, priority=priority), number)
    gone = []
    while len(scheduler):
        sweep = scheduler.next_sweep(1e9, 0)
        assert 1 <= len(sweep) <= max_rows
        longest = max(demands[i][1] for i in sweep)
        assert len(sweep) == 1 or longest * len(sweep) <= tokens
        gone += sweep
    assert sorted(gone) == list(range(len(demands)))


@pytest.mark.parametrize(
    "values",
    [{"max_rows": 0}, {"max_sweep_tokens": 0}, {"window_s": -1.0}, {"encoder_cache_bytes": -1}],
)
def test_impossible_limits_are_refused(values):
    with pytest.raises(ValueError, match="must be at least 1"):
        Limits(**values)
