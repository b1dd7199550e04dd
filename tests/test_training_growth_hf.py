"""Growth of T5 as Hugging Face has it: what grows computes what transformers does."""

import pytest
import torch

from engine.checkpoint import load_model
from tests.t5_oracle import assert_equal_to_oracle
from tests.test_engine_checkpoint_hf import t5_v10, t5_v11
from training.growth_files import grow_directory
from training.growth_recipes import read_target

WIDER = """
[target]
d_model = {}
d_kv = 8
d_ff = 60
num_heads = {}
num_encoder_layers = 3
num_decoder_layers = 5
[growth]
width = "{}"
split = "{}"
"""


def calm_t5_v11():
    """One whose attention is not saturated: else rounding of its weights moves logits by 5e-4."""
    oracle = t5_v11()
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if name.endswith("Attention.q.weight"):
                weight.mul_(0.1)
    return oracle


@pytest.mark.parametrize("make", [t5_v10, calm_t5_v11])
@pytest.mark.parametrize(
    ("width", "split", "d_model", "heads"),
    [("pad", "even", 45, 6), ("isometric", "uneven", 45, 6), ("fpi", "uneven", 64, 7)],
)
def test_a_grown_t5_equals_transformers(tmp_path, make, width, split, d_model, heads):
    oracle = make()
    oracle.save_pretrained(tmp_path / "t5")
    (tmp_path / "t.toml").write_text(WIDER.format(d_model, heads, width, split))
    grow_directory(tmp_path / "t5", read_target(tmp_path / "t.toml"), tmp_path / "big")
    assert_equal_to_oracle(load_model(tmp_path / "big"), oracle)
