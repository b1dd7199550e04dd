"""Structured output: a schema, a pattern or a list of choices that the text of a row must follow.

Compiling takes milliseconds to seconds and a child process: never do it on the engine thread or on
an event loop. What is compiled is immutable and may be shared by any number of rows.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from llguidance import LLMatcher, regex_to_lark
from numpy.typing import NDArray

from engine.errors import EngineError, RequestError
from engine.grammar_probe import compile_matcher
from engine.grammar_vocabulary import GrammarVocabulary, grammar_vocabulary
from engine.tokenizer import Tokenizer

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]
Spec = str | Mapping[str, object] | Sequence[str] | None

PROBE = Path(__file__).with_name("grammar_probe.py")
# Tokens are chosen by the model even where only one text is left: other bans may leave others.
HEADER = '%llguidance {"no_forcing": true}\n'
# Settings and languages inside a grammar, and token ids, which are not those of the model.
NOT_LARK = re.compile(r"%(?:llguidance|json|regex|lark)\b|<\[")
# A blank at most between two parts: CPM-2's bilingual vocabulary cannot write some without one, and
# small models that may write many never stop.
JSON_OPTIONS = {"whitespace_pattern": " ?"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """What one grammar may cost. `cpu_s` and `memory_bytes` bound a trial in a child process.

    `wall_s` is how long that may take in all, on a busy machine say.
    """

    max_chars: int = 65_536
    max_depth: int = 64
    max_choices: int = 1_000
    cpu_s: int = 2
    wall_s: float = 20.0
    memory_bytes: int = 256 << 20


DEFAULT_LIMITS = GrammarLimits()


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar for one tokenizer; `spec` is its text, as JSON or in its own language."""

    kind: Kind
    spec: str
    vocabulary: GrammarVocabulary
    prototype: LLMatcher

    def start(self, state: int = 0) -> "GrammarState":
        """Begin a text; `state` is that of the tokenizer where it begins."""
        return GrammarState(self.prototype.deep_copy(), self.vocabulary, state)


class GrammarState:
    """How far the text of one row has come in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: GrammarVocabulary, state: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._state = state
        self._allowed_V: NDArray[np.bool_] | None = None

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether it must end here."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens of the tokenizer (V,) may come next, marks and ends never among them.

        Raises EngineError if the grammar has become too complex.
        """
        if self._allowed_V is None:
            bitmask_U = self._matcher.compute_bitmask()
            self._check()
            self._allowed_V = self._vocabulary.spread(bitmask_U, self._state)
        return self._allowed_V

    def push(self, token_id: int) -> None:
        """Take the chosen token. Raises EngineError if it may not come, or all is too complex."""
        spelling, self._state = self._vocabulary.spelling(token_id, self._state)
        self._allowed_V = None
        if spelling < 0:
            raise EngineError(f"token {token_id} has no text that could follow the grammar")
        self._matcher.consume_token(spelling)
        self._check()

    def _check(self) -> None:
        if complaint := _complaint(self._matcher):
            raise EngineError(f"the grammar cannot go on: {complaint}")


def compile_grammar(
    kind: Kind,
    spec: Spec,
    tokenizer: Tokenizer,
    limits: GrammarLimits = DEFAULT_LIMITS,
    field: str = "grammar",
) -> Grammar:
    """Compile what the text must follow; blocks for up to `limits.wall_s`.

    json_schema takes an object, or its text; json_object nothing; regex a pattern for the whole
    text; choice strings; lark a grammar with a rule `start`. A pattern's letters are those of
    Unicode, its digits those of ASCII. JSON has one blank between two parts, or none.
    Raises RequestError, naming `field`, if it is wrong, asks for what is not supported, or costs
    too much.
    """
    try:
        text = _to_text(kind, spec, limits)
        if len(text) > limits.max_chars:
            raise ValueError(f"it has {len(text):,} characters; the limit is {limits.max_chars:,}")
        text.encode("utf-8")  # half a surrogate pair is a ValueError
        vocabulary = grammar_vocabulary(tokenizer)  # type: ignore[arg-type]  # as all objects it has a hash
        return _compile(kind, text, vocabulary, limits)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{field}: the {kind} cannot be used: {error}", field) from error


