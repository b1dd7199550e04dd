"""What errors of the device mean for those that come after: less at once, or the end."""

import logging
from typing import Any

from engine.failures import DeviceLost, is_device_lost, is_out_of_memory
from engine.scheduler import Scheduler
from engine.sweep import Sweep

logger = logging.getLogger(__name__)

GOOD_TURNS = 100  # without an error, for a little more at once after memory ran out


class Pressure:
    """Lowers the limits of a scheduler when memory runs out, and raises them again."""

    def __init__(self, scheduler: Scheduler[Any]) -> None:
        self._scheduler = scheduler
        self._good_turns = 0
        self._lacks_memory = False

    def note(self, error: Exception, sweep: Sweep[Any] | None = None) -> None:
        """Take note of an error, in a sweep perhaps. Raises DeviceLost if it is the end."""
        if is_device_lost(error):
            raise DeviceLost(f"the device has failed: {error}") from error
        self._good_turns = -1
        if not is_out_of_memory(error):
            return
        if sweep is None or len(sweep.texts) == 1:  # what else takes memory are rows
            self._lacks_memory = True
            return
        self._scheduler.lower_sweep(sweep.num_tokens)
        most = self._scheduler.max_sweep_tokens
        logger.warning("memory ran out; at most %d tokens in a sweep from now on", most)

    def adapt(self) -> None:
        """At the end of a turn: after want of memory, half as many rows at most.

        A little more after many good turns.
        """
        if self._lacks_memory:
            self._lacks_memory = False
            self._scheduler.lower_rows()
            most = self._scheduler.max_rows
            logger.warning("memory ran out; at most %d rows from now on", most)
        self._good_turns += 1
        if self._good_turns >= GOOD_TURNS:
            self._good_turns = 0
            self._scheduler.recover()
