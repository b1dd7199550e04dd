"""GGUF files read in Hugging Face's terms: the same model as the folder that they were made of."""

import os
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint_any import detect_kind, load_any
from engine.checkpoint_gguf import open_gguf
from engine.checkpoint_gguf_header import read_header
from engine.checkpoint_hf import open_huggingface
from engine.convert import convert, inspect
from engine.errors import CheckpointError
from engine.loading import find_storage, load_within
from engine.model_paths import find_gguf
from engine.tokenizer import open_tokenizer
from server.templates import read_template
from tests.gguf_files import (
    byte_level_metadata,
    llama_metadata,
    saved_state,
    to_gguf_tensors,
    write_gguf,
)
from tests.hf_families import (
    GLOBAL,
    LLAMA3,
    LOCAL,
    MODELS,
    SIZES,
    assert_equal_to_oracle,
    widen,
)
from tests.json_tokenizers import CHATML, train_byte_level
from tests.t5_oracle import one_thread

Kind = gguf.GGMLQuantizationType
# a key, the kind of its value, and what is before the number of a part and that of all tensors
TWO, THREE = (b"split.no" + (2).to_bytes(4, "little") + bytes([number, 0]) for number in (1, 2))
NUMBER = b"split.tensors.count" + (5).to_bytes(4, "little")
FAMILIES = {  # name -> architecture in GGUF, values of the config
    "llama": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "mixtral": ("llama", {**SIZES, **LOCAL}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 16}),
    "qwen2_moe": ("qwen2moe", {**SIZES, **GLOBAL, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3moe", {**SIZES, **GLOBAL, "head_dim": 16, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**SIZES, "num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 1.5}),
}


def make_family(name, values):
    model_class, config_class, _ = MODELS[name]
    with one_thread():
        model = model_class(config_class(**values, attn_implementation="eager"))
    return widen(model)


def write_family(directory, name, architecture, oracle, **more):
    """The folder that transformers saves, and the file made of it."""
    oracle.save_pretrained(directory / "folder")
    config = oracle.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = saved_state(directory / "folder")
    metadata = {**llama_metadata(architecture, config), **more}
    metadata |= {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}
    metadata.setdefault("tokenizer.ggml.model", "gpt2")
    tensors = to_gguf_tensors(state, heads if architecture == "llama" else None)
    return write_gguf(directory / f"{name}.gguf", architecture, metadata, tensors)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    name = request.param
    architecture, values = FAMILIES[name]
    oracle = make_family(name, values)
    directory = tmp_path_factory.mktemp(name)
    return directory / "folder", write_family(directory, name, architecture, oracle)


def test_a_file_holds_what_its_folder_holds(family):
    folder, file = family
    expected, found = open_huggingface(folder), open_gguf(file)
    eps = expected.config.norm_eps  # the file has it in fp32
    assert replace(found.config, norm_eps=eps) == expected.config
    assert found.config.norm_eps == pytest.approx(eps)
    assert (found.kind, found.dtype, found.files) == ("gguf", torch.float32, (file,))
    tensors = dict(found.dense())
    assert tensors.keys() == dict(expected.dense()).keys()
    for name, tensor in expected.dense():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, msg=name)
    for layer in expected.config.moe_layers():
        pairs = list(zip(found.experts(layer), expected.experts(layer), strict=True))
        assert len(pairs) == expected.config.num_experts
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_transformers_reads_the_same_from_the_file(tmp_path):
    oracle = make_family("llama", FAMILIES["llama"][1])
    metadata = byte_level_metadata(train_byte_level(300), "gpt-2")
    file = write_family(tmp_path, "llama", "llama", oracle, **metadata)
    read = type(oracle).from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert_equal_to_oracle(load_any(file, torch.float32), read)


