"""What `infmoe bench-offload` tells: a row for each contender, ratios, a table, a line of JSON."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from engine.bench import spread
from engine.bench_contenders import Answer, Loaded, Sample
from engine.units import format_bytes

COLUMNS = {
    "tokens/s (min to max)": 27,
    "sweep s (min to max)": 24,
    "read/token": 12,
    "of disk": 9,
    "peak RSS": 12,
    "with page cache": 17,
}
WIDTHS = tuple(COLUMNS.values())
HEADINGS = "".join(f"{heading:<{width}}" for heading, width in COLUMNS.items()).rstrip()


class Result(NamedTuple):
    """What came of a contender: texts, and the disk's bytes per second around each of them."""

    note: str
    loaded: Loaded | None
    answers: list[Answer]
    disk: tuple[float, ...] = ()
    limit_bytes: int | None = None
    peak_group_bytes: int | None = None

    @property
    def samples(self) -> list[Sample]:
        """The texts that were timed."""
        return [answer.samples[0] for answer in self.answers]

    @property
    def plain(self) -> list[Sample]:
        """The same texts with resident parameters, where both ran."""
        return [answer.samples[1] for answer in self.answers if len(answer.samples) > 1]


def make_row(result: Result) -> dict[str, object]:
    """A contender's numbers. A limit of None is none; the note tells if there should be one."""
    row: dict[str, object] = {
        "note": result.note,
        "memory_limit_bytes": result.limit_bytes,
        "peak_group_bytes": result.peak_group_bytes,
    }
    samples = result.samples
    if result.loaded is None or not samples:
        return row
    per_token = statistics.median(s.decode_read_bytes / len(s.tokens) for s in samples)
    row |= {
        "decode_tokens_per_s": spread(rates(samples)),
        "encode_s": spread([s.encode_s for s in samples]),
        "read_bytes_per_token": round(per_token),
        "encode_read_bytes": round(statistics.median(s.encode_read_bytes for s in samples)),
        "peak_rss_bytes": result.answers[-1].peak_rss_bytes,
        "load_s": round(result.loaded.load_s, 3),
    }
    if result.disk:
        row |= disk_shares(samples, result.disk)
    if result.plain:
        row |= overhead(samples, result.plain)
    return row


def rates(samples: list[Sample]) -> list[float]:
    """Decoded tokens per second of each text."""
    return [len(sample.tokens) / sample.decode_s for sample in samples]


def disk_speed(results: Mapping[str, Result]) -> dict[str, float] | None:
    """What the disk gave in GB/s around each text; None if it was not looked at."""
    disk = next((result.disk for result in results.values() if result.disk), None)
    return spread([speed / 1e9 for speed in disk]) if disk else None


def disk_shares(samples: list[Sample], disk: tuple[float, ...]) -> dict[str, object]:
    """Bytes read over what the disk gave around that time."""
    pairs = list(zip(samples, disk, strict=False))  # one that died has fewer samples
    return {
        "decode_share_of_disk": spread([s.decode_read_bytes / d / s.decode_s for s, d in pairs]),
        "encode_share_of_disk": spread([s.encode_read_bytes / d / s.encode_s for s, d in pairs]),
    }


def overhead(samples: list[Sample], plain: list[Sample]) -> dict[str, object]:
    """What the pipeline adds where nothing has to be read: ratios of medians, less 1."""
    decode = _decode_s(samples) / _decode_s(plain) - 1
    encode = _encode_s(samples) / _encode_s(plain) - 1
    return {
        "plain_decode_tokens_per_s": spread(rates(plain)),
        "plain_encode_s": spread([s.encode_s for s in plain]),
        "decode_overhead": round(decode, 4),
        "encode_overhead": round(encode, 4),
    }


def ratios(results: Mapping[str, Result]) -> dict[str, float]:
    """How many times faster ours is than the others, by medians; only for those that ran."""
    ours = results["offload"].samples if "offload" in results else []
    found = {}
    for name in ("mmap", "accelerate"):
        theirs = results[name].samples if name in results else []
        if ours and theirs:
            decode = _decode_s(theirs) / _decode_s(ours)
            encode = _encode_s(theirs) / _encode_s(ours)
            found[f"decode_ours_over_{name}"] = round(decode, 3)
            found[f"encode_ours_over_{name}"] = round(encode, 3)
    return found


def tokens_equal(results: Mapping[str, Result]) -> bool | None:
    """Whether all of ours made the same tokens of each text; None if there is but one of a text."""
    made: dict[int, list[list[int]]] = defaultdict(list)
    for name, result in results.items():
        if name != "accelerate":  # another model
            for sample in (*result.samples, *result.plain):
                made[sample.seed].append(sample.tokens)
    if not any(len(tokens) > 1 for tokens in made.values()):
        return None
    return all(each == tokens[0] for tokens in made.values() for each in tokens)


def _decode_s(samples: list[Sample]) -> float:
    return statistics.median(sample.decode_s for sample in samples)


def _encode_s(samples: list[Sample]) -> float:
    return statistics.median(sample.encode_s for sample in samples)


def print_report(report: Mapping[str, object]) -> None:
    """A table for people and, as the last line, one JSON object."""
    rows, found = report["rows"], report["ratios"]
    assert isinstance(rows, dict)
    assert isinstance(found, dict)
    for key, value in report.items():
        if not isinstance(value, dict):
            print(f"{key:<26}{value}")
        elif "median" in value:
            print(f"{key:<26}{format_spread(value)}")
    print(f"\n{'':<12}{HEADINGS}")
    for name, row in rows.items():
        print(f"{name:<12}{format_row(row)}")
    print()
    for name, ratio in found.items():
        print(f"{name:<28}{ratio}")
    print(json.dumps(report))


def format_row(row: Mapping[str, object]) -> str:
    """A line of the table."""
    rate, sweep, share = (
        row.get(key) for key in ("decode_tokens_per_s", "encode_s", "decode_share_of_disk")
    )
    if not isinstance(rate, dict) or not isinstance(sweep, dict):
        return str(row["note"])
    cells = (
        format_spread(rate),
        format_spread(sweep),
        _bytes(row["read_bytes_per_token"]),
        f"{share['median']:.1%}" if isinstance(share, dict) else "-",
        _bytes(row["peak_rss_bytes"]),
        _bytes(row["peak_group_bytes"]),
    )
    text = "".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    if "decode_overhead" in row:
        text += f"{row['decode_overhead']:+.1%} to decode, {row['encode_overhead']:+.1%} to sweep "
    return (text + str(row["note"])).rstrip()


def format_spread(values: Mapping[str, float]) -> str:
    """Median, minimum and maximum."""
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def _bytes(value: object) -> str:
    return format_bytes(value) if isinstance(value, int) else "-"
