import dataclasses
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import (
    build_model,
    load_model,
    open_expert_stores,
    open_native,
    save_model,
    save_state,
)
from engine.checkpoint_lock import LOCK, lock_directory
from engine.checkpoint_tensors import MAPPED_BYTES
from engine.checkpoint_writer import open_writer
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.initial import initialize
from engine.model.moe import ResidentExperts
from engine.model.transformer import Transformer
from engine.random_model import write_random_model
from offload.layout import make_layout
from offload.store import create_store

DENSE = ModelConfig(
    vocab_size=96,
    d_model=16,
    d_ff=24,
    d_kv=4,
    num_heads=4,
    num_encoder_layers=1,
    num_decoder_layers=2,
    eos_token_ids=(8,),
)
MOE = dataclasses.replace(DENSE, num_experts=3)
VARIANTS = {
    "dense": DENSE,
    "moe": MOE,
    "base_layer": dataclasses.replace(MOE, router="base_layer"),
    "ungated": dataclasses.replace(MOE, gated=False, activation="relu"),
    "tied": dataclasses.replace(DENSE, tied_embeddings=True, scale_logits=True),
}


def random_model(config=MOE, seed=0):
    model = Transformer(config)
    initialize(model, seed)
    return model


def assert_same(model, state):
    assert model.state_dict().keys() == state.keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=0, msg=key)


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "model"
    save_model(random_model(), directory)
    return directory


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path):
    model = random_model(VARIANTS[name])
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert_same(loaded, model.state_dict())
    for (_, before), (_, after) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert before.requires_grad == after.requires_grad
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    stores = [f"experts-{layer}.safetensors" for layer in sorted(model.config.moe_layers())]
    assert names == ["config.json", *stores, "model.safetensors"]


def test_loaded_model_computes_the_same_and_owns_its_memory(saved):
    model, loaded = random_model(), load_model(saved)
    for path in saved.iterdir():  # a mapped tensor would change with its file
        path.write_bytes(bytes(path.stat().st_size))
    tokens = torch.arange(12).view(2, 6)
    ones = torch.ones_like(tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tokens, ones, tokens, ones), model(tokens, ones, tokens, ones), rtol=0, atol=0
        )


def test_dtypes(tmp_path):
    model = random_model()
    save_model(model, tmp_path / "half", dtype=torch.bfloat16)
    half = load_model(tmp_path / "half")
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert_same(half, model.bfloat16().state_dict())
    wide = load_model(tmp_path / "half", torch.float32)
    assert_same(wide, model.float().state_dict())
    assert open_native(tmp_path / "half").dtype is torch.bfloat16


