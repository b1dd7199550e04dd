"""The tokenizer that a GGUF file describes, written as the `tokenizer.json` that it came from.

Source: for the patterns, the tokenizer.json of the models that each name stands for, and
llama.cpp's llama-vocab.cpp, which splits texts in these ways; for merges that a SentencePiece
vocabulary only implies, its scores, as Hugging Face's converters read them.
"""

import json
from typing import NamedTuple

from engine.checkpoint_gguf_header import GgufHeader
from engine.errors import CheckpointError
from engine.tokenizer_json import BYTE_OF_LETTER

Step = dict[str, object]

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of tokens
SPACE = "\u2581"
MAX_TOKEN_CHARS = 1000  # all ways to cut each in two are tried; real ones have up to 128

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
DIGITS = (r"\p{N}", GPT2)
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+{ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*{ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
# How texts are split before merging, by the name in the file: one pattern after the other.
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT,
    "gpt-2": (GPT2,),
    "mpt": (GPT2,),
    "olmo": (GPT2,),
    "dolma": (GPT2,),
    "jais": (GPT2,),
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "command-r": DIGITS,
    "codeshell": DIGITS,
    "exaone": DIGITS,
    "minerva-7b": DIGITS,
    "llama3": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "stablelm2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "deepseek-v3": DEEPSEEK3,
    "gpt-4o": (GPT4O,),
}
BEGINNING = ("llama3", "llama-v3", "llama-bpe")  # put <|begin_of_text|> before a text if not told


class TokenizerTexts(NamedTuple):
    """The files of a tokenizer, made up: `tokenizer.json` and `tokenizer_config.json`."""

    tokenizer: str
    config: str


def tokenizer_texts(header: GgufHeader) -> TokenizerTexts:
    """Write the tokenizer of a GGUF file as Hugging Face's files.

    Raises CheckpointError if it is damaged, or of a kind that is not supported.
    """
    kind = header.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{header.path}: tokenizers of kind {kind!r} are not supported; supported: gpt2, llama"
        )
    tokens = header.texts("tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{header.path}: a token is there twice")
    if long := [token for token in tokens if len(token) > MAX_TOKEN_CHARS]:
        raise CheckpointError(
            f"{header.path}: a token has {len(long[0])} characters, more than any; it is damaged"
        )
    values = _byte_level(header, tokens) if kind == "gpt2" else _sentencepiece(header, tokens)
    begins = begin_token_ids(header)
    values |= {
        "version": "1.0",
        "added_tokens": _added(header, tokens),
        "post_processor": _template(tokens[begins[0]], begins[0]) if begins else None,
    }
    return TokenizerTexts(json.dumps(values), json.dumps(tokenizer_config(header)))


def begin_token_ids(header: GgufHeader) -> tuple[int, ...]:
    """What stands before every text. Raises CheckpointError if it is no token."""
    metadata = header.metadata
    is_usual = (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in BEGINNING
    )
    if not metadata.get("tokenizer.ggml.add_bos_token", is_usual):
        return ()
    return (_token_id(header, "bos", len(header.texts("tokenizer.ggml.tokens"))),)


def _token_id(header: GgufHeader, name: str, count: int) -> int:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = header.integer(key)
    if not 0 <= token_id < count:
        raise CheckpointError(f"{header.path}: {key} is {token_id}; there are {count} tokens")
    return token_id


def _kinds(header: GgufHeader, tokens: list[str]) -> list[object]:
    kinds = header.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.token_type fits not its tokens")
    return list(kinds)


def _byte_level(header: GgufHeader, tokens: list[str]) -> Step:
    name = header.text("tokenizer.ggml.pre", "default")
    if name not in PATTERNS:
        raise CheckpointError(
            f"{header.path}: texts split as {name!r} are not supported; "
            f"supported: {', '.join(PATTERNS)}"
        )
    split: list[Step] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in PATTERNS[name]
    ]
    letters: Step = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    kinds = _kinds(header, tokens)
    vocabulary = {
        token if kind in (CONTROL, USER_DEFINED) else _letters(token): token_id
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    }
    model = _bpe(vocabulary, header.texts("tokenizer.ggml.merges"))
    # merges were learned without these tokens, which tiktoken's way of merging finds first
    model["ignore_merges"] = name in BEGINNING
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, letters]},
        "decoder": letters,
        "model": model,
    }


def _letters(token: str) -> str:
    """A token in the letters that stand for bytes; most are already."""
    if all(letter in BYTE_OF_LETTER for letter in token):
        return token
    letter_of = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
    return "".join(letter_of[byte] for byte in token.encode("utf-8"))


def _sentencepiece(header: GgufHeader, tokens: list[str]) -> Step:
    has_prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces: Step = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before: list[Step] = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    decoders: list[Step] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    model = _bpe(vocabulary, _implied_merges(header, tokens))
    kinds = _kinds(header, tokens)
    unknown = tokens[kinds.index(UNKNOWN)] if UNKNOWN in kinds else None
    model |= {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _implied_merges(header: GgufHeader, tokens: list[str]) -> list[list[str]]:
    """All ways of joining two tokens to a third, the best of those first, as scores tell."""
    scores = header.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.scores fits not its tokens")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    found = [
        (-score, ids[token[:cut]], ids[token[cut:]])
        for token, score in zip(tokens, map(float, scores), strict=True)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [[tokens[left], tokens[right]] for _, left, right in sorted(found)]


def _bpe(vocabulary: dict[str, int], merges: list[str] | list[list[str]]) -> Step:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _added(header: GgufHeader, tokens: list[str]) -> list[Step]:
    """Tokens that are found in a text as they are; control and unknown ones are never shown."""
    return [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for token_id, (token, kind) in enumerate(zip(tokens, _kinds(header, tokens), strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _template(token: str, token_id: int) -> Step:
    """What puts a token before every text."""
    mark: Step = {"SpecialToken": {"id": token, "type_id": 0}}
    first: Step = {"Sequence": {"id": "A", "type_id": 0}}
    second: Step = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [mark, first],
        "pair": [mark, first, mark, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def tokenizer_config(header: GgufHeader) -> Step:
    """What `tokenizer_config.json` holds: the chat template and the marks that it may write.

    Raises CheckpointError if a mark is no token.
    """
    tokens = header.texts("tokenizer.ggml.tokens")
    values: Step = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in header.metadata:
            values[f"{name}_token"] = tokens[_token_id(header, name, len(tokens))]
    if "tokenizer.chat_template" in header.metadata:
        values["chat_template"] = header.text("tokenizer.chat_template")
    return values
