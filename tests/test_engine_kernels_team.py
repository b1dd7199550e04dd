"""Teams of threads: whoever does what, results are the same, and nobody waits for ever."""

import os
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from engine.kernels.builder import Builder
from engine.kernels.team import Team, the_team
from engine.model.layers import RMSNorm
from tests.tiny import LLAMA
from tests.waiting import wait_for

DEPTH, ROUNDS = 40, 6


class Chain:
    """Rows through norms and products that add to them, and what torch makes of that."""

    def __init__(self, rows, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.begin = torch.randn(rows, DEPTH, generator=generator)
        self.x, self.hidden = torch.zeros(rows, DEPTH), torch.zeros(rows, 70)
        norm = RMSNorm(DEPTH, 1e-5)
        builder = Builder(LLAMA, torch.float32, is_exact=True)
        self.expected = self.begin.clone()
        for _ in range(ROUNDS):
            up, down = torch.nn.Linear(DEPTH, 70), torch.nn.Linear(70, DEPTH, bias=False)
            for weight in (*up.parameters(), *down.parameters()):
                torch.nn.init.normal_(weight, 0, 0.2, generator=generator)
            builder.linear(self.x, up, self.hidden, norm=norm)
            builder.linear(self.hidden, down, self.x, adds=True)
            with torch.no_grad():
                self.expected += down(up(norm(self.expected)))
        self.table, self.scratch_bytes = builder.table(), builder.scratch_bytes(rows)
        self.kept = builder

    def run(self, team):
        """What a team makes of the rows."""
        self.x.copy_(self.begin)
        team.run(self.table, len(self.x), self.scratch_bytes)
        return self.x.clone()


@contextmanager
def team_of(threads):
    team = Team(threads)
    try:
        yield team
    finally:
        team.close()


def helpers():
    return {thread for thread in threading.enumerate() if thread.name.startswith("kernel-")}


def test_equals_torch_and_the_same_bits_with_any_number_of_threads():
    for rows in (1, 3, 8):
        chain = Chain(rows, seed=rows)
        with team_of(1) as one:
            expected = chain.run(one)
        torch.testing.assert_close(expected, chain.expected, rtol=1e-4, atol=1e-4)
        for threads in (2, 3, 2 * (os.cpu_count() or 1) + 1):  # more than there are cores, too
            with team_of(threads) as team:
                for _ in range(20):
                    assert torch.equal(chain.run(team), expected)


def test_scratch_grows_with_programs_and_rows():
    with team_of(2) as team:
        for rows in (1, 16, 2, 60, 1):
            chain = Chain(rows, seed=rows)
            with team_of(1) as one:
                assert torch.equal(chain.run(team), chain.run(one))


def test_helpers_begin_with_the_first_program_and_end_on_close():
    before, chain = helpers(), Chain(2)
    with team_of(3) as team:
        assert helpers() == before
        expected = chain.run(team)
        started = helpers() - before
        assert len(started) == 2
        team.close()
        assert not any(thread.is_alive() for thread in started)
        assert torch.equal(chain.run(team), expected)  # and begin again
        assert len(helpers() - before) == 2
    wait_for(lambda: helpers() == before)
    team.close()  # once more is nothing


def test_an_empty_program_is_our_own_mistake():
    with team_of(2) as team:
        with pytest.raises(AssertionError):
            team.run(np.zeros((0, 32), np.int64), 1, 0)
        chain = Chain(1)
        torch.testing.assert_close(chain.run(team), chain.expected, rtol=1e-4, atol=1e-4)


def test_programs_of_two_threads_at_once_are_right():
    chains, wrong, rounds = [Chain(4, seed) for seed in (1, 2, 3)], [], 150
    with team_of(1) as one:
        expected = [chain.run(one) for chain in chains]
    begin = threading.Barrier(len(chains))
    with team_of(2) as team:

        def work(number):
            begin.wait(300)
            for _ in range(rounds):
                if not torch.equal(chains[number].run(team), expected[number]):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
    assert not wrong


def test_the_team_follows_the_threads_of_torch():
    before, seen = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            team = the_team()
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
            assert team.threads == min(threads, cores)
            assert seen.setdefault(team.threads, team) is team
    finally:
        torch.set_num_threads(before)


def run_script(script):
    """What a script prints; it is killed if it hangs."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


def test_runs_with_pauses_never_hang():
    """Pauses around the time after which helpers sleep; a signal that wakes them meanwhile."""
    script = """
        import random, signal, time
        import torch
        from engine.kernels.team import Team
        from tests.test_engine_kernels_team import Chain

        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
        chain, team, chance = Chain(1), Team(2), random.Random(1)
        expected = chain.run(team)
        for number in range(2000):
            assert torch.equal(chain.run(team), expected), number
            time.sleep(chance.choice([0, 0, 1e-5, 5e-5, 1e-4, 2e-4]))
            if number % 100 == 0:
                time.sleep(0.01)
        signal.setitimer(signal.ITIMER_REAL, 0)
        chain.run(team)
        print("done")
    """  # and it ends without a close, right after a program
    assert run_script(script) == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_after_a_fork_has_a_team_of_its_own():
    script = """
        import os
        import torch
        from engine.kernels.team import the_team
        from tests.test_engine_kernels_team import Chain

        torch.set_num_threads(2)
        chain = Chain(3)
        expected = chain.run(the_team())
        for _ in range(3):
            child = os.fork()
            if not child:
                is_equal = all(torch.equal(chain.run(the_team()), expected) for _ in range(5))
                os._exit(0 if is_equal else 1)
            assert torch.equal(chain.run(the_team()), expected)
            assert os.waitpid(child, 0)[1] == 0
        print("done")
    """
    assert run_script(script) == "done\n"
