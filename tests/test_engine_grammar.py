"""What is written under a grammar follows it, whatever the model; and no grammar harms others."""

import functools
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jsonschema
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.errors import EngineError, RequestError
from engine.generation import Generation, generate, require_choice
from engine.grammar import GrammarLimits, compile_grammar
from engine.grammar_vocabulary import GrammarVocabulary, grammar_vocabulary
from engine.prompt import build_request
from engine.request import Failed, Finished, SamplingParams
from engine.scheduler import Limits
from engine.tokenizer import ByteTokenizer, decode_ids
from engine.tokenizer_cpm2 import Cpm2Tokenizer
from engine.tokenizer_sentencepiece import SentencePieceTokenizer
from tests.tiny import DENSE, MOE, byte_tokenizer, tiny_model

MARKS = ["<unk>", "<s>", "<pad>", "<eod>", "\u2582", "\u2583", "<s_0>", "<s_1>"]
LETTERS = [*'{}[]":,.-+\\/|', *"0123456789", *"abcdefnrstlu", *"北京上海中文是否城市", "\n"]
WORDS = ["北京", "true", "false", "null", "是否", "\u2582a", '":', '{"']
CHINESE = [*MARKS, *LETTERS[:-1], *WORDS]
BILINGUAL = [*CHINESE[:-3], *(f"##{letter}" for letter in LETTERS[:-1] if letter.isascii())]
BILINGUAL += ["##\u2583"]
KINDS = ["bytes", "cpm2_zh", "cpm2_zh_en", "pieces", "pieces_and_bytes"]
SCHEMA = {
    "type": "object",
    "properties": {
        "城市": {"enum": ["北京", "上海"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"type": "boolean"},
        "t": {"type": "string", "maxLength": 6},
    },
    "required": ["城市", "n", "b", "t"],
    "additionalProperties": False,
}


def train(**options):
    model = io.BytesIO()
    lines = [" ".join(LETTERS), "北京 是否 true false null", '{"a": 1, "b": [true, 北京]}']
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 9),
        model_writer=model,
        vocab_size=340,
        hard_vocab_limit=False,
        minloglevel=2,
        character_coverage=1.0,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return SentencePieceTokenizer(processor)


@functools.cache
def tokenizer_of(kind):
    return {
        "bytes": ByteTokenizer,
        "cpm2_zh": lambda: Cpm2Tokenizer(CHINESE, list, bilingual=False),
        "cpm2_zh_en": lambda: Cpm2Tokenizer(BILINGUAL, list, bilingual=True),
        "pieces": train,
        "pieces_and_bytes": lambda: train(byte_fallback=True),
    }[kind]()


@functools.cache
def model_of(kind):
    tokenizer = tokenizer_of(kind)
    ends = (1,) if not kind.startswith("cpm2") else (3,)
    pad = 0 if not kind.startswith("cpm2") else 2
    config = replace(
        DENSE,
        vocab_size=tokenizer.vocab_size + 5,  # tables are often padded
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_ids=ends,
        max_positions=200,
    )
    return tiny_model(config, seed=5).double()


def ask(kind, grammar, decoder_prompt=None, **params):
    model = model_of(kind)
    given = SamplingParams(grammar=grammar, **{"max_tokens": 200} | params)
    prompt = [tokenizer_of(kind).encode("a")[-1]] * 3
    return build_request(
        prompt, tokenizer_of(kind), model.config, given, "r", decoder_prompt=decoder_prompt
    )


class Dice:
    """In place of a model: scores that depend on nothing, the same in each run."""

    def __init__(self, config):
        self.config = config
        self.embedding = SimpleNamespace(weight=torch.zeros(1, 1))
        self._generator = torch.Generator().manual_seed(0)

    def encode(self, tokens_BS, *_):
        return torch.zeros(*tokens_BS.shape, 1)

    def start_cache(self, *_):
        return None

    def read_on(self, tokens_BT, _):
        return torch.zeros(*tokens_BT.shape, 1)

    def logits(self, _):
        return torch.randn(self.config.vocab_size, generator=self._generator)


