"""Writes models as released CPM-2 rank files: the inverse of the loader, kept apart from it."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine.config import ModelConfig
from engine.model.initial import initialize
from engine.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=96,
    d_model=32,
    d_ff=48,
    d_kv=4,
    num_heads=8,
    num_encoder_layers=2,
    num_decoder_layers=2,
    tokenizer="cpm2_zh",
    eos_token_ids=(7,),
)
SPECIAL = ["<unk>", "<s>", "</s>", "\u2583", "<sep>", "<pad>", "<mask>", "<eod>"]
State = dict[str, torch.Tensor]


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> Transformer:
    """A random model whose experts of one layer share their norm, as those of CPM-2-MoE do."""
    model = Transformer(config)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
        for layer in model.moe_layers():
            layer.router_norm.uniform_(0.5, 1.5, generator=generator)
            model.experts.layers[layer.name]["norm"].copy_(
                layer.router_norm.expand(config.num_experts, -1)
            )
    return model.requires_grad_(False)


def write_vocabulary(path: Path, size: int, *, bilingual: bool = False) -> None:
    tokens = [*SPECIAL]
    if bilingual:
        tokens[7:8] = ["<go>", "<eod>", "##ing"]
    tokens += [chr(0x4E00 + index) for index in range(size - len(tokens))]
    path.write_text("\n".join(tokens), encoding="utf-8")


def split_rows(tensor: torch.Tensor, rank: int, mp: int, parts: int = 1) -> torch.Tensor:
    """Rank's rows of each of the parts, one below the other."""
    height = len(tensor) // parts
    share = height // mp
    begins = [part * height + rank * share for part in range(parts)]
    return torch.cat([tensor[begin : begin + share] for begin in begins])


def split_columns(tensor: torch.Tensor, rank: int, mp: int) -> torch.Tensor:
    share = tensor.shape[1] // mp
    return tensor[:, rank * share : (rank + 1) * share].clone()


def rank_state(model: Transformer, rank: int, mp: int, expert: int = 0) -> State:
    """What rank `rank` of `mp` holds, with one expert of each layer if there are any."""
    ours = model.state_dict()
    state: State = {}

    def rows(key: str, tensor: torch.Tensor, parts: int = 1) -> None:
        state[key] = split_rows(tensor, rank, mp, parts)

    def columns(key: str, tensor: torch.Tensor) -> None:
        state[key] = split_columns(tensor, rank, mp)

    rows("word_embeds.weight", ours["embedding.weight"])
    rows("lm_head.weight", ours["lm_head.weight"])
    for stack in ("encoder", "decoder"):
        state[f"{stack}.word_embeds.weight"] = state["word_embeds.weight"].clone()
        state[f"{stack}.final_layernorm.weight"] = ours[f"{stack}.norm.weight"]
        columns(
            f"{stack}.blocks.0.self_attn.self_attn.relative_attention_bias.weight",
            ours[f"{stack}.relative_bias.weight"],
        )
        for index in range(model.config.num_layers(stack)):
            theirs, mine = f"{stack}.blocks.{index}", f"{stack}.layers.{index}"
            own, attention = f"{mine}.self_attention", f"{theirs}.self_attn.self_attn"
            state[f"{theirs}.self_attn.layer_norm.weight"] = ours[f"{own}.norm.weight"]
            rows(f"{attention}.project.weight", ours[f"{own}.qkv.weight"], 3)
            columns(f"{attention}.dense.weight", ours[f"{own}.out.weight"])
            if stack == "decoder":
                cross = f"{mine}.cross_attention"
                attention = f"{theirs}.cross_attn.cross_attn"
                state[f"{theirs}.cross_attn.layer_norm.weight"] = ours[f"{cross}.norm.weight"]
                rows(f"{attention}.project_q.weight", ours[f"{cross}.query.weight"])
                rows(f"{attention}.project_kv.weight", ours[f"{cross}.key_value.weight"], 2)
                columns(f"{attention}.dense.weight", ours[f"{cross}.out.weight"])
            prefix = f"{theirs}.ff"
            parts = {
                name: ours[f"experts.layers.{stack}-{index}.{name}"][expert]
                if model.config.num_experts
                else ours[f"{mine}.feed_forward.{name}.weight"]
                for name in ("norm", "wi_0", "wi_1", "wo")
            }
            if model.config.num_experts:
                state[f"{prefix}.expert_centroids"] = ours[f"{mine}.moe.centroids"]
                prefix += ".expert_network"
            state[f"{prefix}.layer_norm.weight"] = parts["norm"]
            rows(f"{prefix}.dense_relu_dense.wi_0.weight", parts["wi_0"])
            rows(f"{prefix}.dense_relu_dense.wi_1.weight", parts["wi_1"])
            columns(f"{prefix}.dense_relu_dense.wo.weight", parts["wo"])
    return {key: tensor.clone() for key, tensor in state.items()}


def write_rank_files(
    model: Transformer,
    root: Path,
    mp: int,
    *,
    by_expert: bool = False,
    zip_format: bool = True,
    change: Callable[[int, State], None] | None = None,
) -> Path:
    """Write a checkpoint of `mp` ranks, a file per rank or per expert and rank. Returns ROOT/ITER.

    `change` may spoil the state of a rank before it is written.
    """
    folder = root / "100000"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("100000\n")
    vocabulary = root / "vocab.txt"
    write_vocabulary(vocabulary, model.config.vocab_size)
    experts = range(model.config.num_experts) if by_expert else [0]
    for expert in experts:
        for rank in range(mp):
            state = rank_state(model, rank, mp, expert)
            if change is not None:
                change(rank, state)
            name = f"mp_rank_{expert:02d}_{rank:02d}" if by_expert else f"mp_rank_{rank:02d}"
            content = {"model": state} if by_expert else deepspeed_content(state)
            torch.save(
                content,
                folder / f"{name}_model_states.pt",
                _use_new_zipfile_serialization=zip_format,
            )
    return folder


def deepspeed_content(state: State) -> dict[str, object]:
    """The weights among all that DeepSpeed stores beside them."""
    return {
        "module": state,
        "iteration": 100000,
        "optimizer": None,
        "lr_scheduler": {"start_lr": 0.01, "num_iters": 100000},
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
