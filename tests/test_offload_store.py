import contextlib
import json
import mmap
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from offload.errors import ReadCancelled, StoreError
from offload.layout import PAGE_BYTES, layout_from_json, make_layout
from offload.store import CHUNK_BYTES, StoreWriter, crc32, create_store, open_store

LAYOUT = make_layout({"norm": ("F16", (100,)), "wi_0": ("BF16", (40, 70)), "wo": ("F32", (3, 5))})
NUM_EXPERTS = 3


def random_expert(seed, layout=LAYOUT):
    rng = np.random.default_rng(seed)
    return {spec.name: rng.integers(0, 256, spec.nbytes, np.uint8) for spec in layout.tensors}


def write_store(path, layout=LAYOUT, num_experts=NUM_EXPERTS, layer="encoder-0"):
    with create_store(path, layer, layout, num_experts) as store:
        for expert in range(num_experts):
            store.write(expert, random_expert(expert, layout))
        store.finish()
    return path


@pytest.fixture
def path(tmp_path):
    return write_store(tmp_path / "experts-encoder-0.safetensors")


def read_header(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path, header, blobs, start=None):
    """Put another header before the blobs, padded so that they begin at `start`."""
    text = json.dumps(header).encode()
    start = start or -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES
    text = text.ljust(start - 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + blobs)


def test_layout_aligns_tensors_and_blobs():
    assert [spec.offset for spec in LAYOUT.tensors] == [0, 256, 256 + 5632]
    assert [spec.nbytes for spec in LAYOUT.tensors] == [200, 5600, 60]
    assert LAYOUT.blob_bytes == 2 * PAGE_BYTES


def test_reads_what_was_written(path):
    with open_store(path) as store:
        assert (store.layer, store.num_experts, store.layout) == ("encoder-0", 3, LAYOUT)
        out = np.full(LAYOUT.blob_bytes, 7, np.uint8)
        for expert in (2, 0, 1):
            assert store.offset(expert) % PAGE_BYTES == 0
            assert store.read_blob(expert, out) is out
            expected = np.zeros(LAYOUT.blob_bytes, np.uint8)  # padding is zero
            for spec in LAYOUT.tensors:
                data = random_expert(expert)[spec.name]
                expected[spec.offset : spec.offset + spec.nbytes] = data
            np.testing.assert_array_equal(out, expected)
            np.testing.assert_array_equal(store.read_blob(expert), expected)


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(["F32", "F16", "I8"]),
    num_experts=st.integers(1, 5),
)
def test_any_layout_survives_a_round_trip(shapes, dtype, num_experts, tmp_path_factory):
    layout = make_layout({f"t{i}": (dtype, tuple(shape)) for i, shape in enumerate(shapes)})
    path = write_store(tmp_path_factory.mktemp("store") / "s", layout, num_experts)
    with open_store(path) as store:
        assert store.layout == layout
        for expert in range(num_experts):
            blob = store.read_blob(expert)
            for spec in layout.tensors:
                part = blob[spec.offset : spec.offset + spec.nbytes]
                np.testing.assert_array_equal(part, random_expert(expert, layout)[spec.name])


def test_is_a_valid_safetensors_file(path):
    tensors = load_file(path)
    assert sorted(tensors) == ["expert-000", "expert-001", "expert-002"]
    with open_store(path) as store:
        for expert, blob in enumerate(tensors.values()):
            np.testing.assert_array_equal(tensors[f"expert-{expert:03d}"], store.read_blob(expert))
            assert blob.dtype == np.uint8


def test_many_threads_may_read(path):
    with open_store(path) as store, ThreadPoolExecutor(8) as pool:
        blobs = list(pool.map(lambda i: store.read_blob(i % NUM_EXPERTS), range(60)))
        for i, blob in enumerate(blobs):
            np.testing.assert_array_equal(blob, store.read_blob(i % NUM_EXPERTS))


