"""What a run folder tells of its steps before: of another recipe, they are not of one run."""

import json
import logging
from pathlib import Path
from typing import Any

from training.recipe import Recipe

logger = logging.getLogger(__name__)

RECORD = "recipe.json"
FREE = ("steps", "eval_every", "eval_batches", "checkpoint_every", "checkpointing")
MOVABLE = ("shards", "tokenizer", "start")  # where they lie is not what they hold
PARALLEL = ("expert_parallel",)


def tell_differences(run: Path, recipe: Recipe, done: int) -> None:
    """Warn if the steps that a run has done were of another recipe: data, rates, seed.

    More steps, other evaluations and places of files are no other recipe.
    """
    try:
        before = json.loads((run / RECORD).read_bytes())
        now = json.loads(json.dumps(recipe.as_run()))
        found = [name for name in ("data", "train", "distill") if before.get(name) or now.get(name)]
        differing = [
            f"[{name}] {key}"
            for name in found
            for key in _differing(before.get(name) or {}, now.get(name) or {})
        ]
    except (OSError, ValueError, TypeError, AttributeError):
        return  # without a record nothing is known
    if differing:
        logger.warning(
            "%s: its first %d steps were taken with another %s; for a run of one recipe begin in "
            "another folder",
            run,
            done,
            ", ".join(differing),
        )
    if done > recipe.train.steps:
        logger.warning(
            "%s: has taken %d steps already, more than the %d of the recipe",
            run,
            done,
            recipe.train.steps,
        )


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = before.keys() & now.keys() - {*FREE, *MOVABLE, *PARALLEL}
    return sorted(name for name in names if before[name] != now[name])
