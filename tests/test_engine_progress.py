"""How far loading has come, in bytes: of resident, offloaded, converted and foreign models."""

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from engine.checkpoint import save_model
from engine.footprint import Workload
from engine.loading import bytes_to_read, load_planned, read_storage
from engine.planning import Budgets, fixed_lines, plan_memory
from engine.progress import LoadProgress, ignore_bytes
from engine.random_model import write_random_model
from tests.tiny import DENSE, MOE, tiny_model

LOAD = Workload(source_tokens=20, target_tokens=10)


class Recorder(LoadProgress):
    """Keeps what was read, as it came."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def add(self, num_bytes):
        self.steps.append(num_bytes)
        super().add(num_bytes)


def load(path, num_slots=None, dtype=None):
    storage = read_storage(path, dtype)
    fixed = sum(line.nbytes for line in fixed_lines(storage, LOAD, 0, on_gpu=False))
    budget = 2**30 if num_slots is None else fixed + num_slots * storage.slot_bytes
    plan = plan_memory(storage, LOAD, Budgets(host_bytes=budget), 0)
    progress = Recorder()
    load_planned(path, plan, lambda _: None, progress).close()
    assert progress.total_bytes == bytes_to_read(path, plan)
    return progress, plan


def size_of(path: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in path.glob(pattern))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_resident_model_is_counted_as_it_is_stored(tmp_path, dtype):
    save_model(tiny_model(), tmp_path)
    progress, plan = load(tmp_path, dtype=dtype)
    assert not plan.is_offloaded
    read = sum(progress.steps)
    files = size_of(tmp_path, "*.safetensors")
    assert 0.7 * files < read <= progress.total_bytes <= files  # headers of tiny files count
    assert progress.read_bytes == progress.total_bytes


def test_of_offloaded_experts_only_those_are_counted_that_loading_reads(tmp_path):
    save_model(tiny_model(), tmp_path)
    progress, plan = load(tmp_path, num_slots=7)
    assert plan.is_offloaded
    blobs = progress.steps.count(plan.storage.slot_bytes)
    assert blobs == len(plan.experts.pinned) + len(plan.experts.host) > 0
    dense = size_of(tmp_path, "model*.safetensors")
    assert progress.total_bytes == dense + blobs * plan.storage.slot_bytes
    assert 0.7 * progress.total_bytes < sum(progress.steps) <= progress.total_bytes


def test_quantised_experts_count_as_they_are_stored(tmp_path):
    write_random_model(tmp_path / "int8", MOE, torch.bfloat16, quantization="int8")
    progress, _ = load(tmp_path / "int8", num_slots=8)
    assert sum(progress.steps) <= progress.total_bytes


def test_a_dense_and_a_foreign_model(tmp_path):
    save_model(tiny_model(DENSE), tmp_path / "dense")
    progress, _ = load(tmp_path / "dense")
    assert 0 < sum(progress.steps) <= progress.total_bytes
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4, "num_layers": 1}
    config = T5Config(vocab_size=300, decoder_start_token_id=0, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    progress, _ = load(tmp_path / "t5")
    assert 0 < sum(progress.steps) <= progress.total_bytes
    assert progress.total_bytes == size_of(tmp_path / "t5", "*.safetensors")


def test_the_rate_so_far_tells_the_rest():
    now_s = 10.0
    progress = LoadProgress(lambda: now_s)
    assert (progress.elapsed_s(), progress.eta_s()) == (0, None)
    progress.begin(1000)
    assert progress.eta_s() is None
    now_s = 12.0
    progress.add(250)
    assert (progress.elapsed_s(), progress.eta_s()) == (2, 6)
    assert progress.idle_s() == 0
    now_s = 13.0  # a slow read: the estimate stays until the next one has come
    assert (progress.eta_s(), progress.idle_s()) == (6, 1)
    progress.add(10_000)
    assert (progress.read_bytes, progress.eta_s()) == (1000, 0)
    ignore_bytes(1)
