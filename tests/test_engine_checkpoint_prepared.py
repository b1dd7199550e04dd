"""Experts of checkpoints as released, written once so that they can be offloaded."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch

from engine.checkpoint_any import detect_kind
from engine.checkpoint_prepared import find_prepared, prepare_experts
from engine.errors import CheckpointError
from engine.footprint import Workload
from engine.loading import find_storage, load_planned, read_storage
from engine.planning import Budgets, fixed_lines, plan_memory
from engine.progress import LoadProgress
from tests.gguf_files import llama_metadata, saved_state, to_gguf_tensors, write_gguf
from tests.hf_families import LOCAL, MODELS, SIZES, greedy, make_oracle, ragged_prompts, widen
from tests.t5_oracle import one_thread
from tests.waiting import wait_for

VALUES = {**SIZES, **LOCAL, "intermediate_size": 64}  # rows are whole blocks of 32
LOAD = Workload(source_tokens=20, target_tokens=10)
KINDS = ("quantised", "split", "mixtral", "gpt_oss")
Q = gguf.GGMLQuantizationType
LAYERS = [f"decoder-{index}" for index in range(3)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    if find_spec("numba"):
        from engine.kernels.compiled import cache_directory

        cache_directory()  # compiled kernels stay where they are
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "infmoe" / "experts"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Writes a mixture as it would be released, on the first demand."""
    root = tmp_path_factory.mktemp("released")

    def get(kind):
        if (root / kind).exists():
            return next((root / kind).glob("*.gguf"), root / kind)
        if kind in MODELS:
            make_oracle(kind).save_pretrained(root / kind)
            return root / kind
        return write_mixture(root / kind, 9 if kind == "split" else 0)

    return get


def write_mixture(folder, tensors_to_a_part=0, seed=1):
    """A Mixtral whose experts are of three quantised formats."""
    model_class, config_class, _ = MODELS["mixtral"]
    with one_thread():
        oracle = widen(model_class(config_class(**VALUES)), seed)
    oracle.save_pretrained(folder)
    tensors = to_gguf_tensors(saved_state(folder), {"q_proj": 4, "k_proj": 2})
    shutil.rmtree(folder)
    folder.mkdir()
    formats = {"gate_exps": Q.Q4_0, "up_exps": Q.Q4_1, "down_exps": Q.Q8_0}
    kinds = {name: kind for name in tensors for part, kind in formats.items() if part in name}
    metadata = llama_metadata("llama", oracle.config)
    split = {"tensors_to_a_part": tensors_to_a_part}
    return write_gguf(folder / "Tiny.gguf", "llama", metadata, tensors, kinds, **split)


def load(path, num_slots, dtype=None, **more):
    """The model with room for so many experts."""
    storage = read_storage(path, dtype)
    fixed = sum(line.nbytes for line in fixed_lines(storage, LOAD, 0, on_gpu=False))
    budget = Budgets(host_bytes=fixed + num_slots * storage.slot_bytes)
    return load_planned(path, plan_memory(storage, LOAD, budget, 0), **more)


def nothing(_):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@one_thread()
def test_offloaded_equals_resident(released, cache, kind, dtype):
    path = released(kind)
    resident = load(path, 12, dtype, on_phase=nothing)
    assert resident.experts is None
    assert not cache.exists()
    tokens_BS, segments_BS = ragged_prompts()
    for _ in range(2):  # the first writes, the second finds
        loaded = load(path, 4, dtype, on_phase=nothing)
        with loaded.experts as experts, torch.inference_mode():
            assert loaded.model.config == resident.model.config
            found = loaded.model.logits(loaded.model.read(tokens_BS, segments_BS))
            expected = resident.model.logits(resident.model.read(tokens_BS, segments_BS))
            assert torch.equal(found, expected)
            answers = greedy(loaded.model, tokens_BS, segments_BS, 8)
            assert torch.equal(answers, greedy(resident.model, tokens_BS, segments_BS, 8))
            assert experts.stats.evictions > 0


