"""The command `infmoe score`: which of several continuations a model finds likeliest."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from engine.model_paths import find_model

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.request import Score
    from engine.scoring import Question
    from engine.tokenizer import Tokenizer

DtypeName = Literal["fp32", "bf16", "fp16"]
By = Literal["total", "mean"]


class Item(NamedTuple):
    """A text, what may follow it or fill its blank, and the number of the right one if known."""

    text: str
    choices: list[str]
    answer: int | None = None


def score(
    model: Annotated[
        Path, typer.Argument(help="Model directory, GGUF file, or smollm2.", parser=find_model)
    ],
    text: Annotated[
        str | None, typer.Argument(help="A text; with <span> in it, the choices fill that blank.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="What may follow or fill; repeat it.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='Lines of JSON: {"text": ..., "choices": [...], "answer": 0}.'),
    ] = None,
    by: Annotated[
        By, typer.Option(help="Compare sums of log-probabilities, or means per token.")
    ] = "mean",
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Host memory to keep within, all told: 24GiB.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Longest text; above what it was trained on for LongRoPE models."),
    ] = None,
) -> None:
    """Say how likely each choice is and which is likeliest; with answers, how often that is right.

    A line of JSON for each text. Zero-shot choice by perplexity, as CPM-1 was evaluated.
    """
    from engine.cores import set_threads
    from engine.loading import load_within, read_storage
    from engine.model.dtypes import parse_dtype
    from engine.scoring import score as run
    from engine.tokenizer import open_tokenizer
    from engine.units import parse_bytes

    if (text is None) == (data is None):
        raise typer.BadParameter("give a text and --choice, or --data", param_hint="TEXT")
    items = read_items(data) if data else [Item(text or "", choice or [])]
    config = read_storage(model, max_model_len=max_model_len).config
    config = replace(config, max_model_len=max_model_len or 0)
    tokenizer = open_tokenizer(model, config.tokenizer)
    questions = [_question(item, tokenizer, config) for item in items]
    budget = None if memory is None else parse_bytes(memory)
    set_threads(None)
    loaded = load_within(model, parse_dtype(dtype), budget, None, max_model_len=max_model_len)
    right = 0
    for item, scores in zip(items, run(loaded.model, tokenizer, questions), strict=True):
        report = describe(item, scores, by)
        right += report.get("right") is True
        typer.echo(json.dumps(report, ensure_ascii=False))
    loaded.close()
    known = sum(item.answer is not None for item in items)
    if known:
        typer.echo(f"right: {right} of {known} ({right / known:.1%})", err=True)


def describe(item: Item, scores: "list[Score]", by: By) -> dict[str, object]:
    """What is told of one text, in JSON's types."""
    values = [getattr(found, by) for found in scores]
    best = max(range(len(values)), key=values.__getitem__)
    report: dict[str, object] = {
        "text": item.text,
        "best": best,
        "choice": item.choices[best],
        "scores": [
            {
                "choice": choice,
                "total": round(found.total, 4),
                "mean": round(found.mean, 4),
                "greedy": found.is_greedy,
            }
            for choice, found in zip(item.choices, scores, strict=True)
        ],
    }
    return report if item.answer is None else report | {"right": best == item.answer}


def read_items(path: Path) -> list[Item]:
    """Read lines of JSON. Raises ValueError, naming file and line, if one is malformed."""
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                items.append(_item(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not items:
        raise ValueError(f"{path}: holds no line")
    return items


def _item(values: object) -> Item:
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise ValueError('expected {"text": "...", "choices": ["...", ...], "answer": 0}')
    if unknown := sorted(values.keys() - set(Item._fields)):
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(Item._fields)}")
    choices, answer = values.get("choices"), values.get("answer")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices is no list of texts, none empty")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        raise ValueError(f"answer is {answer!r}; expected the number of a choice, from 0")
    return Item(values["text"], choices, answer)


def _question(item: Item, tokenizer: "Tokenizer", config: "ModelConfig") -> "Question":
    from engine.demands import check_task
    from engine.prompt import BLANK, build_request
    from engine.request import Continuations, SamplingParams
    from engine.scoring import make_question

    params = SamplingParams(max_tokens=1)  # nothing is generated that would need room
    request = build_request(item.text, tokenizer, config, params, "score", fill=BLANK in item.text)
    question = make_question(request, [tokenizer.encode(c) for c in item.choices], tokenizer)
    check_task(replace(request, task=Continuations(choices=question.choices)), config)
    return question
