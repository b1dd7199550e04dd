"""Compares our Transformer with transformers' T5 on ragged batches: logits, and greedy tokens."""

from contextlib import contextmanager

import torch


def ragged_batch(vocab_size, pad, seed=1):
    """Encoder rows of 3, 11 and 7 tokens, padded; decoder rows of 6."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(8, vocab_size, (3, 11), generator=generator)
    for row, length in enumerate((3, 11, 7)):
        tokens_BS[row, length:] = pad
    return tokens_BS, torch.randint(8, vocab_size, (3, 6), generator=generator)


@torch.no_grad()
def greedy(model, tokens_BS, steps):
    """Our greedy tokens (B, steps), one step at a time over the cache."""
    segments_BS = (tokens_BS != model.config.pad_token_id).long()
    cache = model.start_cache(model.encode(tokens_BS, segments_BS), segments_BS, steps)
    tokens_B1 = torch.full((len(tokens_BS), 1), model.config.decoder_start_token_id)
    result = []
    for _ in range(steps):
        tokens_B1 = model.logits(model.step(tokens_B1, cache)).argmax(-1)
        result.append(tokens_B1)
    return torch.cat(result, 1)


@torch.no_grad()
def oracle_greedy(oracle, tokens_BS, steps, pad, start):
    """The same from transformers, without a cache."""
    tokens_BT = torch.full((len(tokens_BS), 1), start)
    mask_BS = (tokens_BS != pad).long()
    encoded = oracle.get_encoder()(input_ids=tokens_BS, attention_mask=mask_BS)
    for _ in range(steps):
        logits = oracle(
            encoder_outputs=encoded, attention_mask=mask_BS, decoder_input_ids=tokens_BT
        ).logits
        tokens_BT = torch.cat([tokens_BT, logits[:, -1:].argmax(-1)], 1)
    return tokens_BT[:, 1:]


@contextmanager
def one_thread():
    """Tiny operators wait for threads far longer than they compute: 30 times, measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
@torch.no_grad()
def assert_equal_to_oracle(model, oracle):
    """Logits within 1e-4, greedy tokens identical over 32 steps, and not all the same token."""
    config = model.config
    pad, start = config.pad_token_id, config.decoder_start_token_id
    tokens_BS, tokens_BT = ragged_batch(config.vocab_size, pad)
    mask_BS = (tokens_BS != pad).long()
    expected = oracle(
        input_ids=tokens_BS, attention_mask=mask_BS, decoder_input_ids=tokens_BT
    ).logits
    found = model(tokens_BS, mask_BS, tokens_BT, torch.ones_like(tokens_BT))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    tokens = greedy(model, tokens_BS, 32)
    assert len(tokens.unique()) >= 8
    assert torch.equal(tokens, oracle_greedy(oracle, tokens_BS, 32, pad, start))