def test_frequencies_divided_in_the_file(tmp_path):
    oracle = make_family("llama", {**SIZES, "rope_parameters": LLAMA3})
    plain = 1.0 / LLAMA3["rope_theta"] ** (np.arange(0, 8, 2) / 8)
    divisors = (plain / oracle.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() == pytest.approx(4.0)
    oracle.save_pretrained(tmp_path / "folder")
    tensors = to_gguf_tensors(saved_state(tmp_path / "folder"), {"q_proj": 4, "k_proj": 2})
    metadata = {**llama_metadata("llama", oracle.config), "tokenizer.ggml.model": "gpt2"}
    tensors["rope_freqs.weight"] = divisors
    file = write_gguf(tmp_path / "it.gguf", "llama", metadata, tensors)
    assert_equal_to_oracle(load_any(file), oracle)


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_positions_that_are_stretched(tmp_path, scaling):
    values = {"rope_type": scaling, "factor": 4.0, "rope_theta": 100.0}
    more = {"llama.rope.scaling.type": scaling, "llama.rope.scaling.factor": 4.0}
    if scaling == "yarn":
        values["original_max_position_embeddings"] = 32
        more["llama.rope.scaling.original_context_length"] = 32
    oracle = make_family("llama", {**SIZES, "rope_parameters": values})
    file = write_family(tmp_path, "llama", "llama", oracle, **more)
    assert open_gguf(file).config.rotary == open_huggingface(tmp_path / "folder").config.rotary


def dequantized(data, kind):
    """The slow way, block by block. Source: ggml's description of its formats."""
    numbers = []
    block = {Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q8_0: 34}[kind]
    for start in range(0, len(data), block):
        scale = np.frombuffer(data[start : start + 2], np.float16).astype(np.float32)[0]
        if kind == Kind.Q8_0:
            numbers += [scale * n for n in np.frombuffer(data[start + 2 : start + 34], np.int8)]
            continue
        has_least = kind == Kind.Q4_1
        least = np.frombuffer(data[start + 2 : start + 4], np.float16).astype(np.float32)[0]
        nibbles = data[start + (4 if has_least else 2) : start + block]
        halves = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
        numbers += [scale * n + least if has_least else scale * (n - 8) for n in halves]
    return np.array(numbers, np.float32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose rows are whole blocks of all formats."""
    values = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    oracle = make_family("llama", values)
    directory = tmp_path_factory.mktemp("wide")
    oracle.save_pretrained(directory)
    return llama_metadata("llama", oracle.config), to_gguf_tensors(saved_state(directory), None)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.Q4_0, torch.bfloat16),
        (Kind.Q4_1, torch.bfloat16),
        (Kind.Q8_0, torch.bfloat16),
        (Kind.F16, torch.float16),
        (Kind.BF16, torch.bfloat16),
    ],
)
def test_formats_of_numbers(tmp_path, wide, kind, dtype):
    metadata, tensors = wide
    metadata = {**metadata, "tokenizer.ggml.model": "gpt2"}
    names = ("token_embd.weight", "blk.0.ffn_down.weight")
    file = write_gguf(tmp_path / "it.gguf", "llama", metadata, tensors, dict.fromkeys(names, kind))
    source = open_gguf(file)
    assert source.dtype == dtype
    found = dict(source.dense())["decoder.layers.0.feed_forward.wo.weight"]
    stored = gguf.quantize(tensors[names[1]], kind)
    if kind in (Kind.F16, Kind.BF16):
        assert found.dtype == dtype
        assert torch.equal(found, torch.from_numpy(tensors[names[1]]).to(dtype))
        return
    expected = dequantized(stored.tobytes(), kind).reshape(found.shape)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=0)
    assert np.abs(expected - tensors[names[1]]).max() < 0.2


def test_a_quantised_file_is_held_in_bf16_whatever_its_embedding(tmp_path, wide):
    metadata, tensors = wide
    kinds = {"token_embd.weight": Kind.F16, "blk.0.ffn_up.weight": Kind.Q8_0}
    source = open_gguf(write_gguf(tmp_path / "it.gguf", "llama", metadata, tensors, kinds))
    assert source.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q2_K, Kind.IQ4_XS])
def test_formats_of_large_blocks(tmp_path, wide, kind):
    metadata, tensors = wide
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 60, (256, size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "it.gguf", "llama")
    for key, value in metadata.items():
        (writer.add_uint32 if type(value) is int else writer.add_float32)(key, value)
    for name, array in tensors.items():
        if name == "blk.0.ffn_down.weight":
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = dict(open_gguf(tmp_path / "it.gguf").dense())
    expected = gguf.dequantize(blocks, kind)
    wo = found["decoder.layers.0.feed_forward.wo.weight"].numpy()
    assert np.array_equal(wo, expected)
    assert np.isfinite(wo).all()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A file with all that serving needs."""
    directory = tmp_path_factory.mktemp("served")
    tokenizer = train_byte_level(300)
    metadata = byte_level_metadata(tokenizer, "smollm")
    metadata |= {
        "tokenizer.chat_template": CHATML,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eot_token_id": 0,
    }
    values = {**SIZES, "vocab_size": 300, "num_hidden_layers": 2}
    oracle = make_family("llama", values)
    oracle.save_pretrained(directory / "folder")
    metadata |= llama_metadata("llama", oracle.config)
    tensors = to_gguf_tensors(saved_state(directory / "folder"), {"q_proj": 4, "k_proj": 2})
    (directory / "alone").mkdir()
    return write_gguf(directory / "alone" / "Tiny.Q4_1.gguf", "llama", metadata, tensors)


def test_a_file_or_its_folder_is_a_model(served):
    for path in (served, served.parent):
        assert detect_kind(path) == "gguf"
        tokenizer = open_tokenizer(path, "tokenizer_json")
        assert tokenizer.encode("<|im_start|>a1")[0] == 1
        template = read_template(path)
        assert (template.bos_token, template.eos_token) == ("<|im_start|>", "<|im_end|>")
        text = template.render([{"role": "user", "content": "hi"}], {}, is_opening=True)
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        storage, _ = find_storage(str(path), None)
        assert storage.config.eos_token_ids == (2, 0)
        assert storage.config.begin_token_ids == ()
        facts = inspect(path)
        assert [file["name"] for file in facts["files"]] == [served.name]


def test_loading_tells_how_far_it_is(served):
    with_phase = []
    loaded = load_within(served, torch.float32, None, None, with_phase.append)
    assert with_phase == ["reading weights", "preparing kernels"]
    assert loaded.model.config.num_decoder_layers == 2
    loaded.close()


def test_conversion_keeps_all(served, tmp_path):
    convert(served, tmp_path / "native")
    model, native = load_any(served), load_any(tmp_path / "native")
    assert native.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(native.state_dict()[name], tensor)
    text = "Größe 12 <|im_end|>"
    ours = open_tokenizer(tmp_path / "native", "tokenizer_json")
    assert ours.encode(text) == open_tokenizer(served, "tokenizer_json").encode(text)
    assert read_template(tmp_path / "native") == read_template(served)


def test_a_mixture_is_converted_with_its_experts(tmp_path):
    oracle = make_family("mixtral", FAMILIES["mixtral"][1])
    metadata = byte_level_metadata(train_byte_level(300), "gpt-2")
    file = write_family(tmp_path, "mixtral", "llama", oracle, **metadata)
    convert(file, tmp_path / "native")
    assert_equal_to_oracle(load_any(tmp_path / "native"), oracle)


def test_files_of_old_with_a_tensor_for_each_expert(tmp_path):
    oracle = make_family("mixtral", FAMILIES["mixtral"][1])
    oracle.save_pretrained(tmp_path / "folder")
    stacked = to_gguf_tensors(saved_state(tmp_path / "folder"), {"q_proj": 4, "k_proj": 2})
    tensors = {}
    for name, array in stacked.items():
        if "_exps." in name:
            parts = (name.replace("_exps.", f".{i}.") for i in range(len(array)))
            tensors |= dict(zip(parts, array, strict=True))
        else:
            tensors[name] = array
    assert "blk.0.ffn_up.3.weight" in tensors
    metadata = llama_metadata("llama", oracle.config)
    source = open_gguf(write_gguf(tmp_path / "it.gguf", "llama", metadata, tensors))
    expected = open_huggingface(tmp_path / "folder")
    for ours, theirs in zip(
        source.experts("decoder-1"), expected.experts("decoder-1"), strict=True
    ):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_several_files_in_a_folder(tmp_path):
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="several GGUF files: a.gguf, b.GGUF; name one"):
        detect_kind(tmp_path)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A mixture in one file, and in parts of nine tensors."""
    directory = tmp_path_factory.mktemp("split")
    oracle = make_family("mixtral", FAMILIES["mixtral"][1])
    oracle.save_pretrained(directory / "folder")
    metadata = llama_metadata("llama", oracle.config)
    metadata |= byte_level_metadata(train_byte_level(300), "gpt-2")
    tensors = to_gguf_tensors(saved_state(directory / "folder"), {"q_proj": 4, "k_proj": 2})
    whole = write_gguf(directory / "Whole.gguf", "llama", metadata, tensors)
    (directory / "parts").mkdir()
    name = directory / "parts" / "Tiny.gguf"
    return whole, write_gguf(name, "llama", metadata, tensors, tensors_to_a_part=9)


def test_a_split_file_is_what_it_was_before(split):
    whole, first = split
    files = sorted(first.parent.iterdir())
    assert [file.name for file in files] == [f"Tiny-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)]
    expected = load_any(whole).state_dict()
    for path in (first.parent, *files):  # any part, or the folder, is the model
        assert open_gguf(find_gguf(path)).files == tuple(files)
    found = load_any(files[2])
    assert found.config == load_any(whole).config
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert open_tokenizer(first, "tokenizer_json").encode("a1") == open_tokenizer(
        whole, "tokenizer_json"
    ).encode("a1")
    for path in (first, first.parent):
        assert [file["name"] for file in inspect(path)["files"]] == [file.name for file in files]


def test_parts_that_are_missing_or_of_other_files(split, tmp_path):
    _, first = split
    parts = [Path(shutil.copy(file, tmp_path)) for file in sorted(first.parent.iterdir())]
    third = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"-00003-of-00004\.gguf: is missing; .*into 4 files"):
        open_gguf(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 2 of 4, its name 3 of 4"):
        open_gguf(parts[0])
    parts[2].write_bytes(parts[1].read_bytes().replace(TWO, THREE))
    with pytest.raises(CheckpointError, match="has blk.0.* as has a part before it"):
        open_gguf(parts[0])
    parts[2].write_bytes(third)
    parts[0].write_bytes(parts[0].read_bytes().replace(NUMBER + b"!", NUMBER + b"x"))
    with pytest.raises(CheckpointError, match="120 tensors are told of, and 33 are there"):
        open_gguf(parts[0])
    alone = Path(shutil.copy(first, tmp_path / "alone.gguf"))
    with pytest.raises(CheckpointError, match="says that it is part 1 of 4, its name 1 of 1"):
        open_gguf(alone)


def rewritten(wide, path, *, drop=(), architecture="llama", extra=None, **values):
    metadata, tensors = wide
    metadata = {key: value for key, value in {**metadata, **values}.items() if key not in drop}
    tensors = {**{name: array for name, array in tensors.items() if name not in drop}}
    return write_gguf(path / "it.gguf", architecture, metadata, {**tensors, **(extra or {})})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba' are not supported; supported: llama, q"),
        ({"drop": ["llama.block_count"]}, "llama.block_count is missing; expected a whole number"),
        ({"drop": ["token_embd.weight"]}, "has no embedding"),
        ({"drop": ["blk.0.ffn_up.weight"]}, "1 tensors missing, first model.layers.0.mlp.up_proj"),
        (
            {"extra": {"blk.0.ssm_a": np.ones(4, np.float32)}},
            "has a tensor blk.0.ssm_a, which no llama has",
        ),
        ({"llama.context_length": "long"}, "llama.context_length is 'long'; expected a whole"),
        ({"llama.rope.freq_base": "x"}, "llama.rope.freq_base is 'x'; expected a number"),
        ({"llama.rope.scaling.type": "odd", "llama.rope.scaling.factor": 2.0}, "'odd'"),
        ({"llama.rope.scaling.type": 3}, "llama.rope.scaling.type is 3; expected a text"),
        ({"llama.attention.head_count": 3}, "it.gguf: "),
        ({"split.count": 2}, "says that it is part 1 of 2, its name 1 of 1; parts are called NAME"),
        ({"general.alignment": "x"}, "general.alignment is 'x'"),
    ],
)
def test_what_is_not_supported_is_told(tmp_path, wide, changes, reason):
    file = rewritten(wide, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=reason):
        open_gguf(file)


def test_a_format_that_cannot_be_dequantised(tmp_path, wide):
    file = rewritten(wide, tmp_path)
    content = bytearray(file.read_bytes())
    # after the name of a tensor: its dimensions, and then its format
    at = content.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4 + 16
    for kind, reason in ((Kind.I32, "format I32 cannot be read"), (99, "format, 99, that the")):
        content[at : at + 4] = int(kind).to_bytes(4, "little")
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            open_gguf(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no GGUF file"),
        (b"PK\3\4", "is no GGUF file"),
        (b"GGUF", "ends inside its head"),
        (b"GGUF\1\0\0\0", "version 1 is not supported; supported: 2 and 3"),
        (b"GGUF\0\0\0\3", "it is for big-endian machines"),
        (b"GGUF\3\0\0\0" + b"\0" * 8 + b"\xff" * 8, "ends inside its head"),
    ],
)
def test_files_that_are_none(tmp_path, content, reason):
    (tmp_path / "it.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"it\.gguf: .*{reason}"):
        read_header(tmp_path / "it.gguf")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gguf(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a file as small as they come."""
    values = {**SIZES, "num_hidden_layers": 1, "vocab_size": 8}
    oracle = make_family("llama", values)
    directory = tmp_path_factory.mktemp("small")
    oracle.save_pretrained(directory)
    tensors = to_gguf_tensors(saved_state(directory), {"q_proj": 4, "k_proj": 2})
    metadata = {**llama_metadata("llama", oracle.config), "tokenizer.ggml.tokens": ["a", "b"]}
    return write_gguf(directory / "it.gguf", "llama", metadata, tensors)


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(small, share):
    content = small.read_bytes()
    cut = small.with_name("cut.gguf")
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="cut.gguf"):
        open_gguf(cut)


