"""What `infmoe bench-peers` tells: a row for each contender, tokens that agree, ratios."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from engine.bench import spread
from engine.bench_engine_report import Run
from engine.bench_peers_contenders import Loaded, Told
from engine.bench_report import format_spread
from engine.units import format_bytes

COLUMNS = {
    "batch": 7,
    "tokens/s (min to max)": 30,
    "decoding alone": 30,
    "first token ms": 32,
    "tokens/CPU s": 14,
    "of DRAM": 9,
    "read/token": 12,
}


@dataclass(slots=True)
class Result:
    """What came of a contender: batches of texts, the first of which warmed up. Sizes in bytes."""

    note: str = ""
    loaded: Loaded | None = None
    runs: list[Run] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    limit_bytes: int | None = None
    peak_group_bytes: int | None = None

    def cases(self) -> list[str]:
        """The sizes of batches that ran, after warming up."""
        return list(dict.fromkeys(run.case for run in self.runs if run.seed))

    def warm(self, case: str) -> list[Run]:
        """The batches of a size that were timed."""
        return [run for run in self.runs if run.case == case and run.seed]


def make_row(result: Result, token_bytes: int, bandwidth: float) -> dict[str, object]:
    """A contender's numbers; `token_bytes` are those of weights that a token of one row meets."""
    row: dict[str, object] = {"note": result.note}
    if result.limit_bytes is not None:
        row |= {
            "memory_limit_bytes": result.limit_bytes,
            "peak_group_bytes": result.peak_group_bytes,
        }
    if result.loaded is None or not result.told:
        return row
    row |= {
        "load_s": round(result.loaded.load_s, 3),
        "loaded_rss_bytes": result.loaded.rss_bytes,
        "peak_rss_bytes": result.told[-1].peak_rss_bytes,
        "cases": {case: make_case(result, case, token_bytes, bandwidth) for case in result.cases()},
    }
    return row


def make_case(result: Result, case: str, token_bytes: int, bandwidth: float) -> dict[str, object]:
    """Rates of batches of one size; of one row, the share of the memory's speed as well."""
    runs = result.warm(case)
    decoding = spread([run.decode_tokens_per_s for run in runs])
    told = [told for run, told in zip(result.runs, result.told, strict=True) if run in runs]
    counts = [sum(len(answer.tokens) for answer in each.answers) for each in told]
    read = [each.read_bytes / count for each, count in zip(told, counts, strict=True)]
    cpu = [count / max(each.cpu_s, 0.01) for each, count in zip(told, counts, strict=True)]
    cold = next((run for run in result.runs if run.case == case and not run.seed), None)
    found: dict[str, object] = {
        "tokens_per_s": spread([run.tokens_per_s for run in runs]),
        "decode_tokens_per_s": decoding,
        "first_token_ms": spread([run.first_ms for run in runs]),
        "tokens_per_cpu_s": spread(cpu),
        "read_bytes_per_token": round(statistics.median(read)),
    }
    if cold is not None:
        found["first_text"] = {
            "tokens_per_s": round(cold.tokens_per_s, 3),
            "first_token_ms": round(cold.first_ms, 1),
        }
    if case == "1" and token_bytes:
        found["share_of_dram"] = round(decoding["median"] * token_bytes / bandwidth, 4)
    return found


def agreement(mine: Sequence[Run], theirs: Sequence[Run]) -> dict[str, object]:
    """How many texts are equal, and the share of tokens before the first that differs.

    In bf16 engines round sums in different orders, and near ties fall one way or the other.
    """
    expected = {(run.case, run.seed): run.answers for run in mine}
    pairs = [
        (ours.tokens, other.tokens)
        for run in theirs
        if (run.case, run.seed) in expected
        for ours, other in zip(expected[run.case, run.seed], run.answers, strict=True)
    ]
    if not pairs:
        return {}
    same = [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        for a, b in pairs
    ]
    share = sum(same) / sum(len(a) for a, _ in pairs)
    equal = sum(a == b for a, b in pairs)
    return {"texts": len(pairs), "equal": equal, "tokens_before_difference": round(share, 4)}


def compare(results: Mapping[str, Result], ours: str) -> dict[str, dict[str, object]]:
    """The tokens of all others against ours."""
    mine = results[ours].runs if ours in results else []
    found = {name: agreement(mine, result.runs) for name, result in results.items() if name != ours}
    return {name: facts for name, facts in found.items() if facts}


def ratios(results: Mapping[str, Result], ours: str) -> dict[str, float]:
    """How many times more tokens a second ours makes, by medians, case by case."""
    found: dict[str, float] = {}
    mine = results.get(ours, Result())
    for name, result in results.items():
        for case in result.cases() if name != ours else ():
            if runs := mine.warm(case):
                rates = [
                    statistics.median(run.decode_tokens_per_s for run in some)
                    for some in (runs, result.warm(case))
                ]
                found[f"batch {case}, over {name}"] = round(rates[0] / rates[1], 3)
    return found


def print_report(report: Mapping[str, object]) -> None:
    """A table for each model, and as the last line one JSON object."""
    for key, value in report.items():
        if not isinstance(value, dict):
            print(f"{key:<26}{value}")
    for title, part in report.items():
        if isinstance(part, dict):
            print(f"\n{title:<22}" + "".join(f"{name:<{size}}" for name, size in COLUMNS.items()))
            _print_part(part)
    print(json.dumps(report))


def _print_part(part: Mapping[str, object]) -> None:
    for key, value in part.items():
        if key == "rows":
            assert isinstance(value, dict)
            for name, row in value.items():
                _print_row(name, row)
        elif isinstance(value, dict) and value:
            for index, (name, fact) in enumerate(value.items()):
                print(f"{'' if index else key:<26}{name:<40}{fact}")
        elif not isinstance(value, dict):
            print(f"{key:<26}{value}")


def _print_row(name: str, row: Mapping[str, object]) -> None:
    cases = row.get("cases", {})
    assert isinstance(cases, dict)
    for case, facts in cases.items():
        share = facts.get("share_of_dram")
        cells = (
            case,
            format_spread(facts["tokens_per_s"]),
            format_spread(facts["decode_tokens_per_s"]),
            format_spread(facts["first_token_ms"]),
            f"{facts['tokens_per_cpu_s']['median']:.2f}",
            "-" if share is None else f"{share:.1%}",
            format_bytes(facts["read_bytes_per_token"]),
        )
        line = "".join(
            f"{cell:<{size}}" for cell, size in zip(cells, COLUMNS.values(), strict=True)
        )
        first = facts.get("first_text")
        line += f"first text {first['tokens_per_s']:.2f} tokens/s" if first else ""
        print(f"{name:<22}{line}".rstrip())
    peak = row.get("peak_rss_bytes")
    memory = f"peak memory {format_bytes(peak)}" if isinstance(peak, int) else ""
    told = "; ".join(text for text in (memory, str(row["note"])) if text)
    print(f"{'' if cases else name:<22}{told}".rstrip())
