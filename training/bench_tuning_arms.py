"""The runs that the benchmark of prompt tuning compares, and their budgets."""

from dataclasses import dataclass, replace
from typing import Literal

from engine.adapters import Slots
from training.tune import TuneSettings
from training.tune_masks import Mask

Rows = Literal["all", "few", "pairs"]
# CPM-2's positions: all vectors at one place, or spread evenly over several
PLACES = (
    "front",
    "middle",
    "back",
    "front+middle",
    "front+back",
    "middle+back",
    "front+middle+back",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A run to make: what is trained on which rows. A prompt begins with that of `parent`."""

    name: str
    about: str
    steps: int
    vectors: int
    places: str = "front"
    mask: Mask = "full"
    full: bool = False
    rows: Rows = "all"
    parent: str = ""
    eval_every: int = 50
    batch: int = 16

    def settings(self, seed: int) -> TuneSettings:
        """As tuning takes them: Lester's rates, all steps, the weights that do best on dev."""
        return TuneSettings(
            steps=self.steps,
            rows=self.batch,
            full=self.full,
            seed=seed,
            eval_every=self.eval_every,
            patience=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Steps of the runs, vectors of a prompt, rows of a step and of what is learnt from."""

    prompt_steps: int = 600
    full_steps: int = 400
    joint_steps: int = 100
    ablation_steps: int = 200
    pair_steps: int = 150
    few_steps: int = 60
    vectors: int = 20
    batch: int = 16
    train_rows: int = 6000
    few_rows: int = 32
    pairs: int = 3200
    eval_every: int = 50
    probe_steps: int = 2
    wide: tuple[int, int] = (640, 3)  # width and layers of the random model of the second probe


QUICK = Budget(
    prompt_steps=2,
    full_steps=2,
    joint_steps=2,
    ablation_steps=2,
    pair_steps=2,
    few_steps=2,
    vectors=6,
    batch=2,
    train_rows=12,
    few_rows=4,
    pairs=12,
    eval_every=2,
    probe_steps=1,
    wide=(64, 1),
)


def spread(vectors: int, places: str, mark: int) -> Slots:
    """Vectors shared among places, the first get what is left over: 20 in three are 7, 7, 6."""
    names = places.split("+")
    share, rest = divmod(vectors, len(names))
    counts = {name: share + (number < rest) for number, name in enumerate(names)}
    return Slots(**counts, middle_mark=mark if "middle" in counts else None)


def main_arms(budget: Budget) -> list[Arm]:
    """A prompt, all weights, and the prompt with all weights after it."""
    prompt = replace(_plain(budget), steps=budget.prompt_steps)
    return [
        replace(prompt, name="prompt", about="prompt, model frozen"),
        replace(
            prompt,
            name="full",
            about="full fine-tuning",
            steps=budget.full_steps,
            full=True,
            vectors=0,
        ),
        replace(
            prompt,
            name="joint",
            about="the prompt, then all weights with it",
            steps=budget.joint_steps,
            full=True,
            parent="prompt",
        ),
    ]


def few_arms(budget: Budget) -> tuple[Arm, list[Arm]]:
    """A prompt pre-trained on pairs of sentences; prompts learnt from few rows without and with."""
    pairs = replace(
        _plain(budget),
        name="pairs",
        about="pairs of sentences, no labels",
        steps=budget.pair_steps,
        rows="pairs",
        eval_every=budget.pair_steps,
    )
    few = replace(
        _plain(budget),
        name="few",
        about="prompt from labels",
        steps=budget.few_steps,
        rows="few",
        eval_every=max(budget.few_steps // 6, 1),
    )
    taught = replace(
        few, name="few-pretrained", about="prompt from pairs of sentences", parent="pairs"
    )
    return pairs, [few, taught]


def mask_arms(budget: Budget) -> list[Arm]:
    """Prompts that cannot see the text, or that the text cannot see."""
    plain = _plain(budget)
    return [
        replace(plain, name="prompt-blind", about="prompt cannot see text", mask="prompt_blind"),
        replace(plain, name="text-blind", about="text cannot see prompt", mask="text_blind"),
    ]


def place_arms(budget: Budget) -> list[Arm]:
    """Prompts of as many vectors at all places; the first is the one that masks compare with."""
    plain = _plain(budget)
    return [replace(plain, name=one, about=one, places=one) for one in PLACES]


def _plain(budget: Budget) -> Arm:
    """What all runs share, with the steps of an ablation."""
    return Arm(
        name="",
        about="",
        steps=budget.ablation_steps,
        vectors=budget.vectors,
        batch=budget.batch,
        eval_every=budget.eval_every,
    )
