"""Commands of the engine: `infmoe generate`, `tokenize`, `convert`, `inspect`, `bench`."""

import json
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.model_paths import find_model

if TYPE_CHECKING:
    from engine.request import Event

MODEL_HELP = "Model directory, GGUF file, or smollm2."
ModelArgument = Annotated[Path, typer.Argument(help=MODEL_HELP, parser=find_model)]
DtypeName = Literal["fp32", "bf16", "fp16"]
MaxLenOption = Annotated[
    int | None,
    typer.Option(min=2, help="Longest text; above what it was trained on for LongRoPE models."),
]
ExpertFormat = Literal["none", "int8", "int4"]


def generate(  # noqa: PLR0913  the options are the interface
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="What to continue; - reads standard input.")],
    fill: Annotated[
        bool, typer.Option("--fill", help="Fill each <span> of the text instead.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this share of the probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled text repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may repeat.")] = None,
    beams: Annotated[
        int, typer.Option(help="Beams of a beam search; 1 searches none.", min=1, max=32)
    ] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="With beams: above 0 favours long answers.")
    ] = 1.0,
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Host memory to keep within, all told: 24GiB.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Compute on the GPU, within this much of its memory.")
    ] = None,
    record_routing: Annotated[
        Path | None, typer.Option(help="Write which experts were wanted, for infmoe simulate.")
    ] = None,
    max_model_len: MaxLenOption = None,
) -> None:
    """Continue a text, or fill its blanks, and print the answer as it comes."""
    from engine.beam import answer_text, beam_search
    from engine.cores import set_threads
    from engine.footprint import PREFIX_TOKENS, Workload
    from engine.generation import generate as run
    from engine.loading import load_within, read_storage
    from engine.model.dtypes import parse_dtype
    from engine.prompt import build_request, check_tokenizer
    from engine.request import BeamParams, SamplingParams
    from engine.routing import check_trace_path, recorded
    from engine.tokenizer import open_tokenizer
    from engine.units import parse_bytes

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if record_routing is not None:
        check_trace_path(record_routing)
    config = read_storage(model, max_model_len=max_model_len).config
    config = replace(config, max_model_len=max_model_len or 0)
    tokenizer = open_tokenizer(model, config.tokenizer)
    check_tokenizer(tokenizer, config)
    text = sys.stdin.read() if text == "-" else text
    request = build_request(text, tokenizer, config, params, "cli", fill=fill)
    set_threads(None)
    loaded = load_within(
        model,
        parse_dtype(dtype),
        None if memory is None else parse_bytes(memory),
        None if gpu_memory is None else parse_bytes(gpu_memory),
        on_plan=lambda plan: typer.echo("\n".join(plan.summary()), err=True),
        workload=Workload(
            rows=beams,
            source_tokens=len(request.encoder_ids),
            target_tokens=len(request.decoder_ids) + max_tokens + PREFIX_TOKENS,
        ),
        max_model_len=max_model_len,
    )
    with closing(loaded), recorded(loaded.model, record_routing):
        if beams > 1:
            search = BeamParams(num_beams=beams, length_penalty=length_penalty)
            best = beam_search(loaded.model, tokenizer, request, search)[0]
            typer.echo(answer_text(request, tokenizer, config, best))
        else:
            print_pieces(run(loaded.model, tokenizer, request))
        if loaded.experts is not None:
            typer.echo(loaded.experts.summary(), err=True)


def print_pieces(events: "Iterable[Event]") -> None:
    """Print the text as it comes; each blank on a line of its own."""
    from engine.request import Piece

    blank = 0
    for event in events:
        if isinstance(event, Piece):
            typer.echo("\n" * (event.blank - blank) + event.text, nl=False)
            sys.stdout.flush()
            blank = event.blank
    typer.echo()


def tokenize(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="Text to tokenize; - reads standard input.")],
) -> None:
    """Print the ids of a text, one line each with the piece that it stands for."""
    from engine.convert import open_source
    from engine.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(model, open_source(model).config.tokenizer)
    text = sys.stdin.read() if text == "-" else text
    for token_id in tokenizer.encode(text):
        typer.echo(f"{token_id}\t{tokenizer.decode([token_id])!r}")