def write(kind, grammar, **params):
    """What is written at random: text, how it ended, number of tokens."""
    asked = ask(kind, grammar, **params)
    *pieces, finished = generate(Dice(model_of(kind).config), tokenizer_of(kind), asked)
    assert isinstance(finished, Finished)
    return "".join(piece.text for piece in pieces), finished


VARIANTS = [{"temperature": 0.0}, *({"temperature": 1.5, "seed": seed} for seed in range(3))]


@pytest.mark.parametrize("kind", KINDS)
def test_json_always_fits_its_schema(kind):
    grammar = compile_grammar("json_schema", SCHEMA, tokenizer_of(kind))
    cities = set()
    for params in VARIANTS:
        text, finished = write(kind, grammar, **params)
        assert finished.reason == "stop"
        value = json.loads(text)
        jsonschema.validate(value, SCHEMA)
        cities.add(value["城市"])
    assert cities <= {"北京", "上海"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pattern",
    [
        "(北京|上海)[a-f]{2,4}",
        r"\d{2,3}",
        "[北京上海中文]{3,9}\\n?",
        "a{2,}( b)?c",
        '"(a|\\\\n)*"',
    ],
)
def test_a_text_always_matches_its_pattern(kind, pattern):
    grammar = compile_grammar("regex", pattern, tokenizer_of(kind))
    for params in VARIANTS:
        text, finished = write(kind, grammar, **params)
        if finished.reason == "stop":
            assert re.fullmatch(pattern, text), text
        else:
            assert finished.completion_tokens == 200


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_the_choices_always_comes(kind):
    choices = ["北京 上海", "北", "北京是", "a|b/c", "false true", "-\n\\"]
    if kind == "cpm2_zh_en":
        choices[3] = "ab"  # between two of its signs it always puts a blank
    if kind == "pieces":
        choices[5] = "-"  # SentencePiece makes blanks of line ends
    grammar = compile_grammar("choice", choices, tokenizer_of(kind))
    seen = set()
    for seed in range(12):
        text, finished = write(kind, grammar, temperature=2.0, seed=seed)
        assert finished.reason == "stop"
        seen.add(text)
    assert seen <= set(choices)
    assert len(seen) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_any_object_and_a_grammar_of_its_own(kind):
    anything = compile_grammar("json_object", None, tokenizer_of(kind))
    text, finished = write(kind, anything, temperature=1.0, seed=1)
    if finished.reason == "stop":
        assert isinstance(json.loads(text), dict)
    nested = compile_grammar("lark", 'start: "[" start "]" | "a"', tokenizer_of(kind))
    text, finished = write(kind, nested, temperature=1.0, seed=1, max_tokens=200)
    tight = text.replace(" ", "")
    if finished.reason == "stop":
        depth = tight.count("[")
        assert tight == "[" * depth + "a" + "]" * depth


@pytest.mark.parametrize("kind", KINDS)
def test_a_grammar_goes_on_from_what_the_decoder_is_given(kind):
    tokenizer = tokenizer_of(kind)
    given = tokenizer.encode("ab")
    grammar = compile_grammar("regex", " ?[a-c]{2}", tokenizer)
    whole = ask(kind, grammar, decoder_prompt=given, temperature=1.0, seed=2)
    *pieces, _ = generate(model_of(kind), tokenizer, whole)
    text = "".join(piece.text for piece in pieces)
    assert re.fullmatch(" ?[a-c]{2}", text)
    ids = [token for piece in pieces for token in piece.token_ids]
    assert decode_ids(tokenizer, [*given, *ids]) == tokenizer.decode(given) + text


