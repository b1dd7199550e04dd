"""The sandbox of chat templates: what they may use, and how much one operation may make."""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes, pass_environment
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import do_round, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import soft_str

MAX_TEXT_CHARS = 2**22
MAX_DATE_CHARS = 100
MAX_THINGS = 2**18  # in a value that is written out; fewer than that are looked at in a moment
MAX_DIGITS = 100
WIDENING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})  # methods of texts
WIDENING |= {"format", "format_map", "translate"}
UNBOUNDED = frozenset(  # filters whose widths may be as large as memory
    {"batch", "center", "format", "indent", "pprint", "random", "slice", "urlize", "wordwrap"}
)


class TemplateCost(Exception):
    """A template took too long, or made too much."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The sandbox, in which no single operation makes more than a text may hold."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            check_size(len(left) + len(right))
        elif operator == "*":
            check_product(left, right)
            check_product(right, left)
        elif operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TemplateCost(f"the operator {operator} is not for templates")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing instead of `format`, which is not for templates at all."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Methods that widen a text are not for templates, as the filters that do are not."""
        is_widening = isinstance(obj, str | bytes) and attr in WIDENING
        return not is_widening and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, /, *args: Any, **more: Any) -> Any:
        """Call something; methods of texts by the filters of their names, which are bounded."""
        own = getattr(function, "__self__", None)
        if isinstance(own, str) and function.__name__ == "join":
            (items,) = args
            return join_texts(items, own)
        if isinstance(own, str) and function.__name__ == "replace":
            return replace_text(own, *args, **more)
        return super().call(context, function, *args, **more)


def check_size(num_chars: int) -> None:
    """Raise TemplateCost if a text is too long."""
    if num_chars > MAX_TEXT_CHARS:
        raise TemplateCost("it makes too long a text")


def check_count(num_things: int) -> None:
    """Raise TemplateCost if a list holds too much to be looked at."""
    if num_things > MAX_THINGS:
        raise TemplateCost("it makes too large a list")


def check_product(items: object, times: object) -> None:
    """Raise TemplateCost if so many times these would be too many, or too large a number."""
    if isinstance(items, str | list | tuple) and isinstance(times, int):
        check_size(len(items) * max(times, 0))
    if isinstance(items, int) and items.bit_length() > 1024:
        raise TemplateCost("it makes too large a number")


def check_whole(value: Any) -> Any:
    """The value that came. Raises TemplateCost if its text would be too long.

    Lists may hold one another many times over, and are written out by one operation.
    """
    num_chars, num_things, found = 0, 1, [value]
    while found:
        one = found.pop()
        if isinstance(one, str):
            num_chars += len(one)
            check_size(num_chars)
        elif isinstance(one, list | tuple | dict):
            num_things += 2 * len(one)
            check_count(num_things)
            found += [*one, *one.values()] if isinstance(one, dict) else one
    return value


def join_texts(items: Iterable[Any], between: str) -> str:
    """Their texts, with another between each two."""
    parts: list[str] = []
    num_chars = 0
    for item in items:
        parts.append(str(check_whole(item)))
        num_chars += len(parts[-1]) + len(between)
        check_size(num_chars)
        check_count(len(parts))
    return between.join(parts)


def replace_text(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """The text with one part of it for another, at most so many times."""
    whole, part, other = (str(check_whole(one)) for one in (text, old, new))
    times = whole.count(part)
    if count is not None and count >= 0:
        times = min(times, count)
    check_size(len(whole) + times * (len(other) - len(part)))
    return whole.replace(part, other, times)


@pass_environment
def join_filter(
    environment: Environment, items: Any, d: Any = "", attribute: str | int | None = None
) -> str:
    """The filter `join`: of things, or of an attribute of each."""
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    return join_texts(items, str(check_whole(d)))


@pass_environment
def add_numbers(
    environment: Environment, items: Any, attribute: str | int | None = None, start: Any = 0
) -> Any:
    """The filter `sum`: of numbers alone, as lists would be copied again and again."""
    if not isinstance(start, int | float):
        raise TemplateCost("it adds up what are no numbers")
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    return sum(items, start)


def round_number(value: float, precision: int = 0, method: Any = "common") -> float:
    """The filter `round`, to so many digits."""
    if abs(precision) > MAX_DIGITS:
        raise TemplateCost("it asks for too many digits")
    return do_round(value, precision, method)


def make_environment() -> BoundedSandbox:
    """A fresh sandbox; templates must leave nothing to each other."""
    environment = BoundedSandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[LoopControlExtension, GenerationTag],
        finalize=check_whole,
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.filters["tojson"] = to_json
    environment.filters["join"] = join_filter
    environment.filters["replace"] = replace_text
    environment.filters["round"] = round_number
    environment.filters["sum"] = add_numbers
    environment.filters["string"] = lambda value: soft_str(check_whole(value))
    for name in UNBOUNDED:
        environment.filters.pop(name, None)
    return environment


class GenerationTag(Extension):
    """The block `generation`, with which templates mark answers for training: its content alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def strftime_now(form: object) -> str:
    """Today's date, which some templates tell the model."""
    if len(text := str(form)) > MAX_DATE_CHARS:
        raise TemplateCost("it makes too long a date")
    return datetime.now().astimezone().strftime(text)


def raise_exception(message: object) -> None:
    """What templates call when roles are out of order."""
    raise TemplateError(str(message))


def to_json(value: object, indent: int | None = None) -> str:
    """JSON as it is, without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(check_whole(value), ensure_ascii=False, indent=indent and min(indent, 8))
