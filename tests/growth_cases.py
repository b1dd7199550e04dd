"""Random models of the T5 family that are not tiny in all ways at once, and how they grow."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.initial import initialize
from engine.model.transformer import Transformer
from tests.tiny import DENSE, random_ids
from training.growth import Growth, GrowthPlan, grow, prepare_growth

SMALL = replace(DENSE, vocab_size=40, d_model=12, d_ff=10, d_kv=4, num_heads=3, relative_buckets=8)
ROWS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 0], [1] * 8])


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random weights, gains, and centroids that spread the tokens; logits of about 1."""
    model = Transformer(config)
    initialize(model, seed, centroid_gain=1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm", "norm.weight")):
                weight.uniform_(0.5, 1.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("router_norm"):
                buffer.uniform_(0.5, 1.5, generator=generator)
        head = model.embedding.weight if config.tied_embeddings else model.lm_head.weight
        head.mul_(0.3 if config.scale_logits else 0.1)
    return model.eval()


def build(config: ModelConfig, state: dict) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def logits(model: Transformer, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL.vocab_size, (2, 2, 8), generator=generator)
    with torch.no_grad():
        return model(ids[0], ROWS, ids[1], ROWS)


def grown(model: Transformer, **how) -> tuple[Growth, Transformer]:
    sizes = {key: how.pop(key) for key in list(how) if key in ModelConfig.__dataclass_fields__}
    plan = GrowthPlan(target=replace(model.config, **sizes), **how)
    growth = prepare_growth(model.config, plan)
    return growth, build(growth.target, grow(model.state_dict(), growth))


def difference(model: Transformer, other: Transformer) -> float:
    return float((logits(model) - logits(other)).abs().max())


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    ids = random_ids(2, 8, 3).remainder(SMALL.vocab_size)
    scores = model(ids, ROWS, ids, ROWS)
    F.cross_entropy(scores.flatten(0, 1), ids.flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