@settings(max_examples=60)
@given(
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 30),
    min_share=st.floats(0, 1),
    stop=st.sampled_from([(), ("b",), ("cc", "a")]),
    include_stop=st.booleans(),
    ignore_eos=st.booleans(),
    kind=st.sampled_from(KINDS),
)
def test_a_pattern_holds_beside_all_else_that_ends_a_text(
    temperature, seed, max_tokens, min_share, stop, include_stop, ignore_eos, kind
):
    grammar = compile_grammar("regex", "([abc]北?){2,8}", tokenizer_of(kind))
    least = int(max_tokens * min_share)
    params = {
        "temperature": temperature,
        "seed": seed,
        "max_tokens": max_tokens,
        "min_tokens": least,
        "stop": stop,
        "include_stop": include_stop,
        "ignore_eos": ignore_eos,
    }
    text, finished = write(kind, grammar, **params)
    if finished.stop_reason in stop:
        assert text.endswith(finished.stop_reason) == include_stop or not include_stop
        assert re.fullmatch("([abc]北?)*", text)
    elif finished.reason == "stop":
        assert re.fullmatch("([abc]北?){2,8}", text)
        is_full = len(re.findall("[abc]", text)) == 8
        assert is_full or (finished.completion_tokens > least and not ignore_eos)
    else:
        assert finished.completion_tokens == max_tokens
        whole = text.rstrip("\ufffd")  # the limit may cut a character of bytes
        assert re.fullmatch("([abc]北?)*", whole)


LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 500},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["北京", "a", 3]},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[ab]{1,3}$"},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}, inner
        ),
        st.builds(
            lambda first, second: {
                "type": "object",
                "properties": {"a": first, "京": second},
                "required": ["a"],
                "additionalProperties": False,
            },
            inner,
            inner,
        ),
        st.builds(lambda first, second: {"anyOf": [first, second]}, inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=25)
@given(schema=SCHEMAS, kind=st.sampled_from(KINDS), seed=st.integers(0, 9))
def test_json_fits_whatever_schema(schema, kind, seed):
    grammar = compile_grammar("json_schema", schema, tokenizer_of(kind))
    text, finished = write(kind, grammar, temperature=1.0, seed=seed)
    if finished.reason == "stop":
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_the_spelling_that_it_adds_to_a_text(kind):
    tokenizer = tokenizer_of(kind)
    vocabulary = grammar_vocabulary(tokenizer)
    assert grammar_vocabulary(tokenizer) is vocabulary
    everything = b"\xff" * (vocabulary.llguidance.vocab_size // 8 + 1)
    for before in ([], tokenizer.encode("a"), tokenizer.encode("北")):
        state = 0
        for token_id in before:
            _, state = tokenizer.spell(token_id, state)
        allowed = vocabulary.spread(everything, state)
        assert len(allowed) == tokenizer.vocab_size
        for token_id in range(tokenizer.vocab_size):
            spelling, after = vocabulary.spelling(token_id, state)
            spelled, expected = tokenizer.spell(token_id, state)
            is_mark = tokenizer.sentinel_index(token_id) is not None
            is_text = spelled and not is_mark and token_id not in tokenizer.control_ids
            assert after == expected
            assert allowed[token_id] == (spelling >= 0)
            if spelling >= 0:
                assert vocabulary.llguidance.decode_bytes([spelling]) == spelled
            else:
                assert not is_text or spelled == b"\xff"


def test_a_token_without_text_or_against_the_grammar_is_an_error():
    grammar = compile_grammar("regex", "a+", byte_tokenizer())
    with pytest.raises(EngineError, match="token 1 has no text"):
        grammar.start().push(1)
    with pytest.raises(EngineError, match="token 999 has no text"):
        grammar.start().push(999)
    with pytest.raises(EngineError, match="the grammar cannot go on"):
        grammar.start().push(byte_tokenizer().encode("b")[0])


def test_rows_of_one_grammar_do_not_meet():
    tokenizer = byte_tokenizer()
    grammar = compile_grammar("choice", ["ab", "cd"], tokenizer)
    first, second = grammar.start(), grammar.start()
    first.push(tokenizer.encode("a")[0])
    assert first.allowed().nonzero()[0].tolist() == tokenizer.encode("b")
    assert second.allowed().nonzero()[0].tolist() == tokenizer.encode("ac")
    first.push(tokenizer.encode("b")[0])
    assert (first.is_accepting, first.is_complete) == (True, True)
    assert (second.is_accepting, second.is_complete) == (False, False)


def test_a_grammar_is_compiled_once():
    tokenizer = byte_tokenizer()
    first = compile_grammar("json_schema", '{ "type": "null" }', tokenizer)
    assert compile_grammar("json_schema", {"type": "null"}, tokenizer) is first
    assert compile_grammar("json_schema", {"type": "null"}, byte_tokenizer()) is not first


# What is wrong, or asks for too much


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("json_schema", "[1", "Expecting"),
        ("json_schema", "[]", "it must be an object"),
        ("json_schema", {"type": "foo"}, "Invalid type: foo"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"const": float("nan")}, "not JSON compliant"),
        ("json_schema", {"const": {1}}, "not JSON serializable"),
        ("json_schema", {"$ref": "http://127.0.0.1:1/x.json"}, "is not present"),
        ("json_schema", {"$ref": "file:///etc/passwd"}, "is not present"),
        ("json_schema", deep(40), "nested deeper than 64 levels"),
        ("json_schema", '{"a":' * 50_000, "recursion"),
        ("json_schema", {"enum": ["x" * 99 for _ in range(1_000)]}, "the limit is 65,536"),
        ("regex", "", "a text that is not empty"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "\ud800", "surrogates not allowed"),
        ("regex", "(" * 5_000 + "a" + ")" * 5_000, "exceed"),
        ("choice", [], "there are 0; allowed: 1 to 1000"),
        ("choice", ["a"] * 1_001, "there are 1001"),
        ("choice", "ab", "a list of strings"),
        ("choice", ["a", 1], "a list of strings"),
        ("lark", "", "a text that is not empty"),
        ("lark", "start: ???", "Expected"),
        ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "too deeply nested"),
        ("lark", 'start: %json {"type": "null"}', "%json is not supported"),
        ("lark", "start: <[3-9]>", "<[ is not supported"),
        ("lark", '%llguidance {}\nstart: "a"', "%llguidance is not supported"),
    ],
)
def test_what_is_wrong_is_told_under_its_field(kind, spec, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        compile_grammar(kind, spec, byte_tokenizer(), field="response_format")
    assert caught.value.field == "response_format"
    assert len(str(caught.value)) < 500


PATTERNS = [f"^.*a.{{{i}}}x.*$" for i in range(20)]


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("json_schema", {"type": "integer", "multipleOf": 999_983}),
        ("json_schema", {"allOf": [{"type": "string", "pattern": p} for p in PATTERNS]}),
    ],
)
def test_what_takes_too_much_is_ended(kind, spec):
    limits = GrammarLimits(cpu_s=1)
    with pytest.raises(RequestError, match="takes too much time or memory|Unable to determine"):
        compile_grammar(kind, spec, byte_tokenizer(), limits)


