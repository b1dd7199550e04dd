"""What tuning takes in memory and time, of the benchmark's model and of a wider random one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from engine.checkpoint import save_model
from engine.checkpoint_writer import sync
from engine.config import ModelConfig
from engine.model.initial import initialize
from engine.model.transformer import Transformer
from engine.tokenizer import ByteTokenizer
from training.bench_tuning_arms import Budget
from training.bench_tuning_runs import Say
from training.tune_cost import Cost, Probe

Measure = Callable[[Probe], Cost]
HEAD_WIDTH = 64


def head(path: Path, count: int, out: Path) -> Path:
    """The first lines of a file, as a file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    out.write_text("".join(lines), encoding="utf-8")
    return out


def make_probes(model: Path, data: Path, task: str, work: Path, budget: Budget) -> dict[str, Probe]:
    """Probes of a prompt and of all weights, by model, kind and optimizer: "model full adam"."""
    rows = head(data / "train.jsonl", 4 * budget.batch, work / "probe.jsonl")
    write_wide(work / "wide", *budget.wide)
    plain = Probe(
        model=str(model.absolute()),
        data=str(rows.absolute()),
        task=task,
        run="",
        vectors=budget.vectors,
        steps=budget.probe_steps,
        rows=budget.batch,
    )
    wide = replace(plain, model=str((work / "wide").absolute()), rows=max(budget.batch // 2, 1))
    probes = {}
    for kind in ("prompt", "full"):
        for name, probe, optimizer in (
            ("model", plain, "adafactor"),
            ("model", plain, "adam"),
            ("wide", wide, "adam"),
        ):
            probes[f"{name} {kind} {optimizer}"] = replace(
                probe, optimizer=optimizer, full=kind == "full"
            )
    return probes


def write_wide(path: Path, d_model: int, layers: int) -> None:
    """Write a dense model of random weights, unless it is there."""
    config = ModelConfig(
        vocab_size=ByteTokenizer.vocab_size,
        d_model=d_model,
        d_ff=5 * d_model // 2,
        d_kv=HEAD_WIDTH,
        num_heads=max(d_model // HEAD_WIDTH, 1),
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        tokenizer="bytes",
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_ids=(1,),
    )
    if not path.exists():
        model = Transformer(config)
        initialize(model, 0)
        save_model(model, path)


def find_cost(work: Path, name: str, probe: Probe, measure: Measure, say: Say) -> Cost:
    """A cost, measured now unless it was before by the same probe."""
    path = work / f"cost {name}.json".replace(" ", "-")
    names = {"model": Path(probe.model).name, "data": Path(probe.data).name}
    made_of = asdict(probe) | names  # wherever they are
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["made_of"] == made_of:
            return Cost(**found["cost"])
    run = work / "probe"
    shutil.rmtree(run, ignore_errors=True)
    cost = measure(replace(probe, run=str(run.absolute())))
    shutil.rmtree(run, ignore_errors=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"made_of": made_of, "cost": cost._asdict()}), encoding="utf-8")
    sync(partial)
    partial.replace(path)
    say(f"{name}: {cost.peak_bytes / 2**20:.0f} MiB, {cost.step_s:.3f} s a step")
    return cost