def test_how_far_it_is_and_what_is_there_then(released, cache):
    path, phases, progress = released("quantised"), [], LoadProgress()
    storage, files = find_storage(str(path), None)
    assert (storage.only_resident, files) == ("", [path])
    assert find_prepared(path, torch.bfloat16) is None
    load(path, 4, on_phase=phases.append, progress=progress).close()
    assert phases[0].startswith("writing experts once: ")
    assert "writing experts once: 100 %" in phases
    assert progress.read_bytes == progress.total_bytes > 0
    directory = find_prepared(path, torch.bfloat16)
    assert directory.parent == cache
    assert directory.name.startswith("Tiny-bfloat16-")
    assert detect_kind(directory) == "native"
    assert find_storage(str(path), None)[1] == [
        directory / f"experts-{layer}.safetensors" for layer in LAYERS
    ]
    assert cache.stat().st_mode & 0o077 == 0
    phases.clear()
    load(path, 4, on_phase=phases.append).close()
    assert not any("writing" in phase for phase in phases)


class Killed(Exception):
    pass


def test_what_was_cut_off_is_not_loaded_and_goes_on(released, cache):
    path, seen = released("quantised"), []

    def die(done):
        seen.append(done.item)
        if done.item == "experts of decoder-1":
            raise Killed

    with pytest.raises(Killed):
        prepare_experts(path, torch.float32, die)
    assert find_prepared(path, torch.float32) is None
    (partial,) = (entry for entry in cache.iterdir() if entry.is_dir())
    assert partial.name.endswith(".partial")
    store = "experts-decoder-0.safetensors"
    written = (partial / store).stat().st_mtime_ns
    directory = prepare_experts(path, torch.float32, nothing)
    assert (directory / store).stat().st_mtime_ns == written
    assert not partial.exists()
    assert find_prepared(path, torch.float32) == directory
    with load(path, 4, torch.float32, on_phase=nothing).experts as experts:
        assert experts.plan.num_slots == 4


def test_files_that_changed_are_written_anew(cache, tmp_path):
    path = write_mixture(tmp_path / "model")
    old = prepare_experts(path, torch.float32, nothing)
    other = prepare_experts(path, torch.bfloat16, nothing)
    path = write_mixture(tmp_path / "model", seed=2)
    os.utime(path, ns=(1, 1))
    assert find_prepared(path, torch.float32) is None
    new = prepare_experts(path, torch.float32, nothing)
    assert {entry for entry in cache.iterdir() if entry.is_dir()} == {new, other}
    assert old != new


def test_one_writes_and_another_waits(released):
    path, writers, waits = released("mixtral"), [], []
    with ThreadPoolExecutor(2) as pool:

        def begin(number):
            def wait(_):
                if number not in writers:
                    writers.append(number)
                    wait_for(lambda: waits)

            return prepare_experts(path, torch.float32, wait, lambda: waits.append(number))

        begun = []
        begun.append(pool.submit(begin, 0))
        begun.append(pool.submit(begin, 1))
        first, second = (future.result() for future in begun)
    assert first == second
    assert len(writers) == 1
    assert {*waits} == {0, 1} - {*writers}


def test_no_room_is_told(released, cache, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = r"Tiny\.gguf: .* XDG_CACHE_HOME names .* bytes are needed, 1,000 are free"
    with pytest.raises(CheckpointError, match=message):
        load(released("quantised"), 4, on_phase=nothing)
    assert find_prepared(released("quantised"), torch.bfloat16) is None


def test_a_folder_that_cannot_be_written_is_told(released, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="that XDG_CACHE_HOME names .* cannot be written: "):
        load(released("quantised"), 4, on_phase=nothing)


def test_a_damaged_file_leaves_nothing(cache, tmp_path):
    path = Path(shutil.copytree(write_mixture(tmp_path / "model").parent, tmp_path / "damaged"))
    path = next(path.iterdir())
    storage = read_storage(path)
    os.truncate(path, path.stat().st_size - 64)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        prepare_experts(path, storage.dtype, nothing)
    assert not cache.exists()


def test_other_contents_of_the_same_size_and_age_are_seen(cache, tmp_path):
    path = write_mixture(tmp_path / "model")
    old, stat = prepare_experts(path, torch.float32, nothing), path.stat()
    write_mixture(tmp_path / "model", seed=2)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert find_prepared(path, torch.float32) is None
    assert prepare_experts(path, torch.float32, nothing) != old
    assert not old.exists()


def test_files_that_change_while_they_are_read(cache, tmp_path):
    path = write_mixture(tmp_path / "model")

    def change(done):
        if done.item == "experts of decoder-1":
            os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"Tiny.gguf: its files changed while they were read"):
        prepare_experts(path, torch.float32, change)
    assert find_prepared(path, torch.float32) is None
    assert not [entry for entry in cache.iterdir() if "." not in entry.name]
    directory = prepare_experts(path, torch.float32, nothing)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == [directory]