def test_nothing_appears_before_finish(tmp_path):
    path = tmp_path / "s"
    with create_store(path, "encoder-0", LAYOUT, 2) as store:
        store.write(0, random_expert(0))
        assert [entry.name for entry in tmp_path.iterdir()] == ["s.partial"]
        with pytest.raises(ValueError, match="1 experts were not written"):
            store.finish()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_if_the_name_is_taken_by_a_folder(tmp_path):
    (tmp_path / "x").mkdir()
    with create_store(tmp_path / "x", "encoder-0", LAYOUT, 1) as store:
        store.write(0, random_expert(0))
        with pytest.raises(StoreError, match="x: cannot be written: Is a directory"):
            store.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_writer_refuses_what_the_layout_does_not_have(tmp_path):
    good = random_expert(0)
    with create_store(tmp_path / "s", "encoder-0", LAYOUT, 2) as store:
        with pytest.raises(ValueError, match=r"not in 0\.\.1"):
            store.write(-1, good)
        with pytest.raises(ValueError, match="not the tensors of the layout"):
            store.write(0, {"norm": good["norm"]})
        with pytest.raises(ValueError, match="wo is not a row of 60 bytes"):
            store.write(0, {**good, "wo": good["wo"][:-1]})
        with pytest.raises(ValueError, match="norm is not a row"):
            store.write(0, {**good, "norm": good["norm"].view(np.int8)})
    with pytest.raises(ValueError, match="at least 1"):
        create_store(tmp_path / "s", "encoder-0", LAYOUT, 0)


def test_cannot_create_or_open_where_there_is_no_file(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere/s: cannot be created: No such file"):
        create_store(tmp_path / "nowhere" / "s", "encoder-0", LAYOUT, 1)
    with pytest.raises(StoreError, match="absent: cannot be opened: No such file"):
        open_store(tmp_path / "absent")
    with pytest.raises(StoreError, match="cannot be read: Is a directory"):
        open_store(tmp_path)


def test_a_full_disk_is_a_store_error():
    with (
        pytest.raises(StoreError, match="/dev/full: cannot be written: No space left"),
        open_full_device() as store,
    ):
        store.write(0, random_expert(0))


def open_full_device():
    file = os.open("/dev/full", os.O_WRONLY)
    return StoreWriter(file, Path("/dev/full"), "encoder-0", LAYOUT, 1)


@pytest.mark.parametrize("size", [0, 5, 8, 100, PAGE_BYTES, PAGE_BYTES + 1, -1])
def test_truncated_file(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StoreError, match=r"experts-encoder-0\.safetensors: not a complete"):
        open_store(path)


def test_file_with_something_behind(path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(StoreError, match="its header tells of"):
        open_store(path)


@pytest.mark.parametrize("content", [b"GGUF" * 4000, b"\0" * 10000, b"PK\x03\x04" * 3000])
def test_foreign_file(path, content):
    path.write_bytes(content)
    with pytest.raises(StoreError, match="not a complete expert store"):
        open_store(path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format", "pt", "lacks format"),
        ("version", "2", "version '2' is not 1; upgrade"),
        ("checksum", "md5", "checksum 'md5' is unknown"),
        ("checksums", "", "not 0 blobs"),
        ("checksums", "xyz", "invalid literal"),
        ("checksums", "00 00", "not 2 blobs"),
        ("checksums", 3, "no attribute"),
        ("layout", "{", "Expecting"),
        ("layout", "[" * 100_000, "recursion"),
        ("layout", None, "JSON object must be str"),
    ],
)
def test_wrong_metadata(path, key, value, reason):
    header, blobs = read_header(path)
    header["__metadata__"][key] = value
    write_header(path, header, blobs)
    with pytest.raises(StoreError, match=reason):
        open_store(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quantization": "int3"}, "'int3' is unknown; known: none, int8, int4; upgrade InfMoE"),
        ({"blob_bytes": 8191}, "no multiple of 4096"),
        ({"blob_bytes": 8192.0}, "no multiple of 4096"),
        ({"blob_bytes": 4096}, "do not fit a blob of 4096"),
        ({"blob_bytes": 12288}, "not 3 blobs of 12288 bytes"),
        ({"colour": "red"}, "unexpected keyword"),
    ],
)
def test_wrong_layout(path, change, reason):
    header, blobs = read_header(path)
    layout = json.loads(header["__metadata__"]["layout"])
    header["__metadata__"]["layout"] = json.dumps({**layout, **change})
    write_header(path, header, blobs)
    with pytest.raises(StoreError, match=reason):
        open_store(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": ["norm"]}, "which is no text"),
        ({"dtype": "F8"}, "dtype 'F8' is unknown"),
        ({"nbytes": 100}, "100 bytes do not fit its shape"),
        ({"shape": [-10, -10]}, "no whole number"),
        ({"offset": 0.0}, "no whole number"),
        ({"offset": 8}, "overlaps"),
    ],
)
def test_wrong_tensor_spec(change, reason):
    good = {"name": "norm", "dtype": "F16", "shape": [100], "offset": 0, "nbytes": 200}
    second = {"name": "wo", "dtype": "F16", "shape": [1], "offset": 100, "nbytes": 2}
    values = {"tensors": [{**good, **change}, second], "blob_bytes": PAGE_BYTES}
    with pytest.raises(ValueError, match=reason):
        layout_from_json(json.dumps(values))


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_layout_survives_json(quantization):
    layout = make_layout({"wo": ("I8", (3, 5)), "wo_scale": ("BF16", (3,))}, quantization)
    assert layout_from_json(layout.to_json()) == layout
    assert layout.quantization == quantization


