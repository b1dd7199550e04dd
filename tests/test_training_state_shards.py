"""The state of several processes, here written by one: what is whole is read, nothing else is."""

import resource
import shutil

import pytest
import torch
from torch import nn

from training.state import STATE_FILE, find_state, load_state, read_state, save_state
from training.state_shards import find_shards, read_shards, remove_shards, save_shards


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 40)).sum().backward()
        optimizer.step()
    return model, optimizer


def write(run, steps: int):
    """The state after some steps, as shards."""
    model, optimizer = trained(steps)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    facts = {"step": steps, "optimizer": "AdamW", "teaching_is_over": True}
    return save_shards(run, facts, tensors), tensors


def load(run):
    model, optimizer = trained(0)
    facts: dict = {}
    return load_state(run, model, optimizer, None, facts), model, optimizer, facts


def test_shards_give_back_tensors_scalars_and_facts(tmp_path):
    folder, tensors = write(tmp_path, 3)
    assert find_shards(tmp_path) == find_state(tmp_path) == folder
    facts, found = read_shards(folder)
    assert facts == {"step": 3, "optimizer": "AdamW", "teaching_is_over": True}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name
        assert found[name].shape == value.shape
    assert read_state(folder)[1].keys() == tensors.keys()


def test_a_run_goes_on_from_shards(tmp_path):
    write(tmp_path, 3)
    step, model, optimizer, facts = load(tmp_path)
    assert (step, facts["teaching_is_over"]) == (3, True)
    expected, other = trained(3)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg"], other.state[b]["exp_avg"])
        assert optimizer.state[a]["step"] == other.state[b]["step"] == 3


def test_the_last_state_counts_whoever_wrote_it(tmp_path):
    write(tmp_path, 3)
    with_file = tmp_path / "file"
    with_file.mkdir()
    save_state(with_file, 5, *trained(5))
    shutil.copy(with_file / STATE_FILE, tmp_path)  # killed before the older one was removed
    assert load(tmp_path)[0] == 5
    write(tmp_path, 7)
    assert load(tmp_path)[0] == 7
    save_state(tmp_path, 9, *trained(9))
    assert find_shards(tmp_path) is None
    assert load(tmp_path)[0] == 9


def test_a_half_written_state_is_never_read_and_goes_at_the_next_one(tmp_path):
    folder, _ = write(tmp_path, 3)
    half = tmp_path / "state-00000006.partial"
    shutil.copytree(folder, half)
    (half / "facts.json").unlink()
    assert load(tmp_path)[0] == 3
    shutil.copytree(folder, tmp_path / "state-00000009.partial")
    assert load(tmp_path)[0] == 3
    write(tmp_path, 6)
    assert load(tmp_path)[0] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000006"]
    remove_shards(tmp_path)
    assert find_state(tmp_path) is None


def test_a_state_that_lacks_a_shard_or_is_torn_is_refused(tmp_path):
    folder, _ = write(tmp_path, 3)
    (shard,) = folder.glob("*.safetensors")
    raw = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"cannot be resumed .*it has 0 of 1 files of shards"):
        load(tmp_path)
    shard.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="state-00000003: cannot be resumed with this recipe"):
        load(tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged .*delete it to go on from"):
        load(tmp_path)


def test_another_model_is_refused(tmp_path):
    write(tmp_path, 3)
    other = nn.Linear(40, 31)
    with pytest.raises(ValueError, match="cannot be resumed with this recipe"):
        load_state(tmp_path, other, torch.optim.AdamW(other.parameters()))


def test_a_full_disk_keeps_the_state_before(tmp_path):
    write(tmp_path, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot be written .*the state before it is kept"):
            write(tmp_path, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000003"]
    assert load(tmp_path)[0] == 3
