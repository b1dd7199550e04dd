import dataclasses
import os
import zipfile

import numpy as np
import pytest
import torch

from engine.checkpoint_npz import (
    convert_archive,
    read_centroids,
    read_experts,
    read_router_norm,
)
from engine.checkpoint_tensors import blob_tensors
from engine.config import ModelConfig
from engine.errors import CheckpointError
from offload.store import open_store

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=6,
    d_ff=10,
    d_kv=2,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_experts=3,
)
SHAPES = {
    "layer_norm_weight": (6,),
    "wi_0_weight": (10, 6),
    "wi_1_weight": (10, 6),
    "wo_weight": (6, 10),
}
NAMES = {
    "norm": "layer_norm_weight",
    "wi_0": "wi_0_weight",
    "wi_1": "wi_1_weight",
    "wo": "wo_weight",
}


def members(order="C", num_experts=3):
    rng = np.random.default_rng(0)
    return {
        f"{expert}/{name}": np.asarray(rng.standard_normal(shape, np.float32), order=order)
        for expert in range(num_experts)
        for name, shape in SHAPES.items()
    }


def write(path, arrays, save=np.savez):
    with path.open("wb") as file:
        save(file, **arrays)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_reads_either_order(path, order, save):
    arrays = members(order)
    assert arrays["0/wo_weight"].flags.f_contiguous == (order == "F")
    experts = list(read_experts(write(path, arrays, save), CONFIG))
    assert len(experts) == 3
    for expert, tensors in enumerate(experts):
        assert list(tensors) == list(CONFIG.expert_shapes())
        for name, member in NAMES.items():
            np.testing.assert_array_equal(tensors[name].numpy(), arrays[f"{expert}/{member}"])
            assert tensors[name].is_contiguous()


def test_transposed_view_as_the_example_generator_saves_it(path):
    arrays = members()
    for expert in range(3):
        arrays[f"{expert}/wo_weight"] = np.ascontiguousarray(arrays[f"{expert}/wo_weight"].T).T
    experts = list(read_experts(write(path, arrays), CONFIG))
    np.testing.assert_array_equal(experts[1]["wo"].numpy(), members()["1/wo_weight"])


def test_becomes_an_expert_store(path, tmp_path):
    arrays = members("F")
    target = tmp_path / "experts-encoder-0.safetensors"
    convert_archive(write(path, arrays), "encoder-0", CONFIG, torch.bfloat16, target)
    with open_store(target) as store:
        assert (store.layer, store.num_experts) == ("encoder-0", 3)
        for expert in range(3):
            tensors = blob_tensors(store.read_blob(expert), store.layout)
            for name, member in NAMES.items():
                expected = torch.from_numpy(arrays[f"{expert}/{member}"]).bfloat16()
                assert torch.equal(tensors[name], expected)
    with pytest.raises(CheckpointError, match="nowhere/s: cannot be created"):
        convert_archive(path, "encoder-0", CONFIG, torch.float32, tmp_path / "nowhere" / "s")


def test_wrong_members(path):
    good = members()
    for change, message in [
        ({"1/bias": np.ones(2)}, "1/bias is unknown"),
        ({"readme": np.ones(2)}, "readme is unknown"),
        ({"2/wo_weight": np.ones((10, 6), np.float32)}, r"expert 2: wo has shape \[10, 6\], expec"),
        ({"0/wi_0_weight": np.ones((10, 6), np.int32)}, "wi_0 is torch.int32, expected one of"),
        ({"0/wi_0_weight": np.ones((10, 6), ">f4")}, "0/wi_0_weight is damaged or no array"),
        ({"0/wi_0_weight": np.ones((10, 6), np.longdouble)}, "damaged or no array"),
    ]:
        write(path, {**good, **change})
        with pytest.raises(CheckpointError, match=message):
            list(read_experts(path, CONFIG))
    del good["1/wi_1_weight"]
    with pytest.raises(CheckpointError, match=r"layer\.npz: 1/wi_1_weight is missing"):
        list(read_experts(write(path, good), CONFIG))


@pytest.mark.parametrize("num_experts", [2, 4])
def test_wrong_number_of_experts(path, num_experts):
    write(path, members(num_experts=num_experts))
    with pytest.raises(CheckpointError, match=f"has {num_experts} experts, expected 3"):
        list(read_experts(path, CONFIG))