def test_misaligned_data(path):
    header, blobs = read_header(path)
    write_header(path, header, blobs, start=PAGE_BYTES + 512)
    assert len(load_file(path)) == NUM_EXPERTS  # valid safetensors, but not what can be read direct
    with pytest.raises(StoreError, match="data begins at byte 4608"):
        open_store(path)


def test_other_tensors_than_the_checksums_tell(path):
    header, blobs = read_header(path)
    header["expert-001"]["data_offsets"] = [0, LAYOUT.blob_bytes]
    write_header(path, header, blobs)
    with pytest.raises(StoreError, match="its tensors are not 3 blobs"):
        open_store(path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 2500), value=st.integers(0, 255))
def test_any_damage_to_the_header_is_refused_or_harmless(position, value, tmp_path_factory):
    path = write_store(tmp_path_factory.mktemp("store") / "s")
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)
    with contextlib.suppress(StoreError), open_store(path) as store:
        store.read_blob(0)


@pytest.mark.parametrize("offset", [0, 150, 256, LAYOUT.blob_bytes - 1])  # the padding counts too
def test_damaged_blob_names_file_layer_and_expert(path, offset):
    with open_store(path) as store:
        position = store.offset(1) + offset
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with open_store(path) as store:
        store.read_blob(0)
        for _ in range(2):  # a blob that failed is checked again
            with pytest.raises(StoreError, match=r"0\.safetensors: layer encoder-0, expert 1"):
                store.read_blob(1)
        store.read_blob(2)


def test_checksum_is_verified_on_the_first_read_only(path):
    written = path.stat().st_mtime_ns
    with open_store(path) as store:
        store.read_blob(1)
        with path.open("r+b") as file:
            file.seek(store.offset(1))
            file.write(b"damage")
        os.utime(path, ns=(written, written))  # as if nothing had happened
        assert bytes(store.read_blob(1)[:6]) == b"damage"
        with pytest.raises(StoreError, match="damaged: checksum"):
            store.verify(1, store.read_blob(1))


def test_checksum_is_verified_again_after_a_change_of_the_file(path):
    with open_store(path) as store:
        before = bytes(store.read_blob(1))
        with path.open("r+b") as file:  # in place, as cp or rsync --inplace do it
            file.seek(store.offset(1))
            file.write(b"damage")
        with pytest.raises(StoreError, match="expert 1: damaged: checksum"):
            store.read_blob(1)
        with path.open("r+b") as file:
            file.seek(store.offset(1))
            file.write(before[:6])
        assert bytes(store.read_blob(1)) == before