def test_files_beside_the_tensors_do_not_count(released, cache, tmp_path):
    path = Path(shutil.copytree(released("mixtral"), tmp_path / "model"))
    directory = prepare_experts(path, torch.float32, nothing)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    os.utime(path / "generation_config.json", ns=(1, 1))
    assert find_prepared(path, torch.float32) == directory


@pytest.mark.parametrize("name", ["config.json", "experts-decoder-1.safetensors"])
@pytest.mark.parametrize("is_there", [False, True])
def test_what_is_damaged_is_written_again(released, cache, name, is_there):
    path = released("quantised")
    directory = prepare_experts(path, torch.float32, nothing)
    whole = (directory / name).read_bytes()
    if is_there:
        os.truncate(directory / name, len(whole) - 7)
    else:
        (directory / name).unlink()
    assert find_prepared(path, torch.float32) is None
    assert prepare_experts(path, torch.float32, nothing) == directory
    assert (directory / name).read_bytes() == whole
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == [directory]


def test_what_was_to_be_deleted_is_no_model(released, cache):
    path = released("quantised")
    directory = prepare_experts(path, torch.float32, nothing)
    left = directory.rename(directory.with_name(f"{directory.name}.removed"))
    assert find_prepared(path, torch.float32) is None
    assert prepare_experts(path, torch.float32, nothing) == directory
    assert not left.exists()


def test_what_is_there_is_used_where_nothing_can_be_written(released, cache):
    path = released("quantised")
    directory = prepare_experts(path, torch.float32, nothing)
    (lock,) = cache.glob("*.lock")
    lock.unlink()
    lock.mkdir()  # root can write in all folders, but not here
    assert prepare_experts(path, torch.float32, nothing) == directory


def belong_to_another(folder, monkeypatch):
    if os.geteuid() == 0:
        os.chown(folder, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("change", ["owner", "mode"])
def test_what_others_could_have_written_is_not_used(released, cache, monkeypatch, level, change):
    path = released("quantised")
    directory = prepare_experts(path, torch.float32, nothing)
    folder = (cache, cache.parent)[level]
    if change == "owner":
        belong_to_another(folder, monkeypatch)
    else:
        folder.chmod(0o777)
    assert find_prepared(path, torch.float32) is None
    reason = "(belongs to user|can be written by everybody)"
    message = rf"{folder} {reason}.*, so what is in {cache} is not trusted"
    with pytest.raises(CheckpointError, match=message):
        prepare_experts(path, torch.float32, nothing)
    assert directory.exists()


def test_a_folder_of_its_group_or_in_a_shared_one_is_used(released, cache):
    path = released("quantised")
    directory = prepare_experts(path, torch.float32, nothing)
    cache.chmod(0o2770)  # what Kubernetes makes of it
    cache.parent.chmod(0o1777)
    assert find_prepared(path, torch.float32) == directory


def test_who_masks_nothing_gets_a_folder_of_his_own(released, cache):
    mask = os.umask(0)
    try:
        directory = prepare_experts(released("quantised"), torch.float32, nothing)
    finally:
        os.umask(mask)
    assert find_prepared(released("quantised"), torch.float32) == directory


def test_a_long_name(released, cache, tmp_path):
    path = tmp_path / ("\u6a21" * 80 + ".gguf")
    shutil.copy(released("quantised"), path)
    directory = prepare_experts(path, torch.float32, nothing)
    assert directory.name.startswith("\u6a21" * 33 + "-float32-")
