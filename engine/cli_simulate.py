"""The command `infmoe simulate`: what plans would do, without the machine and without the model."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from offload.ceiling import Ceiling
    from offload.planner import ExpertPlan
    from offload.simulate import Machine, Report
    from offload.trace import RoutingTrace

LOG_EVERY_S = 10.0
OPTIONS = {"disk": "--disk", "link": "--link", "memory": "--memory-bandwidth"}

Row = dict[str, object]


def simulate(  # noqa: PLR0913  the options are the interface
    trace: Annotated[str, typer.Option(help="An .npz file, or uniform, zipf, bursty: made up.")],
    plan: Annotated[Path, typer.Option(help="What `infmoe plan --json` printed.")],
    texts: Annotated[int | None, typer.Option(help="Texts to make up: 8.")] = None,
    source_tokens: Annotated[int | None, typer.Option(help="Tokens of a sweep: 512.")] = None,
    steps: Annotated[int | None, typer.Option(help="Decode steps of a text: 64.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a decode step: 1.")] = None,
    precision: Annotated[float | None, typer.Option(help="Share of right guesses: 0.9.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes another trace of the kind: 0.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="First steps that do not count.")] = 0,
    disk: Annotated[
        str | None, typer.Option(help="Bandwidth of the disk: 3GB/s. Default: the plan's.")
    ] = None,
    link: Annotated[str | None, typer.Option(help="Bandwidth from host memory to GPU.")] = None,
    memory_bandwidth: Annotated[
        str | None, typer.Option(help="Bandwidth of the memory that is computed from.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table as a PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Replay a routing trace under a plan and under others with the same slots, in a table.

    The last line is one JSON object. The pipeline is the one that serves; disk, link and time are
    simulated. `belady` is what no policy could better, knowing the future.
    """
    from engine.machine import parse_bandwidth
    from offload.ceiling import ceiling
    from offload.simulate import compare

    wishes = {"disk": disk, "link": link, "memory": memory_bandwidth}
    speeds = {k: parse_bandwidth(text).per_s for k, text in wishes.items() if text is not None}
    found = read_plan(plan, speeds)
    made_up = {
        "texts": texts,
        "source_tokens": source_tokens,
        "steps": steps,
        "batch": batch,
        "precision": precision,
        "seed": seed,
    }
    routing = find_trace(trace, found.plan, {k: v for k, v in made_up.items() if v is not None})
    draw = find_plotter() if plot else None
    with progress() as on_each:
        reports = compare(
            routing,
            found.plan,
            found.machine,
            num_host=found.num_host,
            warm_up=warm_up,
            on_each=on_each,
        )
    best = ceiling(routing, found.plan, found.machine, warm_up=warm_up)
    rows = [*map(report_row, reports), ceiling_row(best, found.machine)]
    if not as_json:
        typer.echo("\n".join(table(rows)))
    if plot and draw:
        draw(rows, plot)
        typer.echo(f"drawn in {plot}", err=True)
    told = {"trace": trace, "plan": str(plan), **facts(routing, reports[0])}
    typer.echo(json.dumps(told | {"policies": rows}))


class FoundPlan(NamedTuple):
    """A plan of experts, the machine it is for, and the experts that its host memory could hold."""

    plan: "ExpertPlan"
    machine: "Machine"
    num_host: int


def read_plan(path: Path, speeds: Mapping[str, float]) -> FoundPlan:
    """Read what `infmoe plan --json` printed. `speeds` (disk, link, memory) replace its bandwidths.

    What a pass reads beside experts is taken from the plan's predictions of it.
    Raises ConfigError, naming the file, if it is damaged or a bandwidth is not known.
    """
    from engine.errors import ConfigError
    from engine.planning import plan_from_json

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"is {type(values).__name__}, not an object")
        plan = plan_from_json(values)
        check_plan(plan)
        machine = read_machine(values, plan, speeds)
        spare = values["budget_bytes"]["host"] - values["planned_bytes"]["host"]
        num_host = len(plan.host) + max(spare, 0) // plan.slot_bytes
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ConfigError(f"{path}: is not what `infmoe plan --json` prints: {error!r}") from error
    return FoundPlan(plan, machine, num_host if machine.link is not None else 0)


