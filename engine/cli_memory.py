"""The command `infmoe plan`: who would live where, and how fast that could be, before loading."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from engine.machine import Bandwidths
    from engine.planning import MemoryPlan
    from engine.prediction import Pass, Prediction

StorageName = Literal["bf16", "fp16", "fp32", "int8", "int4"]

WHERE = {
    "pinned": "pinned in slots",
    "decode": "slots for decoding",
    "sweep": "slots for the sweep",
    "host": "in host memory",
    "disk": "only on disk",
}
BASIS = (
    "prediction: bytes over bandwidth, from no overlap to perfect overlap; routing uniform\n"
    "(the launching of kernels and, where many tokens compute at once, arithmetic come on top)"
)


def plan(  # noqa: PLR0913  the options are the interface
    model: Annotated[
        str, typer.Argument(help="Model directory, GGUF file, config.json, or cpm2-moe-198b.")
    ],
    memory: Annotated[
        str | None, typer.Option(help="Host memory, all told: 24GiB. Default: as serve.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="GPU memory, all told. Default: the CPU computes.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows decoded at once. Default: as serve, up to 32.")
    ] = None,
    source_tokens: Annotated[
        int | None, typer.Option(min=1, help="Encoder length. Default: the longest accepted.")
    ] = None,
    target_tokens: Annotated[
        int | None, typer.Option(min=1, help="Decoder length. Default: the longest accepted.")
    ] = None,
    dtype: Annotated[
        StorageName | None, typer.Option(help="How experts would be stored; a directory tells.")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="Bandwidth of the disk: 3GB/s. Default: measured.")
    ] = None,
    dram: Annotated[str | None, typer.Option(help="Bandwidth of host memory.")] = None,
    link: Annotated[str | None, typer.Option(help="Bandwidth from host memory to GPU.")] = None,
    hbm: Annotated[str | None, typer.Option(help="Bandwidth of GPU memory.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure bandwidths anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan the whole memory for a model: who lives where, and what speed that allows.

    Budgets may be those of another machine; then give its bandwidths too.
    """
    from dataclasses import replace

    from engine.footprint import largest_workload
    from engine.loading import find_storage, plan_elsewhere
    from engine.machine import cache_folder, find_bandwidths, parse_bandwidth
    from engine.prediction import predict
    from engine.scheduler import Limits
    from engine.units import parse_bytes

    storage, files = find_storage(model, dtype)
    lengths = {"source_tokens": source_tokens, "target_tokens": target_tokens}
    given = {name: length for name, length in lengths.items() if length is not None}
    workload = replace(largest_workload(storage.config, batch or 1), **given)
    rates = {"disk": disk, "dram": dram, "link": link, "hbm": hbm}
    known = {tier: parse_bandwidth(text) for tier, text in rates.items() if text is not None}
    host_bytes = None if memory is None else parse_bytes(memory)
    gpu_bytes = None if gpu_memory is None else parse_bytes(gpu_memory)
    most = Limits().max_rows if batch is None else batch
    made = plan_elsewhere(storage, host_bytes, gpu_bytes, workload, most)
    bandwidths = find_bandwidths(files, known, cache_folder(), measure_again=measure)
    predictions = [predict(made, bandwidths, rows) for rows in sorted({1, made.workload.rows})]
    if as_json:
        typer.echo(json.dumps(_to_json(model, made, bandwidths, predictions)))
        return
    lines = [*_plan_lines(model, made), "", *_prediction_lines(predictions, bandwidths)]
    typer.echo("\n".join(lines))


def _to_json(
    model: str, made: "MemoryPlan", bandwidths: "Bandwidths", predictions: "Sequence[Prediction]"
) -> dict[str, object]:
    return {
        "model": model,
        **made.to_json(),
        "bandwidths": bandwidths.to_json(),
        "predictions": [prediction.to_json() for prediction in predictions],
    }


def _plan_lines(model: str, made: "MemoryPlan") -> Iterator[str]:
    """The tables of who lives where and of what takes what."""
    from engine.planning import BUDGET_NAMES
    from engine.units import format_bytes

    storage = made.storage
    dtype = str(storage.dtype).removeprefix("torch.")
    if made.experts is None:
        yield f"{model}: dense, {dtype}"
    else:
        kind = dtype if storage.quantization == "none" else storage.quantization
        size = format_bytes(storage.slot_bytes)
        yield f"{model}: {storage.num_experts} experts of {size} ({kind}), the rest {dtype}"
        yield ""
        yield f"{'experts':<22}{'decoder':>9}{'encoder':>9}{'':>3}{'bytes':>10}"
        for where, counts in made.residence().items():
            stacks = f"{counts['decoder']:>9}{counts['encoder']:>9}"
            total = format_bytes(counts.total() * storage.slot_bytes)
            yield f"{WHERE[where]:<22}{stacks}{'':>3}{total:>10}"
        if made.is_resident:
            yield "all fit: all are resident"
    for place, budget in made.budgets.by_place().items():
        yield ""
        yield f"{BUDGET_NAMES[place]}"
        for line in made.lines:
            if line.place == place:
                yield f"{'  ' + line.part:<22}{format_bytes(line.nbytes):>12}  {line.note}".rstrip()
        yield f"{'  in all':<22}{format_bytes(made.total(place)):>12}  of {format_bytes(budget)}"


def _prediction_lines(
    predictions: "Sequence[Prediction]", bandwidths: "Bandwidths"
) -> Iterator[str]:
    """The bandwidths, and what they allow."""
    from engine.prediction import TIER_NAMES

    for tier, found in bandwidths.by_tier().items():
        if found is not None:
            yield f"{TIER_NAMES[tier]:<34}{found.per_s / 1e9:>10,.2f} GB/s  {found.origin}"
    yield BASIS
    for prediction in predictions:
        rates = prediction.step.tokens_per_s
        name = f"batch {prediction.rows}"
        if rates is None:
            yield f"{name:<13} {_missing(prediction.step)}"
        else:
            yield f"{name:<13} {_span(*rates)} tokens/s, {_detail(prediction.step)}"
    for prediction in predictions:
        sweep = prediction.sweep
        name = f"sweep of {sweep.tokens}"
        if sweep.serial_s is None or sweep.overlapped_s is None:
            yield f"{name:<13} {_missing(sweep)}"
        else:
            yield f"{name:<13} {_span(sweep.overlapped_s, sweep.serial_s)} s, {_detail(sweep)}"


def _missing(found: "Pass") -> str:
    options = ", ".join(f"--{tier}" for tier in found.missing)
    return f"not known: give {options}"


def _span(low: float, high: float) -> str:
    """Two numbers, or one if they look alike."""
    first, second = f"{low:.3g}", f"{high:.3g}"
    return first if first == second else f"{first} to {second}"


def _detail(found: "Pass") -> str:
    """What binds a pass, and the bytes behind it."""
    from engine.prediction import TIER_NAMES
    from engine.units import format_bytes

    assert found.bound_by is not None
    moved = [f"{tier} {format_bytes(size)}" for tier, size in found.tier_bytes.items() if size]
    hits = f"; {found.hit_share:.0%} of {found.wanted_experts:.1f} experts hit"
    shown = hits if found.wanted_experts else ""
    return f"bound by {TIER_NAMES[found.bound_by]} ({', '.join(moved)}{shown})"
