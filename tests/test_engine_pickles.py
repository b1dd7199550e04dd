import collections
import os
import pickle
import random
import subprocess

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from engine.pickles import load_pickle, load_state

FORMATS = pytest.mark.parametrize("is_zip", [True, False])


def save(content, path, *, is_zip):
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


class Touch:
    """Unpickled without care, this creates a file."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(target):
    return {
        "os.system": Touch(os.system, f"touch {target}"),
        "eval": Touch(eval, f"open({str(target)!r}, 'w')"),
        "exec": Touch(exec, f"open({str(target)!r}, 'w')"),
        "open": Touch(open, str(target), "w"),
        "subprocess.Popen": Touch(subprocess.Popen, ["touch", str(target)]),
        "numpy": Touch(np.save, str(target), 1),
        "torch.load": Touch(torch.load, str(target)),
    }


@FORMATS
def test_tensors_and_random_states(tmp_path, is_zip):
    weights = collections.OrderedDict(a=torch.randn(3, 5).half(), b=torch.randn(4).bfloat16())
    content = {
        "module": weights,
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "names": {"a", "b"},
        "nothing": None,
    }
    path = save(content, tmp_path / "f.pt", is_zip=is_zip)
    state = load_state(path, ("module", "model"))
    assert list(state) == ["a", "b"]
    for key, tensor in weights.items():
        assert state[key].dtype == tensor.dtype
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)
    loaded = load_pickle(path)
    assert loaded["random_rng_state"] == content["random_rng_state"]
    np.testing.assert_array_equal(loaded["np_rng_state"][1], content["np_rng_state"][1])


def test_both_names_of_numpy_are_known(tmp_path):
    """numpy 1 wrote its random state under another module name than numpy 2."""
    content = {"np_rng_state": np.random.get_state()}
    path = save(content, tmp_path / "f.pt", is_zip=False)
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    data = path.read_bytes()
    assert data.count(new) == 1
    path.write_bytes(data.replace(new, old))
    np.testing.assert_array_equal(load_pickle(path)["np_rng_state"][1], content["np_rng_state"][1])


@FORMATS
def test_places(tmp_path, is_zip):
    weights = {"a": torch.ones(2)}
    for place in ("module", "model"):
        path = save({place: weights, "x": 1}, tmp_path / place, is_zip=is_zip)
        assert list(load_state(path, ("module", "model"))) == ["a"]
    path = save(weights, tmp_path / "bare", is_zip=is_zip)
    assert list(load_state(path)) == ["a"]
    with pytest.raises(CheckpointError, match="bare: has no weights under module or model"):
        load_state(path, ("module", "model"))


@FORMATS
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected named tensors"),
        ({}, "holds no named tensors"),
        ({"a": 3}, "a is no tensor but a int"),
        ({3: torch.ones(1)}, "3 is no tensor"),
        ({"a": torch.ones(2).to_sparse()}, "a is a sparse, nested or empty tensor"),
        ({"a": torch.ones(2, 2, device="meta")}, "a is a sparse, nested or empty tensor"),
    ],
)
def test_no_tensors(tmp_path, is_zip, content, message):
    path = save(content, tmp_path / "f.pt", is_zip=is_zip)
    with pytest.raises(CheckpointError, match=message):
        load_state(path)


@FORMATS
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested")
def test_sparse_rows_and_nested_tensors_are_refused(tmp_path, is_zip):
    refusal = "a is a sparse, nested or empty tensor"
    path = save({"a": torch.ones(2, 2).to_sparse_csr()}, tmp_path / "f.pt", is_zip=is_zip)
    with pytest.raises(CheckpointError, match=refusal):
        load_state(path)
    # torch's old format reads the sizes of a nested tensor from the wrong bytes, whatever they hold
    path = save(
        {"a": torch.nested.nested_tensor([torch.ones(2)])}, tmp_path / "f.pt", is_zip=is_zip
    )
    with pytest.raises(CheckpointError, match=f"{refusal}|no torch file"):
        load_state(path)


@FORMATS
@pytest.mark.parametrize("name", sorted(attacks("")))
def test_malicious_pickle_is_refused_by_name_and_never_run(tmp_path, is_zip, name):
    target = tmp_path / "pwned"
    attack = attacks(target)[name]
    path = save({"module": {"a": torch.ones(2), "b": attack}}, tmp_path / "f.pt", is_zip=is_zip)
    with pytest.raises(CheckpointError, match=r"f\.pt: refused: it asks to import or call") as info:
        load_state(path, ("module",))
    assert name.rpartition(".")[2] in str(info.value)
    assert "weights_only" not in str(info.value)  # no advice to run it after all
    assert not target.exists()


def test_the_attack_works_where_nothing_is_refused(tmp_path):
    """Else the tests above would prove nothing."""
    target = tmp_path / "pwned"
    pickle.loads(pickle.dumps(attacks(target)["os.system"]))  # noqa: S301
    assert target.exists()


def test_plain_pickle_is_never_run(tmp_path):
    target = tmp_path / "pwned"
    path = tmp_path / "f.pt"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(attacks(target)["os.system"], protocol))
        with pytest.raises(CheckpointError, match=r"f\.pt: "):
            load_pickle(path)
        assert not target.exists()


@FORMATS
@pytest.mark.parametrize("keep", [0, 1, 3, 100, 400, 700, -1, -30])
def test_truncated_file(tmp_path, is_zip, keep):
    path = save({"a": torch.ones(100)}, tmp_path / "f.pt", is_zip=is_zip)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"f\.pt: truncated"):
        load_state(path)


@pytest.mark.parametrize("content", [b"hello\n" * 100, b"\0" * 5000, b"PK\x03\x04" * 100])
def test_foreign_file(tmp_path, content):
    path = tmp_path / "f.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"f\.pt: truncated"):
        load_pickle(path)


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="absent: cannot be read: No such file"):
        load_pickle(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_pickle(tmp_path)


def test_allowed_globals_are_forgotten_afterwards(tmp_path):
    before = set(torch.serialization.get_safe_globals())  # torch keeps them in no order
    load_pickle(save({"a": 1}, tmp_path / "f.pt", is_zip=True))
    assert set(torch.serialization.get_safe_globals()) == before
