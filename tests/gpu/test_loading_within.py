"""Plans and bandwidths on a real GPU: what is measured, and that a load keeps to its budget."""

import pytest
import torch

from engine.checkpoint import load_model, save_model
from engine.errors import ConfigError
from engine.footprint import Workload
from engine.loading import load_within
from engine.machine import find_bandwidths
from engine.memory import gpu_memory
from engine.planning import GPU_CONTEXT_BYTES
from offload.cuda import missing_for_cuda
from tests.tiny import DENSE, MOE, random_ids, tiny_model

if (reason := missing_for_cuda()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.gpu

LOAD = Workload(source_tokens=20, target_tokens=10)
BUDGET = 2 * 2**30


@torch.inference_mode()
def outputs(model):
    device = model.embedding.weight.device
    source, target = random_ids(2, 9).to(device), random_ids(2, 5).to(device)
    return model(source, torch.ones_like(source), target, torch.ones_like(target)).cpu()


def test_link_and_memory_of_the_gpu_are_measured(tmp_path):
    found = find_bandwidths([], {}, tmp_path)
    assert 1e9 < found.link.per_s < found.hbm.per_s


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_a_model_on_the_gpu_gives_what_it_gives_on_the_cpu(tmp_path, config):
    save_model(tiny_model(config, seed=2), tmp_path / "model")
    loaded = load_within(tmp_path / "model", None, None, BUDGET, workload=LOAD)
    assert loaded.model.embedding.weight.is_cuda
    assert (loaded.experts is None) == (config is DENSE)
    expected = outputs(load_model(tmp_path / "model"))
    torch.testing.assert_close(outputs(loaded.model), expected, rtol=1e-3, atol=1e-3)
    if loaded.experts is not None:
        loaded.experts.close()


def test_the_context_takes_no_more_than_is_assumed():
    """Only where nobody else uses the GPU; what torch has allocated for tensors does not count."""
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    assert total - free - torch.cuda.memory_reserved() <= GPU_CONTEXT_BYTES


def test_a_budget_beyond_the_gpu_is_refused(tmp_path):
    save_model(tiny_model(seed=2), tmp_path / "model")
    with pytest.raises(ConfigError, match="more than the device has left"):
        load_within(tmp_path / "model", None, None, gpu_memory().total_bytes + 1)
