"""What vectors of a prompt and text may see of each other: parts of attention taken away.

For ablations: who serves a prompt knows no masks. Shape letters: B rows, S source length, D model
width.

Source: CPM-2 (arXiv:2106.10715) s4.4, and its fine-tuning code; only the encoder's self-attention
is masked, the decoder sees all.
"""

from typing import Literal

import torch
from torch import Tensor

from engine.model.masks import mask_bias
from engine.model.transformer import Transformer

Mask = Literal["full", "prompt_blind", "text_blind"]


def visible_keys(segments_BS: Tensor, vectors_BS: Tensor, mask: Mask) -> Tensor:
    """Which key each query may see, (B, S, S) as bool, rows are queries.

    `prompt_blind`: vectors see vectors only. `text_blind`: text sees text only.
    Source v t under text_blind: v sees v and t, t sees t.
    """
    same_BSS = segments_BS.unsqueeze(1) == segments_BS.unsqueeze(2)
    query_BS1, key_B1S = vectors_BS.unsqueeze(2), vectors_BS.unsqueeze(1)
    if mask == "prompt_blind":
        return same_BSS & ~(query_BS1 & ~key_B1S)
    if mask == "text_blind":
        return same_BSS & ~(~query_BS1 & key_B1S)
    return same_BSS


def encode_masked(
    model: Transformer, x_BSD: Tensor, segments_BS: Tensor, vectors_BS: Tensor, mask: Mask
) -> Tensor:
    """What the encoder makes of embeddings, of which some are vectors of a prompt; (B, S, D)."""
    positions_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    relative = model.encoder.relative_bias(positions_S, positions_S)
    visible_B1SS = visible_keys(segments_BS, vectors_BS, mask).unsqueeze(1)
    bias = (relative + mask_bias(visible_B1SS, relative.dtype)).contiguous()
    real_BS = segments_BS > 0  # padding is not routed
    for block in model.encoder.blocks():
        x_BSD = block.transform(block.self_attention(x_BSD, bias), model.experts, real_BS)
    return model.encoder.norm(x_BSD)  # type: ignore[no-any-return]
