"""Ensembles: several prompts of one frozen model, each asked, who then choose together.

A server holds the members as versions of one adapter; whoever asks it, asks each and adds up.
Source: Lester et al. (arXiv:2104.08691) s7: prompts of several seeds, majority vote.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from engine.adapters import load_adapter, model_fingerprint
from engine.errors import ConfigError
from engine.prepare import prepare
from engine.tokenizer import open_tokenizer
from training.growth_files import check_free, read_model_config
from training.task_eval import Replies, TaskReport, ask, judge
from training.task_examples import Example, read_examples
from training.tasks import Task
from training.tune import OnStep
from training.tune_model import Scorer
from training.tune_run import Outcome, TunePlan, open_model, prompt_of, run_tune

Vote = Literal["mean", "majority"]


class EnsembleReport(NamedTuple):
    """How well all do together, and each alone."""

    together: TaskReport
    members: list[TaskReport]


def combine(members: Sequence[Replies], vote: Vote) -> Replies:
    """One reply to each row out of those of all members.

    The mean of the scores, which are log-probabilities; or a vote for each member's best, where the
    mean decides among labels of equally many votes.
    """
    scores = []
    for found in zip(*(member.scores for member in members), strict=True):
        scores_ML = torch.tensor(found, dtype=torch.float64)
        mean_L = scores_ML.mean(0)
        if vote == "majority":
            votes_L = torch.bincount(scores_ML.argmax(1), minlength=len(mean_L))
            mean_L = votes_L + mean_L.softmax(0) / 2  # halves do not outweigh a vote
        scores.append(mean_L.tolist())
    return Replies([""] * len(scores), scores)


def judge_ensemble(
    scorers: Sequence[Scorer], examples: Sequence[Example], task: Task, vote: Vote, rows: int = 16
) -> EnsembleReport:
    """Ask each member all examples. Raises ConfigError for what cannot be voted on."""
    check_vote(task, vote)
    replies = [ask(scorer, examples, task, rows) for scorer in scorers]
    together = judge(task, examples, combine(replies, vote))
    return EnsembleReport(together, [judge(task, examples, one) for one in replies])


def check_vote(task: Task, vote: str) -> None:
    """Raise ConfigError unless the answers of a task can be put together so."""
    if vote not in get_args(Vote):
        raise ConfigError(f"vote is {vote!r}; allowed: {', '.join(get_args(Vote))}")
    if task.kind == "generate" or (task.kind == "rank" and vote == "majority"):
        raise ConfigError(
            f"task {task.name} is of kind {task.kind}: several prompts choose among labels, or "
            "rank by the mean; name one adapter"
        )


def evaluate_ensemble(
    path: Path,
    data: Path,
    task: Task,
    adapters: Sequence[Path],
    vote: Vote = "mean",
    dtype: torch.dtype | None = None,
    rows: int = 16,
    *,
    is_any_base_allowed: bool = False,
) -> EnsembleReport:
    """How well several adapters of a model directory do a task together."""
    check_vote(task, vote)
    config = read_model_config(path)
    tokenizer = open_tokenizer(path, config.tokenizer)
    found = [load_adapter(adapter, config, torch.float32) for adapter in adapters]
    vectors = max(adapter.num_vectors for adapter in found)
    examples = read_examples(data, task, tokenizer, config, vectors)
    with open_model(path, dtype, None) as model:
        if not is_any_base_allowed:
            for adapter in adapters:
                load_adapter(adapter, config, torch.float32, fingerprint=model_fingerprint(model))
        prepare(model)
        scorers = [Scorer(model, tokenizer, prompt_of(adapter)) for adapter in found]
        return judge_ensemble(scorers, examples, task, vote, rows)


def tune_members(
    plan: TunePlan, count: int, on_step: OnStep = lambda _: None
) -> tuple[list[Outcome], EnsembleReport | None]:
    """Tune prompts of seeds that follow each other; they are versions 1, 2 .. in the folder `out`.

    Returns what each came to and, if there are dev rows, how well they do together.
    Raises ConfigError if the task cannot be voted on, or all weights are to be tuned.
    """
    check_vote(plan.task, "mean")
    if plan.settings.mask != "full":
        raise ConfigError("an ensemble is of adapters, and behind a mask none is written")
    if plan.settings.full:
        raise ConfigError("an ensemble shares one frozen model; leave out --full or --members")
    check_free(plan.out)
    numbers = range(1, count + 1)
    outcomes = [_tune_member(plan, number, on_step) for number in numbers]
    staging = plan.out.with_name(f".{plan.out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    for number in numbers:
        shutil.copytree(_member_folder(plan, number), staging / str(number))
    if plan.out.exists():
        plan.out.rmdir()  # an empty one
    staging.replace(plan.out)
    folders = [plan.out / str(number) for number in numbers]
    outcomes = [replace(o, adapter=f) for o, f in zip(outcomes, folders, strict=True)]
    if plan.dev is None:
        return outcomes, None
    together = evaluate_ensemble(
        plan.model, plan.dev, plan.task, folders, "mean", plan.dtype, plan.settings.rows
    )
    return outcomes, together


def _member_folder(plan: TunePlan, number: int) -> Path:
    return plan.run_folder / str(number) / "adapter"


def _tune_member(plan: TunePlan, number: int, on_step: OnStep) -> Outcome:
    """Tune one, into the folder of its run; what is tuned already is only written again."""
    folder = _member_folder(plan, number)
    shutil.rmtree(folder, ignore_errors=True)
    settings = replace(plan.settings, seed=plan.settings.seed + number - 1)
    member = replace(plan, out=folder, run=folder.parent, version=str(number), settings=settings)
    return run_tune(member, on_step)
