"""Waiting for what other threads and processes do: until it is so, however slow the machine is."""

import time
from collections.abc import Callable

PATIENCE_S = 300.0  # to be reached by what never comes only


def wait_for(
    is_true: Callable[[], object],
    seconds: float = PATIENCE_S,
    what: Callable[[], object] = lambda: "never",
) -> None:
    """Look until it is true; fail with what `what` tells if it is not in time."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, what()
        time.sleep(0.01)