def check_plan(plan: "ExpertPlan") -> None:
    """Raise ValueError unless a plan could have come from the planner."""
    keys = [*plan.pinned, *plan.host]
    places = {(layer, expert) for layer in plan.layers for expert in range(plan.experts_per_layer)}
    if len(set(keys)) < len(keys) or not places.issuperset(keys):
        raise ValueError("an expert is placed twice, or is not of the model")
    if min(plan.slot_bytes, plan.experts_per_layer) < 1 or min(plan.num_decode, plan.num_sweep) < 0:
        raise ValueError("a size is below 1, or a number of slots below 0")
    if len(plan.pinned) < plan.num_experts and plan.num_decode + plan.num_sweep < 1:
        raise ValueError("there is no slot for the experts that are not pinned")


def read_machine(
    values: Mapping[str, Any], plan: "ExpertPlan", speeds: Mapping[str, float]
) -> "Machine":
    """The machine of a plan. Raises ConfigError if a bandwidth is not known, or has no use."""
    from engine.errors import ConfigError
    from offload.simulate import Machine

    has_gpu = "gpu" in values["budget_bytes"]
    tiers = {"disk": "disk", "memory": "hbm" if has_gpu else "dram"}
    if has_gpu:
        tiers["link"] = "link"
    elif "link" in speeds:
        raise ConfigError("--link is given, but the plan is for a machine without a GPU")
    known = dict(speeds)
    for name in tiers.keys() - known.keys():
        found = values["bandwidths"][tiers[name]]
        if found is None:
            raise ConfigError(f"the {name} bandwidth is not known: give {OPTIONS[name]}")
        known[name] = float(found["bytes_per_s"])
    predicted = values["predictions"][-1]
    dense = {
        stack: predicted[stack]["tier_bytes"][tiers["memory"]]
        - predicted[stack]["wanted_experts"] * plan.slot_bytes
        for stack in ("step", "sweep")
    }
    if min(dense.values()) < 0:
        raise ValueError("a pass reads less than its experts")
    return Machine(
        disk=known["disk"],
        memory=known["memory"],
        link=known.get("link"),
        decode_dense_bytes=round(dense["step"]),
        sweep_dense_bytes=round(dense["sweep"]),
    )


def find_trace(name: str, plan: "ExpertPlan", wishes: Mapping[str, Any]) -> "RoutingTrace":
    """Read a trace, or make one up for the model of a plan.

    Raises ValueError if the file is damaged or of another model, or a wish cannot be met.
    """
    from offload.simulate import check_fit
    from offload.trace import load_trace
    from offload.trace_kinds import KINDS, Texts, generate_trace

    if name in KINDS:
        texts = Texts(layers=plan.layers, experts_per_layer=plan.experts_per_layer)
        return generate_trace(name, replace(texts, **wishes))
    if wishes:
        option = next(iter(wishes)).replace("_", "-")
        raise ValueError(f"--{option} is for traces that are made up: {', '.join(KINDS)}")
    trace = load_trace(Path(name))
    try:
        check_fit(trace, plan)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return trace


def report_row(report: "Report") -> Row:
    """A policy as a row of the table, in JSON's types."""
    plan, total = report.plan, report.total
    return {
        "policy": report.policy,
        "lookahead": report.has_lookahead,
        "pinned": len(plan.pinned),
        "decode_slots": plan.num_decode,
        "sweep_slots": plan.num_sweep,
        "hit_rate": total.hit_rate,
        "decode_hit_rate": report.decode.hit_rate,
        "sweep_hit_rate": report.sweep.hit_rate,
        "tokens_per_s": report.decode.tokens_per_s,
        "roofline_share": report.roofline_share,
        "sweep_s": report.sweep.step_s,
        "stall_s": total.stall_s,
        "disk_bytes": total.disk_bytes,
        "link_bytes": total.link_bytes,
        "prefetched": total.prefetched,
        "prefetch_used": total.prefetch_used,
        "prefetch_wasted": total.prefetch_wasted,
    }


