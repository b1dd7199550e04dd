"""A contender in a process of its own, within a memory limit, seen from the one that asks."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from engine.bench_contenders import Answer, Job, Loaded, child
from engine.cgroup import LimitUnavailable, MemoryGroup, limited_group


class Child:
    """Loads, then times text after text. If it fails, `note` tells why, and it is asked no more."""

    def __init__(
        self, process: BaseProcess, connection: Connection, group: MemoryGroup | None, note: str
    ) -> None:
        self._process = process
        self._connection = connection
        self._group = group
        self.is_alive = True
        self.note = note
        self.loaded: Loaded | None = None
        self.answers: list[Answer] = []

    @property
    def is_limited(self) -> bool:
        """Whether process and page cache are held to the limit."""
        return self._group is not None

    @property
    def peak_group_bytes(self) -> int | None:
        """The most memory that process and page cache took together; None without a group."""
        return self._group.peak_bytes() if self._group else None

    def load(self, job: Job) -> None:
        """Load the contender of a job."""
        answer = self.ask(job)
        if isinstance(answer, Loaded):
            self.loaded = answer

    def time_text(self, seed: int) -> None:
        """Run the text of a seed."""
        answer = self.ask(seed)
        if isinstance(answer, Answer):
            self.answers.append(answer)

    def ask(self, message: object) -> object:
        """Send a message and wait for the answer; None if it has failed, now or before."""
        if not self.is_alive:
            return None
        try:
            self._connection.send(message)
            answer: object = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            is_killed = self._process.exitcode == -signal.SIGKILL
            reason = ", killed: most likely out of memory" if is_killed else ""
            answer = f"ended with {self._process.exitcode}{reason}"
        if isinstance(answer, str):
            self.is_alive = False
            self.note = "; ".join(filter(None, (self.note, answer)))
            return None
        return answer


@contextmanager
def open_child(
    limit_bytes: int | None = None, target: Callable[[Connection], None] = child
) -> Iterator[Child]:
    """Start a process, under a limit if one is given and can be had; it is gone afterwards.

    `target` answers each message that comes; a text as the answer tells why it fails.

    Where the limit cannot be had, the process runs without, and its note says so.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        group, note = None, ""
        if limit_bytes is not None:
            try:
                group = stack.enter_context(limited_group(limit_bytes))
            except LimitUnavailable as error:
                note = f"page cache not limited: {error}"
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs,), daemon=True)
        process.start()
        stack.callback(process.join)
        stack.callback(process.kill)  # only a group without processes can be removed
        stack.enter_context(ours)
        theirs.close()
        if group is not None and process.pid is not None:
            group.add(process.pid)  # it waits for its job, and has allocated next to nothing
        yield Child(process, ours, group, note)