def test_what_takes_too_long_is_ended():
    limits = GrammarLimits(wall_s=0.0)
    with pytest.raises(RequestError, match="takes too long to compile"):
        compile_grammar("regex", "abc|d", byte_tokenizer(), limits)


HARD = [
    ("regex", "(a|a)*b"),
    ("regex", "(a*)*" * 50),
    ("regex", "(.*a.{20})"),
    ("regex", "(([a-z]{1,1000}){1,1000}){1,1000}"),
    ("regex", "(?s:.{0,100000})"),
    ("json_schema", {"type": "string", "pattern": "^(a|a)*b$"}),
    ("json_schema", {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    ("json_schema", {"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    ("json_schema", {"$ref": "#"}),
    ("json_schema", {"type": "object", "properties": {"c": {"$ref": "#"}, "d": {"$ref": "#"}}}),
    ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(1_000)}}),
    ("json_schema", {"enum": [f"v{i}" for i in range(3_000)]}),
    ("lark", 'start: x x x | "a"\nx: start start | ""'),
    ("lark", 'start: x{1000000000}\nx: "a"'),
    ("lark", "start: a\na: b\nb: a"),
]


@pytest.mark.parametrize(("kind", "spec"), HARD)
def test_a_hard_grammar_is_refused_or_works_or_fails_its_request_only(kind, spec):
    tokenizer = byte_tokenizer()
    try:
        grammar = compile_grammar(kind, spec, tokenizer)
    except RequestError:
        return
    try:
        text, finished = write("bytes", grammar, max_tokens=40, temperature=2.0, seed=1)
    except EngineError:
        return
    assert finished.completion_tokens <= 40
    if kind == "regex" and finished.reason == "stop":
        assert re.fullmatch(spec, text)


# Beside other requests, and when nothing is left


@dataclass(frozen=True, eq=False)
class Job:
    request: object
    submitted: float = 0.0

    def is_cancelled(self):
        return False


def run(model, tokenizer, requests):
    engine = Engine(model, tokenizer, Limits())
    jobs = [Job(request) for request in requests]
    events = {job: [] for job in jobs}
    for job in jobs:
        engine.add(job)
    while engine.running or len(engine.scheduler):
        for job, event in engine.turn():
            events[job].append(event)
    return [events[job] for job in jobs]


def without_times(events):
    *pieces, end = events
    return pieces, (end.reason, end.stop_reason, end.completion_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_together_equals_alone(kind):
    tokenizer, model = tokenizer_of(kind), model_of(kind)
    grammars = [
        compile_grammar("json_schema", SCHEMA, tokenizer),
        compile_grammar("choice", ["北京", "北", "true"], tokenizer),
        None,
        compile_grammar("regex", "[abc]{2,30}", tokenizer),
    ]
    requests = [
        ask(kind, grammar, temperature=temperature, seed=seed, max_tokens=60)
        for seed, (grammar, temperature) in enumerate(
            (grammar, temperature) for grammar in grammars for temperature in (0.0, 1.3)
        )
    ]
    for request, events in zip(requests, run(model, tokenizer, requests), strict=True):
        expected = list(generate(model, tokenizer, request))
        assert without_times(events) == without_times(expected)


def test_nothing_is_taken_twice_when_rows_are_tried_again_alone():
    tokenizer = tokenizer_of("bytes")
    grammar = compile_grammar("regex", "([ab]{3}c){2,9}", tokenizer)
    shared = {"grammar": grammar, "max_tokens": 30, "min_tokens": 10, "logprobs": 2}
    drawn = {"temperature": 1.5, "repetition_penalty": 1.3, "frequency_penalty": 0.5}
    kinds = [shared, shared | drawn, drawn | {"max_tokens": 20}, {"max_tokens": 20}]
    bad = (tuple(tokenizer.encode("ab")),)
    requests = [
        ask("bytes", **({"grammar": None} | params | {"seed": i, "bad_words": bad}))
        for i, params in enumerate(kinds)
    ]
    model = tiny_model(model_of("bytes").config, seed=5).double()
    step, calls = model.step, []

    def stumbling(tokens_BT, cache):
        made = step(tokens_BT, cache)  # what it wrote stays behind
        calls.append(len(tokens_BT))
        if len(tokens_BT) > 1 and len(calls) % 3:
            raise RuntimeError("for now")
        return made

    model.step = stumbling
    together = run(model, tokenizer, requests)
    assert min(calls.count(1), len(calls) - calls.count(1)) > 5
    for request, events in zip(requests, together, strict=True):
        expected = list(generate(model_of("bytes"), tokenizer, request))
        assert [piece.token_ids for piece in events[:-1]] == [p.token_ids for p in expected[:-1]]
        assert without_times(events)[1] == without_times(expected)[1]


def test_one_grammar_serves_many_threads():
    grammar = compile_grammar("json_schema", SCHEMA, tokenizer_of("bytes"))

    def write_it(seed):
        return write("bytes", grammar, temperature=1.0, seed=seed)[0]

    expected = [write_it(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(write_it, range(6))) == expected


def test_what_cannot_be_satisfied_fails_its_request_only():
    tokenizer, model = tokenizer_of("bytes"), model_of("bytes")
    grammar = compile_grammar("regex", "abc", tokenizer)
    impossible = ask("bytes", grammar, allowed_token_ids=tuple(tokenizer.encode("ax")))
    fine = ask("bytes", grammar)
    failed, finished = run(model, tokenizer, [impossible, fine])
    assert [piece.text for piece in failed[:-1]] == ["a"]
    assert isinstance(failed[-1], Failed)
    assert "no token may come next: the grammar, bad_words, allowed" in failed[-1].message
    assert "".join(piece.text for piece in finished[:-1]) == "abc"
    with pytest.raises(EngineError, match="no token may come next"):
        list(generate(model, tokenizer, impossible))


def test_what_cannot_even_begin_is_refused():
    tokenizer, config = tokenizer_of("bytes"), model_of("bytes").config
    grammar = compile_grammar("regex", "abc", tokenizer)
    bad = ask("bytes", grammar, allowed_token_ids=tuple(tokenizer.encode("bc")))
    with pytest.raises(RequestError, match="allowed_token_ids leaves no token") as caught:
        require_choice(bad, tokenizer, config)
    assert caught.value.field == "allowed_token_ids"
    require_choice(ask("bytes", grammar), tokenizer, config)
    early = ask("bytes", grammar, bad_words=(tuple(tokenizer.encode("a")),))
    with pytest.raises(RequestError, match="grammar leaves no token that may come first") as caught:
        require_choice(early, tokenizer, config)
    assert caught.value.field == "grammar"


def test_what_the_vocabulary_cannot_write_is_refused_or_fails_the_request():
    tokenizer, model = tokenizer_of("cpm2_zh"), model_of("cpm2_zh")
    with pytest.raises(RequestError, match="the vocabulary of the model cannot write"):
        compile_grammar("choice", ["\u4eba"], tokenizer)
    asked = ask("cpm2_zh", compile_grammar("choice", ["北\u4eba"], tokenizer))
    with pytest.raises(EngineError, match="the vocabulary of the model cannot write"):
        list(generate(model, tokenizer, asked))
    ((*_, failed),) = run(model, tokenizer, [asked])
    assert isinstance(failed, Failed)
    assert "cannot write what must come here" in failed.message


def test_it_ends_where_the_grammar_may_end_and_all_that_follows_is_banned():
    tokenizer = tokenizer_of("bytes")
    grammar = compile_grammar("regex", "ab*", tokenizer)
    text, finished = write("bytes", grammar, allowed_token_ids=tuple(tokenizer.encode("a")))
    assert (text, finished.reason, finished.stop_reason) == ("a", "stop", None)


def test_a_stop_id_comes_where_the_grammar_allows_its_text_or_may_end():
    tokenizer, config = tokenizer_of("bytes"), model_of("bytes").config
    grammar = compile_grammar("regex", "ab?", tokenizer)
    x, a, b = tokenizer.encode("xab")
    row = Generation(ask("bytes", grammar, stop_token_ids=(x, b)), tokenizer, config)

    def may_come():
        scores = row.ban(torch.zeros(config.vocab_size))
        return {token for token in (1, x, a, b) if scores[token] == 0}

    assert may_come() == {a}
    row.push(a)
    assert may_come() == {1, x, b}
    assert row.push(b) == []
    assert row.finish == ("stop", b)


def test_blanks_of_a_vocabulary_that_marks_them_come_out_right():
    tokenizer = tokenizer_of("cpm2_zh")
    grammar = compile_grammar("choice", ["北京 \n上海 a"], tokenizer)
    asked = ask("cpm2_zh", grammar)
    *pieces, _ = generate(model_of("cpm2_zh"), tokenizer, asked)
    assert "".join(piece.text for piece in pieces) == "北京 \n上海 a"
    ids = [token for piece in pieces for token in piece.token_ids]
    spelled = "".join(CHINESE[token] for token in ids)
    assert spelled == "北京\u2582\u2583上海\u2582a"


def test_a_model_that_may_print_sentinels_does_not_under_a_grammar():
    tokenizer, config = byte_tokenizer(), replace(MOE, continuation_sentinel=None)
    grammar = compile_grammar("regex", ".+", tokenizer)
    params = SamplingParams(grammar=grammar)
    row = Generation(build_request("a", tokenizer, config, params, "r"), tokenizer, config)
    sentinels = [tokenizer.sentinel_id(i) for i in range(tokenizer.num_sentinels)]
    assert row.ban(torch.zeros(config.vocab_size))[sentinels].isneginf().all()


def test_a_vocabulary_is_the_tokenizers_own():
    one = GrammarVocabulary(tokenizer_of("cpm2_zh_en"))
    sizes = {kind: grammar_vocabulary(tokenizer_of(kind)).llguidance.vocab_size for kind in KINDS}
    assert one.llguidance.vocab_size == sizes["cpm2_zh_en"]
    assert sizes["bytes"] == 255 + 1  # 0xFF is in no text, and there is an end