@settings(deadline=None, max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_damaged_head_is_refused_or_read(small, place, byte):
    content = bytearray(small.read_bytes())
    head = content.index(b"blk.0.attn_v.weight") + 60
    content[int(place * head)] = byte
    damaged = small.with_name("damaged.gguf")
    damaged.write_bytes(content)
    try:
        source = open_gguf(damaged)
    except CheckpointError:
        return
    assert source.config.num_decoder_layers == 1


def head_of(*values, tensors=()):
    """The head of a file: keys, kinds of values and their bytes; names, shapes and formats."""
    text = struct.Struct("<Q").pack
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, kind, content in values:
        head += text(len(key)) + key + struct.pack("<I", kind) + content
    for name, shape, kind, offset in tensors:
        head += text(len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", kind, offset)
    return head


ENDLESS = struct.pack("<Q", 2**63)
NUMBERS = (b"x", 9, struct.pack("<IQ", 4, 2**40))
TEXTS = (b"x", 9, struct.pack("<IQ", 8, 2**32))
TOO_LONG = (b"x", 8, struct.pack("<Q", 2**34))
LISTS = (b"x", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (head_of((b"x", 8, ENDLESS)), "its head goes on beyond 256 MiB"),
        (head_of(NUMBERS), "its head goes on beyond 256 MiB"),
        (head_of(TEXTS), "a list goes on beyond its head"),
        (head_of(TOO_LONG), "its head goes on beyond 256 MiB"),
        (head_of(LISTS), "a value is of kind 9"),
        (head_of((b"x", 99, b"")), "a value is of kind 99"),
        (head_of((b"general.alignment", 4, bytes(4))), "general.alignment is 0"),
        (head_of((b"general.alignment", 11, b"\xff" * 8)), "general.alignment is -1"),
        (head_of(tensors=[(b"a", (0,), 0, 0)]), r"a has shape \[0\]"),
        (head_of(tensors=[(b"a", (32, 0), 2, 0)]), r"a has shape \[0, 32\]"),
        (head_of(tensors=[(b"a", (), 0, 0)]), r"a has shape \[\]"),
        (head_of(tensors=[(b"a", (1,) * 5, 0, 0)]), "a has 5 dimensions"),
        (head_of(tensors=[(b"a", (2**62, 2**62), 0, 0)]), "a lies beyond its end"),
        (head_of(tensors=[(b"a", (1,), 0, 2**64 - 32)]), "a lies beyond its end"),
    ],
)
def test_heads_that_tell_of_too_much(tmp_path, head, reason):
    path = tmp_path / "it.gguf"
    path.write_bytes(head)
    os.truncate(path, 2**30)  # a hole, so that the file itself is no bound
    with pytest.raises(CheckpointError, match=rf"it\.gguf: truncated or damaged \({reason}"):
        read_header(path)


def test_more_experts_than_are_told_of(split, tmp_path):
    metadata = {"llama.expert_count": 2, "llama.expert_used_count": 2}
    values, tensors = split_content(split)
    file = write_gguf(tmp_path / "it.gguf", "llama", values | metadata, tensors)
    with pytest.raises(CheckpointError, match=r"exps\.weight is of 4 experts, its .* tells of 2"):
        open_gguf(file)
    del values["llama.expert_count"]
    file = write_gguf(tmp_path / "none.gguf", "llama", values, tensors)
    with pytest.raises(CheckpointError, match=r"exps\.weight is of 4 experts, .* tells of none"):
        open_gguf(file)


def split_content(split):
    """Metadata and tensors of the mixture, which is in fp32."""
    header = read_header(split[0])
    values = {key: value for key, value in header.metadata.items() if key.startswith("llama")}
    tensors = {
        name: np.fromfile(place.path, np.float32, place.num_bytes // 4, offset=place.offset)
        for name, place in header.places.items()
    }
    shapes = {name: place.shape for name, place in header.places.items()}
    return values, {name: array.reshape(shapes[name]) for name, array in tensors.items()}


@pytest.mark.parametrize("name", ["llama.block_count", "blk.0.attn_v.weight"])
def test_names_that_are_there_twice(small, tmp_path, name):
    content = small.read_bytes()
    other = {"llama.block_count": "llama.vocab_sizes", "blk.0.attn_v.weight": "blk.0.attn_q.weight"}
    twice = content.replace(other[name].encode()[: len(name)], name.encode())
    if name == "llama.block_count":
        twice = content.replace(b"llama.rope.freq_base", b"llama.context_length")
    (tmp_path / "it.gguf").write_bytes(twice)
    with pytest.raises(CheckpointError, match="is there twice"):
        open_gguf(tmp_path / "it.gguf")


def test_without_the_package(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'infmoe\[gguf\]' has it"):
        read_header(small)
