"""The tokens of a vocabulary by name, so that two vocabularies can be matched, never by id."""

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint_writer import VOCABULARY_FILES
from engine.config import ModelConfig, TokenizerKind
from engine.errors import TokenizerError
from engine.tokenizer import Tokenizer, open_tokenizer
from engine.tokenizer_cpm2 import CONTROL_TOKENS, MARKS_TO_TEXT, PIECE_PREFIX, read_vocabulary
from engine.tokenizer_sentencepiece import SPACE, load_model

SENTINEL = "<sentinel {}>"  # every kind of vocabulary writes them in its own way
NAMED: tuple[TokenizerKind, ...] = ("cpm2_zh_en", "cpm2_zh", "sentencepiece")
BYTE_CONTROLS = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer, the name of each of its ids, and the text that a token stands for.

    `texts` is empty for special tokens. Sentinels are named by their number.
    """

    kind: TokenizerKind
    tokenizer: Tokenizer
    names: tuple[str, ...]
    texts: tuple[str, ...]

    def ids(self) -> dict[str, int]:
        """The id of each name; the lowest one if a name occurs twice."""
        return {name: i for i, name in reversed(list(enumerate(self.names)))}

    def special_names(self, config: ModelConfig) -> dict[str, str]:
        """Names of the ids that a config speaks of, by their field."""
        first_end = config.eos_token_ids[:1]
        ids = {"pad_token_id": config.pad_token_id} | {
            "decoder_start_token_id": config.decoder_start_token_id
        }
        ids |= {"eos_token_ids": first_end[0]} if first_end else {}
        return {field: self.names[i] for field, i in ids.items() if i < len(self.names)}


def open_vocabulary(folder: Path, kind: TokenizerKind) -> Vocabulary:
    """Read the tokens of a model directory or of a folder of tokenizer files.

    Raises TokenizerError if a file is missing, damaged or of another kind.
    """
    tokenizer = open_tokenizer(folder, kind)
    if kind == "bytes":
        pairs = _byte_pairs()
    elif kind == "sentencepiece":
        pairs = _sentencepiece_pairs(folder / "spiece.model")
    else:
        pairs = [_cpm2_pair(token, kind) for token in read_vocabulary(folder / "vocab.txt")]
    pairs += [("", "")] * (tokenizer.vocab_size - len(pairs))  # T5's sentinels are no pieces
    for index in range(tokenizer.num_sentinels):
        pairs[tokenizer.sentinel_id(index)] = (SENTINEL.format(index), "")
    names, texts = zip(*pairs, strict=True)
    return Vocabulary(kind, tokenizer, names, texts)


def find_kind(folder: Path) -> TokenizerKind:
    """The kind of the tokenizer files in a folder.

    Raises TokenizerError if there are none, or their tokens cannot be matched by name.
    """
    for kind in NAMED:
        name = VOCABULARY_FILES[kind]
        if not (folder / name).exists():
            continue
        if kind == "sentencepiece":
            return kind
        tokens = read_vocabulary(folder / name)
        has_pieces = any(
            token.startswith(PIECE_PREFIX) and token != PIECE_PREFIX for token in tokens
        )
        return "cpm2_zh_en" if has_pieces else "cpm2_zh"
    files = " or ".join(dict.fromkeys(VOCABULARY_FILES[kind] for kind in NAMED))
    raise TokenizerError(f"{folder}: holds no {files}; name a folder with a vocabulary")


def _byte_pairs() -> list[tuple[str, str]]:
    letters = [(f"<0x{byte:02X}>", chr(byte) if byte < 128 else "") for byte in range(256)]
    return [(name, "") for name in BYTE_CONTROLS] + letters


def _sentencepiece_pairs(path: Path) -> list[tuple[str, str]]:
    processor = load_model(path)
    pairs = []
    for token_id in range(processor.get_piece_size()):
        piece = processor.id_to_piece(token_id)
        is_special = processor.is_control(token_id) or processor.is_unknown(token_id)
        hidden = is_special or processor.is_byte(token_id)
        pairs.append((piece, "" if hidden else piece.replace(SPACE, " ").strip()))
    return pairs


def _cpm2_pair(token: str, kind: TokenizerKind) -> tuple[str, str]:
    if token in CONTROL_TOKENS:
        return token, ""
    text = token
    if kind == "cpm2_zh_en" and len(token) > len(PIECE_PREFIX):
        text = token.removeprefix(PIECE_PREFIX)
    return token, text.translate(MARKS_TO_TEXT)
