"""A tiny recipe on the byte tokenizer, with its texts, for tests of training."""

import json
from dataclasses import replace
from pathlib import Path

from tests.tiny import DENSE
from training.recipe import DataRecipe, DistillRecipe, Recipe, SourceRecipe, TrainRecipe

SENTENCES = ["the cat sat on the mat", "a dog ran in the park", "the sun is warm today"]
SMALL = replace(DENSE, d_model=16, d_ff=24, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)


def write_texts(folder: Path, names=("a",)) -> tuple[SourceRecipe, ...]:
    """Texts of 30 lines, different ones for each name, which is also their group."""
    for shift, name in enumerate(names):
        for part in ("train", "valid"):
            lines = [
                f"{name} {SENTENCES[(i + shift) % 3]} and {SENTENCES[(i + 1) % 3]}"
                for i in range(30)
            ]
            text = "\n".join(lines) + "\n"
            (folder / f"{name}-{part}.txt").write_text(text, encoding="utf-8")
    return tuple(
        SourceRecipe(train=f"{name}-train.txt", valid=f"{name}-valid.txt", group=name)
        for name in names
    )


def tiny_recipe(folder: Path, *, model=SMALL, names=("a",), distill=None, data=None, **train):
    settings = {
        "steps": 6,
        "rows": 2,
        "accumulation": 2,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "eval_every": 3,
        "eval_batches": 2,
        "checkpoint_every": 2,
    }
    texts = DataRecipe(
        tokenizer=".",
        sources=write_texts(folder, names),
        source_length=48,
        target_length=24,
        window=48,
        mean_span=3.0,
        **(data or {}),
    )
    teaching = None if distill is None else DistillRecipe(**distill)
    return Recipe(
        model=model,
        data=texts,
        train=TrainRecipe(**settings | train),
        folder=folder,
        distill=teaching,
    )


MODEL = {
    "vocab_size": 384,
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "tokenizer": "bytes",
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_ids": [1],
}
DATA = {
    "tokenizer": ".",
    "source_length": 48,
    "target_length": 24,
    "window": 48,
    "mean_span": 3,
}
TRAIN = {
    "steps": 4,
    "rows": 2,
    "precision": "fp32",
    "eval_every": 2,
    "eval_batches": 2,
    "checkpoint_every": 2,
}


def recipe_text(*, names=("a",), model=None, data=None, train=None, more="") -> str:
    """The same as a TOML file, for tests of what reads one; `more` are tables at its end."""
    lines = ["[model]", *_lines(MODEL | (model or {})), "[data]", *_lines(DATA | (data or {}))]
    for name in names:
        source = {"train": f"{name}-train.txt", "valid": f"{name}-valid.txt", "group": name}
        lines += ["[[data.sources]]", *_lines(source)]
    lines += ["[train]", *_lines(TRAIN | (train or {}))]
    return "\n".join(lines) + "\n" + more


def _lines(table: dict) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]  # JSON is TOML here


def rows(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


class Killed(Exception):
    pass


def kill_after(step: int):
    def kill(row):
        if row["step"] == step:
            raise Killed

    return kill
