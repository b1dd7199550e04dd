"""Threads that run programs together."""

import ctypes
import os
import sys
from functools import lru_cache
from threading import Lock, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.ops import COLUMNS
from engine.kernels.program import (
    ASLEEP,
    COUNTERS,
    EPOCH,
    IS_OVER,
    LINE,
    NUM_OPS,
    NUM_ROWS,
    SCRATCH,
    SCRATCH_BYTES,
    SEMAPHORE_BYTES,
    TABLE,
    THREADS,
    rouse,
    work,
)

Table = NDArray[np.int64]
Words = NDArray[np.int64]

ALIGNMENT = 64


class Team:
    """This thread and helpers of it. A program that comes while another runs is run by one alone.

    Helpers look out for the next program for some 0.1 ms, then they sleep.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._lock = Lock()
        self._shared = np.zeros(ASLEEP + LINE * (threads + 1), np.int64)
        self._shared[THREADS] = threads
        self._semaphores = np.zeros(threads * SEMAPHORE_BYTES, np.uint8)
        self._scratch = Scratch(threads)
        self._helpers: list[Thread] = []

    def run(self, table: Table, num_rows: int, scratch_bytes: int) -> None:
        """Run operations, one after the other, over so many rows.

        Each thread gets so many bytes of scratch.
        """
        if not self._lock.acquire(blocking=False):
            alone = np.zeros(ASLEEP + 2 * LINE, np.int64)
            alone[THREADS] = 1
            scratch = Scratch(1)
            scratch.fill(alone, table, num_rows, scratch_bytes)
            work(alone.ctypes.data, 0, 0)
            return
        try:
            self._begin()
            self._scratch.fill(self._shared, table, num_rows, scratch_bytes)
            work(self._shared.ctypes.data, 0, self._semaphores.ctypes.data)
        finally:
            self._lock.release()

    def _begin(self) -> None:
        # what is missing: if a thread could not be started, the others wait for another try
        for number in range(len(self._helpers) + 1, self.threads):
            place = self._semaphores.ctypes.data + SEMAPHORE_BYTES * number
            ctypes.CDLL(None).sem_init(ctypes.c_void_p(place), 0, 0)
            arguments = (self._shared, self._semaphores, number)
            helper = Thread(target=_help, args=arguments, daemon=True, name=f"kernel-{number}")
            helper.start()
            self._helpers.append(helper)

    def close(self) -> None:
        """End the helpers."""
        with self._lock:
            if self._helpers:
                self._shared[IS_OVER] = 1
                rouse(self._shared.ctypes.data, self._semaphores.ctypes.data)
            for helper in self._helpers:
                helper.join()
            self._helpers = []
            self._shared[[IS_OVER, EPOCH]] = 0


def _help(shared: Words, semaphores: NDArray[np.uint8], number: int) -> None:
    """Help, and hold the memory meanwhile: at exit a team goes before its helpers do."""
    work(shared.ctypes.data, number, semaphores.ctypes.data)


class Scratch:
    """Memory for what threads make on the way."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._memory = np.empty(0, np.uint8)
        self._counters = np.empty(0, np.int64)

    def fill(self, shared: Words, table: Table, num_rows: int, scratch_bytes: int) -> None:
        """Say in the shared words what is to be run, and with what memory."""
        own_bytes = -(-scratch_bytes // ALIGNMENT) * ALIGNMENT
        if len(self._memory) < own_bytes * self._threads + ALIGNMENT:
            self._memory = np.empty(own_bytes * self._threads + ALIGNMENT, np.uint8)
        if len(self._counters) < len(table):
            self._counters = np.empty(len(table), np.int64)
        assert len(table)  # else helpers would not wait for one another
        assert table.strides == (8 * COLUMNS, 8)
        address = self._memory.ctypes.data
        shared[TABLE], shared[NUM_OPS] = table.ctypes.data, len(table)
        shared[COUNTERS], shared[NUM_ROWS] = self._counters.ctypes.data, num_rows
        shared[SCRATCH] = address + -address % ALIGNMENT
        shared[SCRATCH_BYTES] = own_bytes
        self._counters[:] = 0


@lru_cache(maxsize=1)
def _teams() -> dict[int, Team]:
    return {}


def the_team() -> Team:
    """The team of this process: as many threads as torch uses now, but no more than cores.

    Threads of a team wait for each other: those beyond would only stand in the way.
    """
    threads = 1
    if sys.platform == "linux":
        threads = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    teams = _teams()
    if threads in teams:
        return teams[threads]
    return teams.setdefault(threads, Team(threads))


def _forget() -> Any:
    _teams.cache_clear()  # threads do not survive a fork


os.register_at_fork(after_in_child=_forget)