def ceiling_row(best: "Ceiling", machine: "Machine") -> Row:
    """The bounds of all policies as a row of the table, in JSON's types."""
    tier = "disk_bytes" if machine.link is None else "link_bytes"
    return {
        "policy": "belady",
        "hit_rate": best.total.hit_rate,
        "decode_hit_rate": best.decode.hit_rate,
        "sweep_hit_rate": best.sweep.hit_rate,
        "tokens_per_s": best.tokens_per_s,
        "sweep_s": best.sweep_s,
        tier: best.loaded_bytes,
    }


def facts(trace: "RoutingTrace", report: "Report") -> Row:
    """What was simulated, in JSON's types."""
    machine, decode = report.machine, report.decode
    return {
        "layers": len(trace.layers),
        "experts_per_layer": trace.experts_per_layer,
        "computed_layers": len(trace),
        "decode_tokens": decode.tokens,
        "disk_bytes_per_s": machine.disk,
        "link_bytes_per_s": machine.link,
        "memory_bytes_per_s": machine.memory,
        "memory_roofline_tokens_per_s": decode.tokens / decode.compute_s if decode.tokens else None,
    }


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows for people."""
    from engine.units import format_bytes

    def share(value: Any) -> str:
        return f"{value:.1%}"

    def number(value: Any) -> str:
        value = max(value, 0.0)  # a difference of equal sums may be a hair below
        return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"

    columns: dict[str, tuple[str, int, Callable[[Any], str]]] = {
        "policy": ("policy", -12, str),
        "lookahead": ("ahead", 5, lambda has: "yes" if has else "no"),
        "pinned": ("pinned", 8, str),
        "decode_slots": ("decode", 7, str),
        "sweep_slots": ("sweep", 6, str),
        "hit_rate": ("hits", 8, share),
        "decode_hit_rate": ("decode", 8, share),
        "sweep_hit_rate": ("sweep", 8, share),
        "tokens_per_s": ("tok/s", 9, number),
        "roofline_share": ("roofline", 9, share),
        "sweep_s": ("sweep s", 11, number),
        "stall_s": ("stall s", 11, number),
        "disk_bytes": ("disk", 12, format_bytes),
        "link_bytes": ("link", 12, format_bytes),
        "prefetched": ("fetched", 9, str),
        "prefetch_wasted": ("wasted", 8, str),
    }
    yield "".join(_aligned(title, width) for title, width, _ in columns.values()).rstrip()
    for row in rows:
        cells = (
            _aligned("-" if row.get(key) is None else shown(row[key]), width)
            for key, (_, width, shown) in columns.items()
        )
        yield "".join(cells).rstrip()


def _aligned(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def find_plotter() -> Callable[[Sequence[Row], Path], None]:
    """What draws the table. Raises ConfigError if matplotlib is not there."""
    from engine.errors import ConfigError

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib: install InfMoE with the extra `train`, infmoe[train]"
        ) from error

    def draw(rows: Sequence[Row], path: Path) -> None:
        figure = Figure(figsize=(8, 6), layout="constrained")
        FigureCanvasAgg(figure)
        names = [_name(row) for row in rows]
        panels = (("tokens_per_s", "decoded tokens per second"), ("hit_rate", "hit rate"))
        for axes, (key, title) in zip(figure.subplots(2, sharex=True), panels, strict=True):
            colors = ["tab:gray" if row["policy"] == "belady" else "tab:blue" for row in rows]
            axes.bar(names, [row[key] or 0 for row in rows], color=colors)
            axes.set_ylabel(title)
            axes.grid(axis="y", alpha=0.3)
        axes.tick_params(axis="x", rotation=30)
        partial = path.with_suffix(".partial.png")
        figure.savefig(partial, dpi=110)
        partial.replace(path)

    return draw


def _name(row: Row) -> str:
    return f"{row['policy']}, ahead" if row.get("lookahead") else str(row["policy"])


@contextmanager
def progress(every_s: float = LOG_EVERY_S) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, in a log a line every so often; on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    last = monotonic()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("simulating", total=None)

        def report(done: int, total: int) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and monotonic() - last >= every_s:
                last = monotonic()
                typer.echo(f"simulated {done:,} of {total:,} layers", err=True)

        yield report