def _to_text(kind: Kind, spec: Spec, limits: GrammarLimits) -> str:
    if kind == "json_object":
        return '{"type":"object"}'
    if kind == "json_schema":
        return _schema_text(json.loads(spec) if isinstance(spec, str) else spec, limits)
    if kind == "choice":
        if not isinstance(spec, Sequence) or isinstance(spec, str):
            raise ValueError("it must be a list of strings")
        if not 1 <= len(spec) <= limits.max_choices:
            raise ValueError(f"there are {len(spec)}; allowed: 1 to {limits.max_choices}")
        if not all(isinstance(choice, str) for choice in spec):
            raise ValueError("it must be a list of strings")
        return json.dumps(list(spec), ensure_ascii=False)
    if not isinstance(spec, str) or not spec:
        raise ValueError("it must be a text that is not empty")
    if kind == "lark" and (found := NOT_LARK.search(spec)):
        raise ValueError(f"{found[0]} is not supported")
    return spec


def _schema_text(schema: object, limits: GrammarLimits) -> str:
    if not isinstance(schema, Mapping):
        raise ValueError("it must be an object")
    level: list[object] = [schema]
    for _ in range(limits.max_depth):
        level = [part for value in level for part in _parts(value)]
        if not level:
            break
    else:
        raise ValueError(f"it is nested deeper than {limits.max_depth} levels")
    own = {key: value for key, value in schema.items() if key != "x-guidance"}
    return json.dumps(own, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _parts(value: object) -> list[object]:
    """What a value of JSON holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def rebuild_grammar(kind: Kind, spec: str, tokenizer: Tokenizer) -> Grammar:
    """Compile what `compile_grammar` let pass in another process, without another trial of it.

    Raises ValueError if it is wrong after all.
    """
    return _build(kind, spec, grammar_vocabulary(tokenizer))  # type: ignore[arg-type]  # as above


@functools.lru_cache(maxsize=64)
def _compile(
    kind: Kind, text: str, vocabulary: GrammarVocabulary, limits: GrammarLimits
) -> Grammar:
    _try_in_child(_from_lark(kind, text), limits)
    return _build(kind, text, vocabulary)


def _from_lark(kind: Kind, text: str) -> str:
    return LLMatcher.grammar_from_lark(HEADER + _to_lark(kind, text))


@functools.lru_cache(maxsize=64)
def _build(kind: Kind, text: str, vocabulary: GrammarVocabulary) -> Grammar:
    matcher = compile_matcher(vocabulary.llguidance, _from_lark(kind, text))
    if not matcher.is_error():
        matcher.compute_bitmask()  # its rows will begin with what this has found out
    if complaint := _complaint(matcher):
        raise ValueError(complaint)
    return Grammar(kind, text, vocabulary, matcher)


def _to_lark(kind: Kind, text: str) -> str:
    if kind in ("json_schema", "json_object"):
        return "start: %json " + json.dumps(json.loads(text) | {"x-guidance": JSON_OPTIONS})
    if kind == "regex":
        return f"start: /{regex_to_lark(text, 'd')}/"
    if kind == "choice":
        return f"start: /{regex_to_lark('|'.join(map(re.escape, json.loads(text))))}/"
    return text


@functools.lru_cache(maxsize=64)
def _try_in_child(grammar: str, limits: GrammarLimits) -> None:
    """Compile it where it can be ended. Raises ValueError if that fails or costs too much.

    What is good is so for every vocabulary, and need not be tried again for another.
    """
    bounds = [str(limits.cpu_s), str(limits.memory_bytes)]
    command = [sys.executable, "-I", str(PROBE), *bounds]
    try:
        child = subprocess.run(
            command, input=grammar.encode("utf-8"), capture_output=True, timeout=limits.wall_s
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError("it takes too long to compile; make it simpler") from error
    if child.returncode:
        raise ValueError("it takes too much time or memory to compile; make it simpler")
    if complaint := child.stdout.decode("utf-8", "replace"):
        raise ValueError(_first_line(complaint))


def _complaint(matcher: LLMatcher) -> str:
    """What is wrong with a matcher; empty if nothing is."""
    if not matcher.is_error():
        return ""
    if "NoExtensionBias" in matcher.get_error():
        return "the vocabulary of the model cannot write what must come here"
    return _first_line(matcher.get_error())


def _first_line(text: str) -> str:
    """What a complaint says, without the excerpts of the grammar in it, which may be long."""
    lines = text.splitlines()
    return next((line for line in lines if line.startswith("error:")), lines[0])[:300]
