"""Soft prompts: trained vectors that a request puts among the embeddings of its text.

Shape letters: P vectors, D model width.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint_tensors import (
    TensorFiles,
    check_tensor,
    convert_tensor,
    open_tensor_file,
    raw_bytes,
    read_json,
)
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.transformer import Transformer

PEFT_CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
OURS = "infmoe_adapter.json"  # what PEFT has no words for
VECTORS = "prompt_embeddings"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION_CHARS = 12
FINGERPRINT_ROWS = 256
# What an adapter may set where a request does not, by name of the field, with the types it takes.
DEFAULTS: dict[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "min_tokens": (int,),
    "temperature": (float, int),
    "top_k": (int,),
    "top_p": (float, int),
    "min_p": (float, int),
    "typical_p": (float, int),
    "repetition_penalty": (float, int),
    "presence_penalty": (float, int),
    "frequency_penalty": (float, int),
    "stop": (list,),
}
# What an adapter tells of the task that it was trained for, with types: its name, how a text is
# made of a row, the words of each label, and how well it did.
ABOUT: dict[str, type] = {"task": str, "template": str, "labels": dict, "score": dict}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many vectors go where: before the text, among it, behind all that the encoder reads.

    Those of the middle follow the first `middle_after` tokens, or all of a shorter text; with a
    `middle_mark` the first token that has that id, such as a separator of two texts.
    """

    front: int = 0
    middle: int = 0
    back: int = 0
    middle_after: int = 0
    middle_mark: int | None = None

    def __post_init__(self) -> None:
        for slot in fields(self):
            value = getattr(self, slot.name)
            if slot.name == "middle_mark" and value is None:
                continue
            if type(value) is not int or value < 0:
                raise CheckpointError(
                    f"slots: {slot.name} is {value!r}; it must be a whole number, 0 or more"
                )
        if self.middle_after and not self.middle:
            raise CheckpointError(f"slots: middle_after is {self.middle_after}, but middle is 0")
        if self.middle_mark is not None and (self.middle_after or not self.middle):
            raise CheckpointError(
                f"slots: middle_mark is {self.middle_mark}; it is for vectors in the middle, and "
                "instead of middle_after"
            )

    @property
    def num_vectors(self) -> int:
        """All of them."""
        return self.front + self.middle + self.back

    def split(self, ids: Sequence[int]) -> int:
        """How many tokens of a text stand before the middle slot."""
        if self.middle_mark is None:
            return min(self.middle_after, len(ids))
        return ids.index(self.middle_mark) + 1 if self.middle_mark in ids else len(ids)


