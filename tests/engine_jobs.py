"""Jobs for an engine without a worker, and a loop that carries them out turn by turn."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from engine.generation import generate
from engine.prompt import build_request
from engine.request import Finished, Piece, Request, SamplingParams
from tests.tiny import MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()


@dataclass(frozen=True, eq=False)
class Job:
    """A request as the engine sees it."""

    request: Request
    is_cancelled: Callable[[], bool] = lambda: False
    submitted: float = 0.0


def make_request(text="hello", config=MOE, fill=False, name="r", **params):
    return build_request(text, TOKENIZER, config, SamplingParams(**params), name, fill=fill)


def late_job(request, late_by=0.0):
    """A job whose deadline passed so long ago, or will pass if that is negative."""
    submitted = perf_counter() - request.deadline_s - late_by
    return Job(request, submitted=submitted)


def run(engine, arrivals, cancel_at=None):
    """Give jobs to the engine at their turns; returns the events of each."""
    events = {job: [] for jobs in arrivals.values() for job in jobs}
    turn = 0
    while turn <= max(arrivals) or engine.running or len(engine.scheduler):
        for job in arrivals.get(turn, ()):
            engine.add(job)
        for job, event in engine.turn():
            events[job].append(event)
        if cancel_at and turn in cancel_at:
            cancel_at[turn].append(True)
        turn += 1
        assert turn < 2000, "the engine does not come to an end"
    return events


def alone(model, request):
    return list(generate(model, TOKENIZER, request))


def pieces(events):
    return [event for event in events if isinstance(event, Piece)]


def without_times(event):
    assert isinstance(event, Finished)
    names = ("reason", "stop_reason", "prompt_tokens", "completion_tokens", "seed")
    return tuple(getattr(event, name) for name in names)


class FailingExperts:
    """Cannot read experts while it is told so, by an error of the caller's choice."""

    def __init__(self, experts, fails):
        self.experts, self.fails = experts, fails

    def foresee(self, layer, x):
        pass

    def stream(self, layer, wanted):
        error = self.fails(layer, wanted)
        if error:
            raise error
        return self.experts.stream(layer, wanted)


def broken_model(fails):
    """A tiny model in double precision whose experts fail with what `fails` returns."""
    model = tiny_model(MOE, seed=5).double()
    experts = model.experts
    del model.experts
    model.experts = FailingExperts(experts, fails)
    return model