def convert(
    src: Annotated[
        Path,
        typer.Argument(help="CPM rank files, Hugging Face, GGUF or native.", parser=find_model),
    ],
    dst: Annotated[Path, typer.Argument(help="Directory to write; an older model is replaced.")],
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    vocab: Annotated[Path | None, typer.Option(help="Vocabulary of a CPM checkpoint.")] = None,
    experts: Annotated[ExpertFormat, typer.Option(help="Quantise the experts.")] = "none",
) -> None:
    """Write a checkpoint as a native model directory. Resumes if it was cut off."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from engine.convert import Progress as Done
    from engine.convert import convert as run
    from engine.model.dtypes import parse_dtype

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)

        def report(done: Done) -> None:
            bar.update(
                task, completed=done.done_bytes, total=done.total_bytes, description=done.item
            )

        run(src, dst, parse_dtype(dtype), report, vocab, experts)
    typer.echo(str(dst))


def inspect_model(
    model: ModelArgument,
    vocab: Annotated[Path | None, typer.Option(help="Vocabulary of a CPM checkpoint.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a model directory holds: kind, sizes, parameters, files."""
    from engine.convert import inspect

    facts = inspect(model, vocab)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if key == "files" and isinstance(value, list):
            for file in value:
                typer.echo(f"{'file':<16}{file['name']}  {file['bytes']:,} bytes")
        elif isinstance(value, dict):
            for name, item in value.items():
                shown = f"{item:,}" if isinstance(item, int) else str(item)
                typer.echo(f"{key:<16}{name} {shown}")
        elif isinstance(value, list):
            typer.echo(f"{key:<16}{', '.join(map(str, value))}")
        else:
            typer.echo(f"{key:<16}{value:,}" if isinstance(value, int) else f"{key:<16}{value}")


def make_random(
    dst: Annotated[Path, typer.Argument(help="Directory to write; an older model is replaced.")],
    d_model: Annotated[int, typer.Option(help="Model width; a multiple of 64.")] = 1024,
    d_ff: Annotated[int, typer.Option(help="Feed-forward width.")] = 2560,
    layers: Annotated[int, typer.Option(help="Layers of each stack.")] = 6,
    experts: Annotated[int, typer.Option(help="Experts per layer; 0 is dense.")] = 24,
    dtype: Annotated[DtypeName, typer.Option(help="Number format.")] = "bf16",
    expert_dtype: Annotated[ExpertFormat, typer.Option(help="Quantise the experts.")] = "none",
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
) -> None:
    """Write a CPM-2-MoE-shaped model of random weights, for trying out memory and speed."""
    from engine.config import ModelConfig
    from engine.model.dtypes import DTYPES
    from engine.random_model import write_random_model
    from engine.tokenizer import ByteTokenizer

    config = ModelConfig(
        vocab_size=ByteTokenizer.vocab_size,
        d_model=d_model,
        d_ff=d_ff,
        d_kv=64,
        num_heads=max(d_model // 64, 1),
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        num_experts=experts,
        tokenizer="bytes",
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_ids=(1,),
    )

    def report(done: int, total: int) -> None:
        typer.echo(f"layer {done} of {total}", err=True)

    write_random_model(dst, config, DTYPES[dtype], seed, report, expert_dtype)
    typer.echo(str(dst))


def bench(
    model: ModelArgument,
    source_tokens: Annotated[int, typer.Option(min=1, help="Encoder length.")] = 128,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 64,
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    expert_memory: Annotated[
        str | None, typer.Option(help="Offload experts to disk; hold this much of them: 1.5GiB.")
    ] = None,
) -> None:
    """Measure decoding against recomputing without a cache, and against the memory bandwidth."""
    from engine.bench import print_report, run_bench
    from engine.model.dtypes import parse_dtype
    from engine.units import parse_bytes

    budget = None if expert_memory is None else parse_bytes(expert_memory)
    print_report(run_bench(model, parse_dtype(dtype), source_tokens, decode_tokens, budget))
