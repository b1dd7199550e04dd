"""What `infmoe bench-engine` tells: rates, whether tokens are equal, ratios, a line of JSON."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from engine.bench import spread
from engine.bench_engine_contenders import KINDS, Answer
from engine.bench_report import format_spread


class Run(NamedTuple):
    """One case, once, by one contender."""

    contender: str
    case: str
    seed: int
    answers: list[Answer]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all texts over the time until the last one ended."""
        return self._num_tokens() / max(answer.end_s for answer in self.answers)

    @property
    def decode_tokens_per_s(self) -> float:
        """The same without the first token of each text and the time until it came."""
        end_s = max(answer.end_s for answer in self.answers)
        first_s = max(answer.first_s for answer in self.answers)
        return (self._num_tokens() - len(self.answers)) / (end_s - first_s)

    @property
    def first_ms(self) -> float:
        """Milliseconds until each text of the batch had its first token."""
        return 1000 * max(answer.first_s for answer in self.answers)

    def _num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)


def make_row(name: str, note: str | None, runs: list[Run]) -> dict[str, object]:
    """A contender's numbers, case by case."""
    cases: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.contender == name:
            cases[run.case].append(run)
    row: dict[str, object] = {"note": note or ""}
    for case, found in cases.items():
        row[case] = {"tokens_per_s": spread([run.tokens_per_s for run in found])}
        if case != "uneven":
            row[case] = {
                "tokens_per_s": spread([run.tokens_per_s for run in found]),
                "decode_tokens_per_s": spread([run.decode_tokens_per_s for run in found]),
                "first_token_ms": spread([run.first_ms for run in found]),
            }
    return row


def compare_tokens(runs: list[Run]) -> dict[str, dict[str, object]]:
    """How many texts each made exactly as ours of the same type did, and where it first did not."""
    made = {(run.contender, run.case, run.seed): run.answers for run in runs}
    found: dict[str, dict[str, object]] = {}
    for name in KINDS:
        ours = f"ours-{name.rpartition('-')[2]}"
        pairs = [
            (case, seed, index, mine.tokens, theirs.tokens)
            for (contender, case, seed), answers in made.items()
            if contender == name != ours and (ours, case, seed) in made
            for index, (mine, theirs) in enumerate(
                zip(made[ours, case, seed], answers, strict=True)
            )
        ]
        if pairs:
            found[name] = _compared(pairs)
    return found


def _compared(
    pairs: list[tuple[str, int, int, list[int], list[int]]],
) -> dict[str, object]:
    different = [pair for pair in pairs if pair[3] != pair[4]]
    first = None
    if different:
        case, seed, index, mine, theirs = different[0]
        both = zip(mine, theirs, strict=False)
        place = next((i for i, (a, b) in enumerate(both) if a != b), min(len(mine), len(theirs)))
        first = {"case": case, "seed": seed, "text": index, "token": place}
    return {"texts": len(pairs), "equal": len(pairs) - len(different), "first_difference": first}


def ratios(runs: list[Run]) -> dict[str, float]:
    """How many times faster ours is than the others of the same type, by medians."""
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        rates[run.contender, run.case].append(run.tokens_per_s)
    found = {}
    for (name, case), theirs in rates.items():
        ours = rates.get((f"ours-{name.rpartition('-')[2]}", case))
        if ours and not name.startswith("ours"):
            ratio = statistics.median(ours) / statistics.median(theirs)
            found[f"{case} ours_over_{name}"] = round(ratio, 3)
    return found


def print_report(report: Mapping[str, object]) -> None:
    """A table for people and, as the last line, one JSON object."""
    models = report["models"]
    assert isinstance(models, dict)
    for key, value in report.items():
        if key != "models":
            print(f"{key:<26}{value}")
    for size, model in models.items():
        print(f"\n{size:<20}{'case':<9}{'tokens/s':<32}{'decode tokens/s':<32}first token ms")
        for name, row in model["rows"].items():
            _print_row(name, row)
        for key in (
            "memory_gb_per_s",
            "share_of_memory_limit",
            "tokens_equal",
            "ratios",
            "adapters",
        ):
            _print_facts(key, model.get(key))
    print(json.dumps(report))


def _print_row(name: str, row: Mapping[str, object]) -> None:
    if row["note"]:
        print(f"{name:<20}{row['note']}")
    for case, rates in row.items():
        if isinstance(rates, dict):
            cells = "".join(f"{format_spread(rate):<32}" for rate in rates.values())
            print(f"{name:<20}{case:<9}{cells}".rstrip())


def _print_facts(key: str, value: object) -> None:
    if not isinstance(value, dict):
        print(f"{key:<29}{value}")
    elif "median" in value:
        print(f"{key:<29}{format_spread(value)}")
    else:
        for name, fact in value.items():
            print(f"{key if name == next(iter(value)) else '':<29}{name:<36}{fact}")
