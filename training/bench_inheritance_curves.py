"""What curves of loss against cost say of one another: cost to a loss, ratios, intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from training.bench_inheritance_runs import Point, Record

WINDOW = 5  # evaluations of which a curve takes the median
# two-sided 95 % quantiles of Student's t by degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run spent: operations and processor seconds."""

    flops: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95 % t-interval, and the values; one value has no interval."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def text(self, digits: int = 2) -> str:
        """As a table has it: mean [low, high]."""
        if len(self.values) < 2:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Cost of an arm over that of scratch at one loss, over seeds; None where not all got there.

    `charged` counts the ancestors and teachers of the arm. `reached` counts seeds; `is_fair` is
    False where an arm begins below the loss, as then any saving could be had.
    """

    free: Interval | None
    charged: Interval | None
    free_seconds: Interval | None
    charged_seconds: Interval | None
    reached: int
    is_fair: bool


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval. Raises ValueError for no values, or more than the table has."""
    if not 1 <= len(values) <= len(T_95) + 1:
        raise ValueError(f"{len(values)} values; an interval takes 1 to {len(T_95) + 1}")
    mean = fmean(values)
    half = 0.0
    if len(values) > 1:
        half = T_95[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, tuple(values))


def smooth(losses: Sequence[float]) -> list[float]:
    """Centred running median, over fewer at both ends; the first loss, at step 0, stays itself.

    [9, 3, 5, 4, 1] with a window of 5: 9, 5 (of 9 3 5), 4 (of all), 4 (of 5 4 1), 1.
    """
    smoothed = []
    for index in range(len(losses)):
        half = min(WINDOW // 2, index, len(losses) - 1 - index)
        smoothed.append(median(losses[index - half : index + half + 1]))
    return smoothed


def falling(points: Sequence[Point]) -> list[Point]:
    """The best of the smoothed losses so far, at each point."""
    best = math.inf
    curve = []
    for point, loss in zip(points, smooth([point.loss for point in points]), strict=True):
        best = min(best, loss)
        curve.append(point._replace(loss=best))
    return curve


def loss_at(record: Record, share: float) -> float:
    """Loss of a run after a share of its operations."""
    return loss_after(record, share * record.points[-1].flops)


def loss_after(record: Record, wanted: float) -> float:
    """Loss of a run after so many operations, in between points linearly; the last if it ends."""
    curve = falling(record.points)
    for before, after in zip(curve, curve[1:], strict=False):
        if after.flops >= wanted:
            part = (wanted - before.flops) / (after.flops - before.flops)
            return before.loss + part * (after.loss - before.loss)
    return curve[-1].loss


def cost_to(record: Record, loss: float) -> Cost | None:
    """What a run spent until its loss had come down to `loss`; None if it never did."""
    curve = falling(record.points)
    if curve[0].loss <= loss:
        return Cost(curve[0].flops, curve[0].seconds)
    for before, after in zip(curve, curve[1:], strict=False):
        if after.loss <= loss:
            part = (before.loss - loss) / (before.loss - after.loss)
            return Cost(
                before.flops + part * (after.flops - before.flops),
                before.seconds + part * (after.seconds - before.seconds),
            )
    return None


def compare_costs(arms: Sequence[Record], scratch: Sequence[Record], share: float) -> Ratio:
    """Cost of an arm over scratch's, at the loss that scratch has after a share of its budget.

    Arm and scratch are paired seed by seed, and so are the losses.
    """
    rows: list[tuple[float, float, float, float]] = []
    is_fair = True
    for arm, base in zip(arms, scratch, strict=True):
        target = loss_at(base, share)
        is_fair = is_fair and arm.points[0].loss > target
        spent, whole = cost_to(arm, target), cost_to(base, target)
        assert whole is not None  # scratch came there itself
        if spent is not None:
            flops, seconds = arm.charged
            rows.append(
                (
                    spent.flops / whole.flops,
                    (spent.flops + flops) / whole.flops,
                    spent.seconds / whole.seconds,
                    (spent.seconds + seconds) / whole.seconds,
                )
            )
    if len(rows) < len(arms):
        return Ratio(None, None, None, None, len(rows), is_fair)
    free, charged, free_s, charged_s = (interval(column) for column in zip(*rows, strict=True))
    return Ratio(free, charged, free_s, charged_s, len(rows), is_fair)


def compare_ends(arms: Sequence[Record], others: Sequence[Record]) -> Interval:
    """How much lower the last smoothed loss of an arm is than another's, seed by seed."""
    return interval(
        [
            falling(other.points)[-1].loss - falling(arm.points)[-1].loss
            for arm, other in zip(arms, others, strict=True)
        ]
    )


def compare_at(arms: Sequence[Record], others: Sequence[Record]) -> Interval:
    """How much lower an arm ends than a longer run was after the same operations, seed by seed."""
    gains = []
    for arm, other in zip(arms, others, strict=True):
        end = falling(arm.points)[-1]
        gains.append(loss_after(other, end.flops) - end.loss)
    return interval(gains)


def best_loss(record: Record) -> Point:
    """The point with the lowest smoothed loss, the first of equals."""
    losses = smooth([point.loss for point in record.points])
    index = losses.index(min(losses))
    return record.points[index]._replace(loss=losses[index])


def compare_steps(arms: Sequence[Record], alone: Sequence[Record]) -> tuple[Interval | None, int]:
    """Steps of an arm to the other's best loss, as a share of those that it took the other.

    The second value counts the seeds that got there; the first is None if not all did.
    """
    shares = []
    for arm, other in zip(arms, alone, strict=True):
        best = best_loss(other)
        steps = [point.step for point in falling(arm.points) if point.loss <= best.loss]
        if steps:
            shares.append(steps[0] / best.step)
    if len(shares) < len(arms):
        return None, len(shares)
    return interval(shares), len(shares)