def test_values_too_large_for_a_dtype_are_refused(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.embedding.weight[0, 0] = 1e6
        save_model(model, tmp_path / "wide")
        with pytest.raises(
            CheckpointError, match=r"embedding\.weight has values too large .* bfloat"
        ):
            load_model(tmp_path / "wide", torch.float16)
        load_model(tmp_path / "wide", torch.bfloat16)
        model.embedding.weight[0, 0] = float("inf")  # was there before: not our business
        save_model(model, tmp_path / "inf", dtype=torch.float16)


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_shards(tmp_path, shard_bytes):
    model = random_model()
    save_state(model.config, model.state_dict(), tmp_path / "m", shard_bytes=shard_bytes)
    assert_same(load_model(tmp_path / "m"), model.state_dict())
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert bool(shards) == (shard_bytes < 10**9)
    if shards:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
        assert sum(sizes) == index["metadata"]["total_size"]
        assert all(
            size <= shard_bytes or len(load_file(shard)) == 1
            for size, shard in zip(sizes, shards, strict=True)
        )


def test_tokenizer_files_are_copied(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("<unk>\n北京\n", encoding="utf-8")
    save_model(random_model(), tmp_path / "m", [vocabulary])
    assert (tmp_path / "m" / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    assert list(open_native(tmp_path / "m").tokenizer_files) == ["vocab.txt"]


def test_other_files_are_not_copied(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.md is no tokenizer file; known: vocab\.txt"):
        save_model(random_model(), tmp_path / "m", [tmp_path / "notes.md"])
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        save_model(random_model(), tmp_path / "m", [tmp_path / "vocab.txt"])


def test_experts_from_elsewhere_are_not_read(saved):
    experts = ResidentExperts(MOE)
    model = load_model(saved, experts=experts)
    assert model.experts is experts
    torch.testing.assert_close(model.embedding.weight, random_model().embedding.weight)


def test_expert_stores(saved):
    stores = open_expert_stores(saved, MOE)
    assert list(stores) == MOE.moe_layers()
    for store in stores.values():
        assert store.num_experts == 3
        store.close()
    assert open_expert_stores(saved, DENSE) == {}


# What can be wrong with a directory


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="absent: does not exist$"):
        load_model(tmp_path / "absent")
    (tmp_path / "absent.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"absent\.partial is an unfinished conversion"):
        load_model(tmp_path / "absent")
    (tmp_path / "absent.replaced").mkdir()
    with pytest.raises(CheckpointError, match=r"run it again; absent\.replaced is the older model"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: is empty"):
        load_model(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: cannot be listed: Not a directory"):
        load_model(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(saved):
    (saved / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be opened: Permission"):
        load_model(saved)
    saved.parent.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"new\.partial: cannot be written: Permission"):
        save_model(random_model(), saved.parent / "new")
    saved.parent.chmod(0o700)


@pytest.mark.parametrize("name", ["model.safetensors", "experts-decoder-1.safetensors"])
def test_folder_in_place_of_a_file(saved, name):
    (saved / name).unlink()
    (saved / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: cannot be"):
        load_model(saved)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "experts-encoder-0.safetensors"]
)
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_model(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "experts-encoder-0.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_truncated_file(saved, name, keep):
    (saved / name).write_bytes((saved / name).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=name):
        load_model(saved)


def test_damaged_expert(saved):
    path = saved / "experts-decoder-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-4000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"decoder-0\.safetensors: layer decoder-0, expert 2"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 95}, r"embedding\.weight has shape \[96, 16\], expected \[95, 16\]"),
        ({"num_experts": 0}, "has no tensor decoder.layers.0.moe.centroids"),
        ({"num_encoder_layers": 2}, "experts-encoder-1.safetensors: is missing"),
        ({"num_decoder_layers": 1}, "has no tensor decoder.layers.1"),
        ({"tied_embeddings": True}, "has no tensor lm_head.weight"),
        ({"d_ff": 25}, "experts-encoder-0.safetensors: holds .* the config tells of"),
        ({"colour": 3}, "config.json: unknown keys colour"),
        ({"format": "other"}, "not a native config"),
    ],
)
def test_config_disagrees_with_the_tensors(saved, change, message):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_wrong_dense_tensors(saved):
    path = saved / "model.safetensors"
    good = {key: tensor.clone() for key, tensor in load_file(path).items()}
    key = "decoder.norm.weight"
    for spoilt, message in [
        (
            {k: t for k, t in good.items() if k != key},
            r"1 tensors are missing, first .*norm\.weight",
        ),
        ({**good, "extra": good[key].clone()}, "has no tensor extra"),
        ({**good, key: good[key].clone().view(4, 4)}, r"has shape \[4, 4\], expected \[16\]"),
        ({**good, key: good[key].long()}, "is torch.int64, expected one of float64, float32"),
    ]:
        save_file(spoilt, path)
        with pytest.raises(CheckpointError, match=message):
            load_model(saved)
    save_file({key: tensor.long() for key, tensor in good.items()}, path)
    with pytest.raises(CheckpointError, match="embedding.weight is I64, expected a float"):
        load_model(saved)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="there is no tensor embedding.weight"):
        load_model(saved)


def test_expert_file_of_another_layer(saved):
    first, second = (saved / f"experts-decoder-{i}.safetensors" for i in range(2))
    first.replace(second)
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"decoder-1\.safetensors: holds \('decoder-0', 3"):
        load_model(saved)


def test_wrong_index(tmp_path):
    model, directory = random_model(), tmp_path / "m"
    save_state(model.config, model.state_dict(), directory, shard_bytes=3000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weight_map = index["weight_map"]
    for spoilt, message in [
        ("{", "no index of shards"),
        ("[]", "no index of shards"),
        ("[" * 100_000, "no index of shards"),
        ('{"weight_map": 3}', "no index of shards"),
        (json.dumps({"weight_map": {**weight_map, "x": "../x"}}), "Invalid name"),
        (json.dumps({"weight_map": {**weight_map, "x": "absent"}}), "absent: is missing"),
        (
            json.dumps({"weight_map": {**weight_map, "x": weight_map["lm_head.weight"]}}),
            "disagrees with model-.*: x",
        ),
    ]:
        path.write_text(spoilt)
        with pytest.raises(CheckpointError, match=message):
            load_model(directory)
    path.write_text(json.dumps(index))
    (directory / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    shard = next(directory.glob("model-00001-*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: is missing; copy or download"):
        load_model(directory)


def test_too_few_or_wrong_experts_when_building():
    model = random_model()
    state = {k: t for k, t in model.state_dict().items() if not k.startswith("experts.")}

    def experts(count, **change):
        def read(layer):
            for expert in range(count):
                layers = model.experts.layers[layer]
                yield {**{k: layers[k][expert % 3].detach() for k in layers}, **change}

        return read

    def build(read):
        return build_model("here", MOE, torch.float32, state.items(), read)

    assert_same(build(experts(3)), model.state_dict())
    for read, message in [
        (experts(2), "here: encoder-0 has 2 experts, expected 3"),
        (experts(4), "here: encoder-0 has 4 experts, expected 3"),
        (experts(3, wo=torch.zeros(2)), "encoder-0 expert 0: wo has shape"),
        (experts(3, bias=torch.zeros(2)), "expert 0: tensor bias is not of this model"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            build(read)


# Writing


def test_replaces_an_older_model_and_leaves_nothing_behind(tmp_path):
    directory = tmp_path / "m"
    (tmp_path / "vocab.txt").write_text("a\n")
    save_model(random_model(MOE), directory, [tmp_path / "vocab.txt"])
    save_model(random_model(DENSE, seed=1), directory)
    assert_same(load_model(directory), random_model(DENSE, seed=1).state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "vocab.txt"]
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_follows_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_model(random_model(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(load_model(tmp_path / "real"), random_model().state_dict())


def test_refuses_to_replace_what_is_not_ours(saved, tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_text("x")
    with pytest.raises(CheckpointError, match="photos: is not empty and holds no native model"):
        save_model(random_model(), foreign)
    (saved / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.md, which replacing the model would"):
        save_model(random_model(), saved)
    assert (saved / "notes.md").read_text() == "mine"
    partial = tmp_path / "new.partial"
    partial.mkdir()
    (partial / "cat.jpg").write_text("x")
    with pytest.raises(CheckpointError, match=r"cat\.jpg: is in the way and not ours"):
        save_model(random_model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_backups_of_the_user_are_left_alone(saved, tmp_path):
    backup = tmp_path / "model.old"
    save_model(random_model(seed=2), backup)
    save_model(random_model(seed=1), saved)
    assert_same(load_model(backup), random_model(seed=2).state_dict())


def test_refuses_a_mount_point_before_anything_is_written():
    with pytest.raises(CheckpointError, match="/proc: is a mount point"):
        save_model(random_model(), Path("/proc"))


def test_older_model_is_kept_until_the_new_one_is_there(saved, tmp_path):
    """As after a kill between the two renames: the older one lies aside, DIR is missing."""
    saved.rename(tmp_path / "model.replaced")
    state = random_model(seed=1).state_dict()
    del state["decoder.norm.weight"]
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        save_state(MOE, state, saved)
    assert_same(load_model(tmp_path / "model.replaced"), random_model().state_dict())
    save_model(random_model(seed=1), saved)
    assert_same(load_model(saved), random_model(seed=1).state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_cannot_write_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: cannot be listed: Not a directory"):
        save_model(random_model(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        save_model(random_model(), tmp_path / "file" / "m")


def test_a_save_that_fails_leaves_the_older_model(saved):
    before = random_model().state_dict()
    state = random_model(seed=1).state_dict()
    del state["decoder.norm.weight"]
    with pytest.raises(
        CheckpointError, match=r"1 tensors are missing, first decoder\.norm\.weight"
    ):
        save_state(MOE, state, saved)
    assert_same(load_model(saved), before)
    save_model(random_model(seed=1), saved)
    assert_same(load_model(saved), random_model(seed=1).state_dict())


def test_wrong_states_are_refused(tmp_path):
    state = random_model().state_dict()
    for spoilt, message in [
        ({**state, "x": state["decoder.norm.weight"]}, "has no tensor x"),
        ({**state, "lm_head.weight": torch.zeros(2, 2)}, r"lm_head\.weight has shape \[2, 2\]"),
        ({}, "has no embedding.weight"),
        (
            {k: t for k, t in state.items() if k != "experts.layers.decoder-1.wo"},
            "has no experts.layers.decoder-1.wo",
        ),
        (
            {**state, "experts.layers.decoder-1.wo": state["experts.layers.decoder-1.wi_0"]},
            "decoder-1 expert 0: wo has shape",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message):
            save_state(MOE, spoilt, tmp_path / "m")
    with pytest.raises(CheckpointError, match="int64 cannot be written"):
        save_state(MOE, state, tmp_path / "m", dtype=torch.int64)
    assert not (tmp_path / "m").exists()


def expert_list(model, layer):
    stacked = model.experts.layers[layer]
    return [{k: stacked[k][e].detach() for k in stacked} for e in range(MOE.num_experts)]


def test_writer_counts_experts(tmp_path):
    model = random_model()
    experts = expert_list(model, "encoder-0")
    with open_writer(tmp_path / "m", MOE, torch.float32, {}) as writer:
        with pytest.raises(CheckpointError, match="src: encoder-0 has 2 experts, expected 3"):
            writer.write_experts("src", "encoder-0", experts[:2])
        with pytest.raises(CheckpointError, match="src: encoder-0 has more than 3 experts"):
            writer.write_experts("src", "encoder-0", [*experts, experts[0]])
        assert not writer.has_experts("encoder-0")
        for name, tensor in model.state_dict().items():
            if not name.startswith("experts."):
                writer.write_dense("src", name, tensor)
        with pytest.raises(CheckpointError, match="the experts of encoder-0 are missing"):
            writer.finish()


def test_writer_keeps_the_experts_of_the_same_conversion_only(tmp_path):
    model, directory = random_model(), tmp_path / "m"
    kept = {"source": "a", "config": MOE, "dtype": torch.float32, "files": {}}

    def write():
        with open_writer(directory, **kept) as writer:
            writer.write_experts("src", "encoder-0", expert_list(model, "encoder-0"))

    def is_kept(**change):
        with open_writer(directory, **{**kept, **change}) as writer:
            return writer.has_experts("encoder-0")

    write()
    assert is_kept()
    for change in (
        {"source": "b"},
        {"dtype": torch.float16},
        {"config": dataclasses.replace(MOE, num_decoder_layers=3)},
        {"source": None},
    ):
        write()
        assert not is_kept(**change)
    write()
    path = tmp_path / "m.partial" / "experts-encoder-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_kept()


def test_a_folder_left_in_place_of_a_file_is_cleared(tmp_path):
    (tmp_path / "m.partial" / "model.safetensors").mkdir(parents=True)
    save_model(random_model(), tmp_path / "m")
    assert_same(load_model(tmp_path / "m"), random_model().state_dict())


def test_one_writer_at_a_time(tmp_path):
    directory, model = tmp_path / "m", random_model()
    with open_writer(directory, MOE, torch.float32, {}, source="a") as writer:
        writer.write_experts("src", "encoder-0", expert_list(model, "encoder-0"))
        for source in ("a", "b", None):
            with pytest.raises(CheckpointError, match=r"m\.partial: is being written by another"):
                open_writer(directory, MOE, torch.float32, {}, source=source)
        assert writer.has_experts("encoder-0")
    save_model(model, directory)
    assert_same(load_model(directory), model.state_dict())


def test_a_lock_taken_just_before_its_directory_moved_is_taken_again(tmp_path, monkeypatch):
    """The first writer ends between the second's opening of the lock file and its locking."""
    flock, handles = fcntl.flock, []

    def moving(handle, how):
        if not handles:
            (tmp_path / "m.partial").rename(tmp_path / "m")
        handles.append(handle)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", moving)
    handle = lock_directory(tmp_path / "m.partial")
    assert len(handles) == 2
    assert os.fstat(handle).st_ino == (tmp_path / "m.partial" / LOCK).stat().st_ino
    os.close(handle)


def test_a_model_that_does_not_fit_the_disk_is_refused_before_it_is_written(tmp_path):
    huge = dataclasses.replace(MOE, d_ff=2**40)
    with pytest.raises(CheckpointError) as caught:
        open_writer(tmp_path / "m", huge, torch.float32, {}, source="a")
    match = re.search(
        r"m\.partial: ([\d,]+) bytes are needed, ([\d,]+) are free", str(caught.value)
    )
    needed, free = (int(number.replace(",", "")) for number in match.groups())
    assert needed > 3 * 3 * 3 * 16 * 2**40 * 4 > free > 0
    assert list((tmp_path / "m.partial").glob("*.safetensors")) == []


def test_layers_that_are_written_need_no_space_again(tmp_path, monkeypatch):
    model, directory = random_model(), tmp_path / "m"
    with open_writer(directory, MOE, torch.float32, {}, source="a") as writer:
        for layer in ("encoder-0", "decoder-1"):
            writer.write_experts("src", layer, expert_list(model, layer))
    store = (tmp_path / "m.partial" / "experts-encoder-0.safetensors").stat().st_size
    dense = (tmp_path / "m.partial" / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    for free, is_enough in ((dense + store, True), (dense + store - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if is_enough:
            with open_writer(directory, MOE, torch.float32, {}, source="a"):
                pass
        else:
            with pytest.raises(CheckpointError, match="free 1 B or choose another"):
                open_writer(directory, MOE, torch.float32, {}, source="a")
    with pytest.raises(CheckpointError, match=f"{dense + 3 * store:,} bytes are needed"):
        open_writer(directory, MOE, torch.float32, {})  # starts over


def test_stores_that_are_not_of_the_model(saved):
    layer, path = "encoder-0", saved / "experts-encoder-0.safetensors"
    shapes = MOE.expert_shapes()
    for dtypes, quantization, message in [
        ({}, "int8", "encoder-0.safetensors: d_ff is 24; int8 experts need"),
        ({"norm": "I32"}, "none", "experts are I32, expected one of F64, F32"),
        ({"wo": "F16"}, "none", r"'wo': \('F16'.* the config tells of .*'wo': \('F32'"),
    ]:
        tensors = {name: (dtypes.get(name, "F32"), shape) for name, shape in shapes.items()}
        layout = make_layout(tensors, quantization)
        with create_store(path, layer, layout, 3) as store:
            for expert in range(3):
                store.write(expert, {s.name: np.zeros(s.nbytes, np.uint8) for s in layout.tensors})
            store.finish()
        with pytest.raises(CheckpointError, match=message):
            open_expert_stores(saved, MOE)
        with pytest.raises(CheckpointError, match=message):
            load_model(saved)


def test_weights_are_not_held_twice_while_they_are_read(tmp_path):
    """What was read through a mapping counts as memory of the process until it is unmapped."""
    config = dataclasses.replace(
        DENSE, d_model=1024, d_ff=4096, num_encoder_layers=3, num_decoder_layers=3
    )
    write_random_model(tmp_path / "model", config, torch.float32)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 3 * MAPPED_BYTES
    source = open_native(tmp_path / "model")
    before, most = mapped_bytes(), 0
    for _, tensor in source.dense():
        most = max(most, mapped_bytes() - before)
        del tensor
    assert most < size / 2


def mapped_bytes() -> int:
    """Pages of files that are memory of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssFile:\s+(\d+)", status)[1])
