"""The `infmoe` command: a table of sub-commands, of which only the chosen one is imported."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

import typer

from engine.errors import EngineError


class Command(NamedTuple):
    """Where the function of a sub-command is, and what it does in a line."""

    module: str
    function: str
    help: str


COMMANDS = {
    "serve": Command("server.cli", "serve", "Serve a model over HTTP."),
    "ray": Command("server.cli_ray", "ray", "Serve a model by several replicas on Ray."),
    "health": Command("server.cli_health", "health", "Tell whether a server is well."),
    "keys": Command("server.cli_keys", "app", "Make, list and revoke the keys of a server."),
    "generate": Command("engine.cli", "generate", "Continue a text or fill its blanks."),
    "score": Command("engine.cli_score", "score", "Choose the likeliest of several answers."),
    "tokenize": Command("engine.cli", "tokenize", "Show the tokens of a text."),
    "convert": Command("engine.cli", "convert", "Write a checkpoint as a native model directory."),
    "plan": Command("engine.cli_memory", "plan", "Tell what lives where, before loading."),
    "simulate": Command("engine.cli_simulate", "simulate", "Replay routing under other plans."),
    "inspect": Command("engine.cli", "inspect_model", "Tell what a model directory holds."),
    "make-random": Command("engine.cli", "make_random", "Write a model of random weights."),
    "bench": Command("engine.cli", "bench", "Measure decoding against its limits."),
    "bench-offload": Command("engine.cli_bench", "bench_offload", "Compare ways of offloading."),
    "bench-engine": Command(
        "engine.cli_bench", "bench_engine", "Compare our engine with transformers and CTranslate2."
    ),
    "bench-peers": Command(
        "engine.cli_bench", "bench_peers", "Compare with transformers, llama.cpp and vLLM."
    ),
    "bench-gpu": Command("engine.cli_bench", "bench_gpu", "Measure a GPU with random weights."),
    "bench-inheritance": Command(
        "training.cli_inheritance", "bench_inheritance", "Prove what growing a model saves."
    ),
    "bench-tuning": Command(
        "training.cli_bench_tuning", "bench_tuning", "Compare prompts with full fine-tuning."
    ),
    "bench-server": Command(
        "server.cli_bench", "bench_server", "Measure what the gateway costs, and a load."
    ),
    "train": Command("training.cli", "train", "Train a model as a recipe says."),
    "compare-runs": Command("training.cli", "compare_runs", "Compare training runs, with curves."),
    "eval": Command("training.cli", "compare", "Measure a model against a reference."),
    "story": Command("training.cli_story", "story", "Grow and train a model stage by stage."),
    "lifelong": Command("training.cli_story", "lifelong", "Train on a stream of domains."),
    "grow": Command("training.cli_growth", "grow", "Grow a model without losing what it learnt."),
    "adapter": Command("training.cli_adapters", "app", "List, check, import and export prompts."),
    "tune": Command("training.cli_tune", "tune", "Train a soft prompt for a task."),
    "tune-pairs": Command(
        "training.cli_tune", "tune_pairs", "Make pairs of sentences to pre-train a prompt by."
    ),
    "eval-task": Command("training.cli_tune", "eval_task", "Score a model on labelled rows."),
    "task-data": Command("training.cli", "task_data", "Fetch the rows of the demo adapters."),
    "corpus": Command("training.cli", "corpus", "Fetch free text and build a vocabulary."),
}


def not_chosen() -> None:
    """Stand in for a sub-command that this run does not need."""
    raise AssertionError("a sub-command was run without being imported")


def load(command: Command) -> Callable[..., None] | typer.Typer:
    """Import the function of a sub-command, or the group of them that it stands for."""
    found: Callable[..., None] | typer.Typer
    found = getattr(import_module(command.module), command.function)
    return found


def build_app(chosen: str | None) -> typer.Typer:
    """All sub-commands by name and help; only `chosen` has its function and options."""
    app = typer.Typer(
        name="infmoe",
        help="Inference and training of mixture-of-experts language models.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    for name, command in COMMANDS.items():
        if name != chosen:
            app.command(name, help=command.help)(not_chosen)
        elif isinstance(loaded := load(command), typer.Typer):
            app.add_typer(loaded, name=name)
        else:
            app.command(name)(loaded)  # its own docstring is the longer help
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one sub-command. Exits with 0 done, 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    try:
        build_app(chosen)(args=arguments, prog_name="infmoe")
    except (EngineError, OSError, ValueError) as error:
        print(f"infmoe: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