@pytest.mark.parametrize("bypass_cache", [False, True])
def test_file_that_shrinks_while_open(path, bypass_cache):
    aligned = np.frombuffer(mmap.mmap(-1, LAYOUT.blob_bytes), np.uint8)
    with open_store(path) as store:
        if bypass_cache:
            store.bypass_cache()
        with path.open("r+b") as file:
            file.truncate(store.offset(2) + 10)
        with pytest.raises(StoreError, match="expert 2: the file ends inside the blob"):
            store.read_blob(2, aligned)


@pytest.fixture(scope="module")
def long_blobs(tmp_path_factory):
    """A store whose blobs take three chunks each."""
    layout = make_layout({"w": ("U8", (2 * CHUNK_BYTES + 5,))})
    return write_store(tmp_path_factory.mktemp("store") / "s", layout, 2)


@pytest.mark.parametrize("bypass_cache", [False, True])
def test_a_read_is_cancelled_between_chunks(long_blobs, bypass_cache):
    with open_store(long_blobs) as store:
        if bypass_cache:
            store.bypass_cache()
        whole = store.read_blob(0)
        for allowed in range(3):
            answers = [False] * allowed + [True]
            out = np.zeros_like(whole)
            with pytest.raises(ReadCancelled, match="expert 0: the read was cancelled"):
                store.read_blob(0, out, lambda a=answers: a.pop(0))
            assert answers == []
            read = allowed * CHUNK_BYTES
            np.testing.assert_array_equal(out[:read], whole[:read])
            assert not out[read:].any()
        asked = []
        out = store.read_blob(0, None, lambda: bool(asked.append(1)))
        np.testing.assert_array_equal(out, whole)
        assert len(asked) == 3


def test_a_cancelled_read_verifies_nothing(long_blobs, tmp_path):
    data = bytearray(long_blobs.read_bytes())
    data[-5000] ^= 1  # in the last chunk
    path = tmp_path / "s"
    path.write_bytes(data)
    with open_store(path) as store:
        answers = [False, False, True]
        with pytest.raises(ReadCancelled):
            store.read_blob(1, None, lambda: answers.pop(0))
        with pytest.raises(StoreError, match="expert 1: damaged: checksum"):
            store.read_blob(1)


def test_reader_refuses_wrong_arguments(path):
    with open_store(path) as store:
        with pytest.raises(ValueError, match=r"expert 3 not in 0\.\.2"):
            store.read_blob(3)
        with pytest.raises(ValueError, match="expert -1"):
            store.read_blob(-1)
        for out in (np.empty(10, np.uint8), np.empty(LAYOUT.blob_bytes, np.int8)):
            with pytest.raises(ValueError, match="out is no uint8 buffer"):
                store.read_blob(0, out)


def test_reading_a_closed_store_is_an_error(path):
    store = open_store(path)
    store.close()
    with pytest.raises(StoreError, match="cannot be read: Bad file descriptor"):
        store.read_blob(0)


def test_reading_past_the_page_cache_gives_the_same_bytes(tmp_path):
    layout = make_layout({"w": ("U8", (9000,))})
    blobs = [np.full(9000, i + 1, np.uint8) for i in range(3)]
    with create_store(tmp_path / "s", "encoder-0", layout, 3) as writer:
        for i, blob in enumerate(blobs):
            writer.write(i, {"w": blob})
        writer.finish()
    aligned = np.frombuffer(mmap.mmap(-1, layout.blob_bytes), np.uint8)
    unaligned = np.empty(layout.blob_bytes + 1, np.uint8)[1:]
    with open_store(tmp_path / "s") as store:
        assert not store.is_direct
        store.bypass_cache()
        for out in (aligned, unaligned, aligned):
            for i in range(3):
                assert (store.read_blob(i, out)[:9000] == i + 1).all()


def test_checksums_are_those_of_zlib():
    data = np.arange(10_000, dtype=np.uint64).view(np.uint8)
    assert crc32(data.data, 7) == zlib.crc32(data.data, 7)