# eq: an adapter is itself only, so texts are shared between requests that hold the same one
@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True, eq=False)
class Adapter:
    """A soft prompt for the encoder, in the dtype and on the device of the model.

    `base_fingerprint` names the model that it was trained on (`model_fingerprint`), if known. The
    vectors lie in `prompt_PD` in the order front, middle, back. `defaults` are for the fields of a
    request that are not given, under the names of `DEFAULTS`. `about` is for people and clients:
    what is in the file under the names of `ABOUT`.
    """

    name: str
    version: str
    prompt_PD: Tensor
    slots: Slots
    base_fingerprint: str | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, value in (("name", self.name), ("version", self.version)):
            if not NAME.fullmatch(value):
                raise CheckpointError(
                    f"{what} {value[:100]!r} is none: up to 64 letters, digits and . _ -, the "
                    "first a letter or digit"
                )
        prompt_PD = self.prompt_PD
        if prompt_PD.ndim != 2 or not prompt_PD.numel():
            raise CheckpointError(
                f"{VECTORS} has shape {list(prompt_PD.shape)}; expected vectors x width, not empty"
            )
        if self.slots.num_vectors != len(prompt_PD):
            raise CheckpointError(
                f"{self.slots} are for {self.slots.num_vectors} vectors; there are {len(prompt_PD)}"
            )
        if not bool(torch.isfinite(prompt_PD).all()):
            raise CheckpointError(f"{VECTORS} has values that are NaN or infinite; train it again")

    @property
    def reference(self) -> str:
        """Name and version, as requests give them."""
        return f"{self.name}@{self.version}"

    @property
    def num_vectors(self) -> int:
        """Positions that it adds to what the encoder reads."""
        return len(self.prompt_PD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that adapters are read for."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    fingerprint: str


def describe_base(model: Transformer) -> Base:
    """What reading adapters needs to know of a model."""
    weight = model.embedding.weight
    return Base(
        config=model.config,
        dtype=weight.dtype,
        device=weight.device,
        fingerprint=model_fingerprint(model),
    )


def load_adapter(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    fingerprint: str | None = None,
    name: str | None = None,
    version: str | None = None,
) -> Adapter:
    """Read a prompt-tuning folder of PEFT, as `name` (otherwise that of the folder) and `version`.

    `infmoe_adapter.json` beside PEFT's files may give slots (otherwise all vectors go in front), a
    version where none is given (otherwise it is a checksum), the fingerprint of the base, and
    defaults for requests. `fingerprint` is that of the model that will read it; without one,
    vectors that were trained on any base are taken.

    Raises CheckpointError if a file is missing, damaged or a pickle, or the vectors do not fit.
    """
    path = path.absolute()
    num_vectors, num_rows = _read_peft_config(path / PEFT_CONFIG, config)
    ours = _read_ours(path / OURS)
    _check_base(path, ours.base_fingerprint, fingerprint)
    where = str(path / TENSORS)
    files = _open_vectors(path)
    shape = (num_rows, config.d_model)
    if files.shape(VECTORS) != shape:  # before anything is read
        raise CheckpointError(
            f"{where}: {VECTORS} has shape {list(files.shape(VECTORS))}; expected {list(shape)} by "
            f"{PEFT_CONFIG} and the model"
        )
    stored = files.tensor(VECTORS)
    check_tensor(where, VECTORS, stored, shape)
    stored_PD = stored[:num_vectors].clone()  # not a view: what PEFT does not read is let go
    slots = ours.slots or Slots(front=num_vectors)
    try:
        return Adapter(
            name=name or path.name,
            version=version or ours.version or _checksum(stored_PD, ours),
            prompt_PD=convert_tensor(where, VECTORS, stored_PD, dtype).to(device),
            slots=slots,
            base_fingerprint=ours.base_fingerprint,
            defaults=ours.defaults,
            about=ours.about,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def model_fingerprint(model: Transformer) -> str:
    """Tell a base from another one: a checksum of the config and of rows of the embedding.

    256 rows, evenly spaced over the vocabulary, as bfloat16: so it is the same for float32 and
    bfloat16 copies of one checkpoint, and for float16 ones of what fits there. Of the config, what
    is not a default: new fields do not change it. Models that differ in other weights only have the
    same one.
    """
    config = model.config
    whole = asdict(config)  # parts of it as objects too
    changed = [f.name for f in fields(config) if getattr(config, f.name) != f.default]
    given = {name: whole[name] for name in changed if name != "max_model_len"}
    step = -(-config.vocab_size // FINGERPRINT_ROWS)
    rows = model.embedding.weight.detach()[::step].to(torch.bfloat16).contiguous()
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    digest.update(raw_bytes(rows).data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Ours:
    """What `infmoe_adapter.json` tells."""

    slots: Slots | None = None
    version: str | None = None
    base_fingerprint: str | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    about: Mapping[str, object] = field(default_factory=dict)


def _read_peft_config(path: Path, config: ModelConfig) -> tuple[int, int]:
    """How many vectors there are, and how many rows in the file.

    PEFT's own default for encoder-decoders is as many rows again for the decoder, which it never
    reads (its forward pass puts the first half before the encoder's input).
    """
    values = read_json(path)
    task = "CAUSAL_LM" if config.is_decoder_only else "SEQ_2_SEQ_LM"
    allowed = {"peft_type": ("PROMPT_TUNING",), "task_type": (task, None)}
    allowed_ints = {"num_transformer_submodules": (1, 2, None), "token_dim": (config.d_model, None)}
    for key, choices in (allowed | allowed_ints).items():
        if values.get(key) not in choices:
            named = " or ".join(str(choice) for choice in choices if choice is not None)
            raise CheckpointError(f"{path}: {key} is {values.get(key)!r}; expected {named}")
    num_vectors = values.get("num_virtual_tokens")
    longest = config.max_prompt_tokens - 1  # a text has one token at least
    if type(num_vectors) is not int or not 1 <= num_vectors <= longest:
        raise CheckpointError(
            f"{path}: num_virtual_tokens is {num_vectors!r}; allowed: 1 to {longest}, which leaves "
            "room for a text"
        )
    return num_vectors, num_vectors * int(values.get("num_transformer_submodules") or 1)  # type: ignore[call-overload]  # checked above


def _read_ours(path: Path) -> _Ours:
    if not path.exists():
        return _Ours()
    values = read_json(path)
    known = [f.name for f in fields(_Ours) if f.name != "about"]
    _refuse_unknown(path, values, [*known, *ABOUT])
    about = {key: values.pop(key) for key in ABOUT if key in values}
    for key, value in about.items():
        if not isinstance(value, ABOUT[key]):
            kind = "a text" if ABOUT[key] is str else "an object"
            raise CheckpointError(f"{path}: {key} is {value!r}; expected {kind}")
    for key in ("version", "base_fingerprint"):
        if not isinstance(values.get(key), str | None):
            raise CheckpointError(f"{path}: {key} is {values[key]!r}; expected a text")
    slots = values.pop("slots", None)
    if slots is not None:
        if not isinstance(slots, dict):
            raise CheckpointError(f"{path}: slots is {slots!r}; expected an object")
        _refuse_unknown(path, slots, [f.name for f in fields(Slots)])
        try:
            slots = Slots(**slots)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    _check_defaults(path, values.setdefault("defaults", {}))
    return _Ours(slots, **values, about=about)  # type: ignore[arg-type]  # checked above


def _check_defaults(path: Path, defaults: object) -> None:
    """Names and types only: what values are allowed, requests know (`engine.request`)."""
    if not isinstance(defaults, dict):
        raise CheckpointError(f"{path}: defaults is {defaults!r}; expected an object")
    _refuse_unknown(path, defaults, list(DEFAULTS))
    for key, value in defaults.items():
        is_texts = not isinstance(value, list) or all(isinstance(text, str) for text in value)
        if type(value) not in DEFAULTS[key] or not is_texts:
            kinds = {int: "a whole number", float: "a number", list: "a list of texts"}
            expected = kinds[DEFAULTS[key][0]]
            raise CheckpointError(f"{path}: defaults: {key} is {value!r}; expected {expected}")


def _refuse_unknown(path: Path, values: dict[str, object], known: list[str]) -> None:
    if unknown := sorted(values.keys() - set(known)):
        raise CheckpointError(
            f"{path}: unknown keys {', '.join(unknown)}; known: {', '.join(known)}"
        )


def _check_base(path: Path, trained_on: str | None, fingerprint: str | None) -> None:
    if fingerprint is not None and trained_on is not None and trained_on != fingerprint:
        raise CheckpointError(
            f"{path}: was trained on another base: {OURS} has fingerprint {trained_on[:100]}, the "
            f"model {fingerprint}; load the adapter of this model, or let it go unchecked"
        )


def _open_vectors(path: Path) -> TensorFiles:
    """Open the file of vectors, which must hold nothing else."""
    if not (path / TENSORS).exists() and (path / PICKLE).exists():
        raise CheckpointError(
            f"{path / PICKLE}: is a pickle, which may run code and is not read; save the adapter "
            f"with safe_serialization=True, as {TENSORS}"
        )
    files = open_tensor_file(path / TENSORS)
    files.dtype(VECTORS)  # raises if there are none
    if others := [name for name in files.names() if name != VECTORS]:
        raise CheckpointError(
            f"{path / TENSORS}: holds {others[0]} as well; only {VECTORS} is understood"
        )
    return files


def _checksum(stored_PD: Tensor, ours: _Ours) -> str:
    """A version for an adapter that has none: other content, other version."""
    slots = ours.slots or Slots(front=len(stored_PD))
    digest = hashlib.sha256(repr(slots).encode())
    if ours.defaults:
        digest.update(json.dumps(ours.defaults, sort_keys=True).encode())
    digest.update(raw_bytes(stored_PD).data)
    return digest.hexdigest()[:VERSION_CHARS]
