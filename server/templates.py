"""Chat templates of model directories: run in a sandbox, within bounds of time and size.

A template is code that came with the weights: it may be wrong, and it may be hostile.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from types import FrameType
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.runtime import markup_join, str_join

from engine.checkpoint_gguf import read_gguf_tokenizer_config
from engine.errors import CheckpointError, RequestError
from engine.model_paths import find_gguf
from server.template_sandbox import TemplateCost, check_size, check_whole, make_environment

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 2**20
MAX_CONFIG_BYTES = 2**26  # lists of added tokens can be long
MAX_TIME_S = 1.0
MAX_DEPTH = 300  # calls within each other; compiling an ordinary template takes a hundred
RESERVED = frozenset(
    {"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"}
    | {"chat_template", "tokenize", "raise_exception", "strftime_now", "continue_final_message"}
)
TRACED = frozenset({"jinja2", "markupsafe"})
JOINS = (str_join.__code__, markup_join.__code__)
Plain = str | int | float | bool


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template that has been read, and the names of its own that a request may set."""

    source: str
    bos_token: str
    eos_token: str

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        settings: Mapping[str, object],
        *,
        is_opening: bool,
        max_time_s: float = MAX_TIME_S,
    ) -> str:
        """The text of a conversation; call it in a thread, which it may keep for `max_time_s`.

        Raises RequestError if the template refuses the conversation or costs too much.
        """
        context = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": is_opening,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        try:
            return within(max_time_s, lambda: self._generate({**self.own(settings), **context}))
        except (TemplateError, TemplateCost) as error:
            text = f"the model's chat template refuses this conversation: {str(error)[:200]}"
            raise RequestError(text, "messages") from error
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError) as error:
            text = f"the model's chat template fails at this conversation: {type(error).__name__}"
            raise RequestError(text, "messages") from error
        except (TypeError, ValueError) as error:
            text = f"the model's chat template fails at this conversation: {type(error).__name__}"
            raise RequestError(text, "messages") from error

    def own(self, settings: Mapping[str, object]) -> dict[str, object]:
        """Of what a request sets, the plain values of names that the template uses."""
        parsed = make_environment().parse(self.source)
        names = meta.find_undeclared_variables(parsed) - RESERVED
        return {k: v for k, v in settings.items() if k in names and isinstance(v, Plain)}

    def _generate(self, context: Mapping[str, object]) -> str:
        parts: list[str] = []
        num_chars = 0
        for part in make_environment().from_string(self.source).generate(**context):
            num_chars += len(part)
            check_size(num_chars)
            parts.append(part)
        return "".join(parts)


def within(max_time_s: float, work: Callable[[], str]) -> str:
    """Result of `work`, whose every line in this thread looks at its own processor time.

    Python cannot end a thread from outside. Raises TemplateCost.
    """
    end_s, own_end_s = perf_counter() + max_time_s, thread_time() + max_time_s
    depth = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
        nonlocal depth
        if event == "call" and not is_of_template(frame):
            return None
        depth += (event == "call") - (event == "return")
        if depth > MAX_DEPTH:  # before Python's own limit, at which tracing itself fails
            raise TemplateCost("it calls itself too deep")
        if perf_counter() > end_s and thread_time() > own_end_s:  # the first one is cheap
            raise TemplateCost("it takes too long")
        if event == "call" and frame.f_code in JOINS:  # the operator ~, which is not intercepted
            check_whole(frame.f_locals["seq"])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(before)


def is_of_template(frame: FrameType) -> bool:
    """Whether a frame runs a template, or Jinja for it.

    What the collector of garbage calls in between is not: there Python would swallow what the
    trace raises, and end the tracing with it.
    """
    name = frame.f_globals.get("__name__")
    if isinstance(name, str):
        return name.partition(".")[0] in TRACED
    return frame.f_code.co_filename == "<template>"


def read_template(directory: Path | None) -> ChatTemplate | None:
    """The chat template of a model directory or of a GGUF file; None if it has none.

    Raises CheckpointError if it cannot be read or is no template.
    """
    if directory is None:
        return None
    source = None
    if (file := find_gguf(directory)) is not None:
        values = read_gguf_tokenizer_config(file)
    else:
        config = read_bounded(directory / TOKENIZER_CONFIG, MAX_CONFIG_BYTES)
        values = parse_config(directory / TOKENIZER_CONFIG, config) if config else {}
        source = read_bounded(directory / TEMPLATE, MAX_TEMPLATE_BYTES)
    if source is None:
        found = values.get("chat_template")
        if isinstance(found, list):  # several by name
            named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
            found = named.get("default")
        source = found if isinstance(found, str) else None
    if source is None:
        return None
    if len(source) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{directory}: the chat template is too long")
    try:
        check_template(make_environment().parse(source))
    except (TemplateError, RecursionError) as error:
        raise CheckpointError(f"{directory}: the chat template is none: {error}") from error
    tokens = (token_text(values.get(name)) for name in ("bos_token", "eos_token"))
    return ChatTemplate(source, *tokens)


def check_template(parsed: nodes.Template) -> None:
    """Raise TemplateError if a template wants to read other ones."""
    if list(parsed.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))):
        raise TemplateError("it includes other templates")


def read_bounded(path: Path, max_bytes: int) -> str | None:
    """Text of a file; None if there is none. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise CheckpointError(f"{path}: has more than {max_bytes} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8") from error


def parse_config(path: Path, text: str) -> dict[str, object]:
    """The object in a file of JSON. Raises CheckpointError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object")
    return values


def token_text(value: object) -> str:
    """The text of a special token: a string, or an object with its content; '' for none."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""
