import pytest

from engine.pace import NUM_ENDS, UNKNOWN_S, Pace


def test_the_wait_follows_the_last_ends():
    pace = Pace()
    pace.begin(100.0)
    pace.note_end(102.0)
    pace.note_end(104.0)
    assert pace.wait_s(3) == pytest.approx(6.0)
    for i in range(NUM_ENDS):
        pace.note_end(104.0 + (i + 1) / 8)
    assert pace.wait_s(16) == pytest.approx(2.0)


def test_time_in_which_nobody_is_served_does_not_count():
    pace = Pace()
    pace.begin(0.0)
    pace.note_end(1.0)
    pace.begin(3600.0)
    pace.note_end(3601.0)
    assert pace.wait_s(1) == pytest.approx(1.0)


def test_before_the_first_end_it_is_as_long_as_it_is_waited_for():
    pace = Pace()
    pace.begin(100.0)
    assert pace.wait_s(5, 100.1) == UNKNOWN_S
    assert pace.wait_s(5, 140.0) == pytest.approx(40.0)