def test_ungated_config(path):
    config = dataclasses.replace(CONFIG, gated=False)
    with pytest.raises(CheckpointError, match="experts are gated, those of the config are not"):
        list(read_experts(write(path, members()), config))


class Touch:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_pickled_objects_are_not_run(path, tmp_path):
    attack = np.array([Touch(tmp_path / "pwned")], dtype=object)
    write(path, {**members(), "0/wo_weight": attack})
    with pytest.raises(CheckpointError, match="0/wo_weight is damaged or no array .*Object arrays"):
        list(read_experts(path, CONFIG))
    np.save(tmp_path / "centroids.npy", attack)
    with pytest.raises(CheckpointError, match="truncated or no .npy file"):
        read_centroids(tmp_path / "centroids.npy", CONFIG)
    assert not (tmp_path / "pwned").exists()


def test_damaged_archive(path, tmp_path):
    write(path, members())
    data = path.read_bytes()
    for content in (data[:-30], data[:10], b"", b"hello" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"layer\.npz: truncated or no \.npz archive"):
            list(read_experts(path, CONFIG))
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(CheckpointError, match=r"array\.npy: is no \.npz archive"):
        list(read_experts(tmp_path / "array.npy", CONFIG))
    with pytest.raises(CheckpointError, match="absent: cannot be read: No such file"):
        list(read_experts(tmp_path / "absent", CONFIG))


def test_encrypted_member(path):
    write(path, members())
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # a flag of the last member, in the directory
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="2/wo_weight is damaged or no array .*encrypted"):
        list(read_experts(path, CONFIG))


@pytest.mark.parametrize("shape", [f"({10**15},)", f"({10**20},)", "(3, 6"])
def test_impossible_headers(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    path = tmp_path / "c.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(CheckpointError, match=r"c\.npy: truncated or no \.npy file"):
        read_centroids(path, CONFIG)


def test_damaged_member(path):
    write(path, members(), np.savez_compressed)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("1/wi_0_weight.npy").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 100 : offset + 110] = b"x" * 10
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="1/wi_0_weight is damaged"):
        list(read_experts(path, CONFIG))


def test_centroids(tmp_path):
    path = tmp_path / "centroids.npy"
    array = np.arange(18, dtype=np.float32).reshape(3, 6)
    np.save(path, array)
    np.testing.assert_array_equal(read_centroids(path, CONFIG).numpy(), array)
    with pytest.raises(CheckpointError, match=r"holds float32 \(3, 6\), expected floats \(6, 3\)"):
        read_centroids(path, CONFIG, transposed=True)
    np.save(path, array.T)
    np.testing.assert_array_equal(read_centroids(path, CONFIG, transposed=True).numpy(), array)
    with pytest.raises(CheckpointError, match=r"holds float32 \(6, 3\), expected floats \(3, 6\)"):
        read_centroids(path, CONFIG)


def test_square_centroids_are_taken_at_their_word(tmp_path):
    config = dataclasses.replace(CONFIG, num_experts=6)
    array = np.arange(36, dtype=np.float32).reshape(6, 6)
    np.save(tmp_path / "c.npy", array)
    np.testing.assert_array_equal(read_centroids(tmp_path / "c.npy", config).numpy(), array)
    transposed = read_centroids(tmp_path / "c.npy", config, transposed=True)
    np.testing.assert_array_equal(transposed.numpy(), array.T)


def test_router_norm(tmp_path):
    path = tmp_path / "norm.npy"
    np.save(path, np.arange(6, dtype=np.float32))
    assert read_router_norm(path, CONFIG).tolist() == [0, 1, 2, 3, 4, 5]
    for array in (np.ones(7, np.float32), np.ones(6, np.int64), np.ones(6, ">f4")):
        np.save(path, array)
        with pytest.raises(CheckpointError, match=r"norm\.npy: holds .*, expected floats \(6,\)"):
            read_router_norm(path, CONFIG)
    write(path, {"a": np.ones(6)})
    with pytest.raises(CheckpointError, match="is an archive, expected one array"):
        read_router_norm(path, CONFIG)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"norm\.npy: truncated or no \.npy file"):
        read_router_norm(path, CONFIG)
