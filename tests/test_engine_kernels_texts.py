"""Ragged texts through kernels: near double precision, the same bits alone, within their memory."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from engine.config_parts import Rotary
from engine.kernels import sweep
from engine.kernels.attach import attach_kernels
from engine.kernels.processor import has_tiles
from engine.kernels.program import SCRATCH, SCRATCH_BYTES
from engine.kernels.team import Scratch
from engine.model.context import Past, context_width
from tests.test_engine_kernels_sweeps import exact_of, finish, make
from tests.tiny import random_ids

pytestmark = pytest.mark.skipif(not has_tiles(), reason="this CPU has no matrix unit for bf16")

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100)
MANY = {"num_experts": 48, "num_experts_per_token": 5, "expert_d_ff": 32}
SOFT = {"attention_scale": 0.05}  # sharp scores blow small errors up
SHAPES = {
    "heads of 32, half turned": ("llama", {"rotary": Rotary(width=16)}),
    "heads of 160": ("llama", {"d_kv": 160, "rotary": Rotary(width=32), "num_kv_heads": 1}),
    "windows, sinks": ("windows, sinks, norms", {"windows": (1, 33, 64), "d_kv": 64}),
    "more experts than tokens": ("mixtral", MANY),
    "shared": ("shared expert", {"d_kv": 128, "num_decoder_layers": 2}),
    "norms of experts": (
        "mixtral",
        {"router": "cpm_2", "num_experts_per_token": 1, "normalize_gates": False},
    ),
}
DENSE_ONES = [name for name in SHAPES if "num_experts" not in str(SHAPES[name])][:3]


@lru_cache(maxsize=8)
def attached(name):
    """A model with kernels, and the same in double precision."""
    base, changes = SHAPES[name]
    model = make(base, **SOFT | changes)
    exact = exact_of(model)
    assert attach_kernels(model)
    assert model.sweep_kernels is not None
    return model, exact


def rows_of(lengths, seed):
    """Tokens and segments of texts of any lengths, 0 too."""
    longest = max(lengths)
    segments = (torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)).long()
    return random_ids(len(lengths), longest, seed), segments


TEXTS = st.lists(st.sampled_from((0, *LENGTHS)), min_size=1, max_size=9).filter(any)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DENSE_ONES), TEXTS, st.integers(0, 999))
@torch.inference_mode()
def test_texts_of_any_lengths_are_near_double_precision(name, lengths, seed):
    model, exact = attached(name)
    tokens, segments = rows_of(lengths, seed)
    found, expected = model.encode(tokens, segments), exact.encode(tokens, segments)
    real = segments > 0
    assert not found[~real].any()
    errors = (found - expected)[real]
    # per row: the sums of a wrong position, or of another text, would be as far off as they spread
    assert errors.norm(dim=-1).max() < 0.1 * expected[real].norm(dim=-1).mean()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*SHAPES]), TEXTS, st.integers(0, 999), st.data())
@torch.inference_mode()
def test_texts_get_the_same_bits_alone_together_and_read_on(name, lengths, seed, data):
    model, _ = attached(name)
    tokens, segments = rows_of(lengths, seed)
    together = model.encode(tokens, segments)
    row = data.draw(st.sampled_from([i for i, n in enumerate(lengths) if n]))
    length = lengths[row]
    text, ones = tokens[row : row + 1, :length], segments[row : row + 1, :length]
    alone = model.encode(text, ones)
    assert torch.equal(alone[0], together[row, :length])
    cut = data.draw(st.integers(0, length))
    kept = together[row : row + 1, :cut]
    rest = model.go_on_layers(text[:, cut:], ones[:, cut:], Past(kept, torch.tensor([cut])))
    assert torch.equal(finish(rest), alone[:, cut:])


@torch.inference_mode()
def test_a_few_tokens_after_a_long_past():
    model, exact = attached("windows, sinks")
    tokens, segments = rows_of((700,), 1)
    whole, expected = model.encode(tokens, segments), exact.encode(tokens, segments)
    assert (whole - expected).norm(dim=-1).max() < 0.1 * expected.norm(dim=-1).mean()
    for cut in (699, 685, 33):
        past = Past(whole[:, :cut], torch.tensor([cut]))
        rest = model.go_on_layers(tokens[:, cut:], segments[:, cut:], past)
        assert torch.equal(finish(rest), whole[:, cut:])


@torch.inference_mode()
def test_hundreds_of_texts():
    model, _ = attached("more experts than tokens")
    lengths = [1 + number % 5 for number in range(300)]
    tokens, segments = rows_of(lengths, 3)
    together = model.encode(tokens, segments)
    for row in (0, 7, 150, 299):
        alone = model.encode(
            tokens[row : row + 1, : lengths[row]], segments[:1, : lengths[row]] | 1
        )
        assert torch.equal(alone[0], together[row, : lengths[row]])


@torch.inference_mode()
def test_a_past_may_be_stored_anyhow():
    """In another dtype, with gaps between its positions; but it must be there."""
    model, _ = attached("windows, sinks")
    tokens, segments = rows_of((40, 40), 2)
    whole = model.encode(tokens, segments)
    wide = torch.full((2, 40, 2 * whole.shape[2]), torch.nan)
    wide[:, :, : whole.shape[2]] = whole
    lengths = torch.tensor([30, 30])
    across = whole[:, :30].transpose(0, 1).clone()
    for kept in (wide[:, :30, : whole.shape[2]], across.transpose(0, 1), whole[:, :30]):
        layers = model.go_on_layers(tokens[:, 30:], segments[:, 30:], Past(kept, lengths))
        assert torch.equal(finish(layers), whole[:, 30:])
    layers = model.go_on_layers(tokens[:, 30:], segments[:, 30:], Past(whole[:, :29], lengths))
    with pytest.raises(ValueError, match="30 positions of a past do not fit its context of 29"):
        finish(layers)


@torch.inference_mode()
def test_embeddings_may_be_in_another_dtype():
    model, _ = attached("shared")
    tokens, segments = rows_of((40, 9), 2)
    found = model.encode(tokens, segments, model.embedding(tokens).float())
    assert torch.equal(found, model.encode(tokens, segments))


@torch.inference_mode()
def test_a_sink_of_no_weight_is_none():
    model = make("windows, sinks, norms", **SOFT)
    for block in model.decoder.blocks():
        block.self_attention.sinks.data.fill_(-torch.inf)
    exact = exact_of(model)
    assert attach_kernels(model)
    tokens, segments = rows_of((70, 9), 2)
    found, expected = model.encode(tokens, segments), exact.encode(tokens, segments)
    real = segments > 0
    assert (found - expected)[real].norm() < 0.05 * expected[real].norm()


@torch.inference_mode()
def test_padding_in_front_is_left_to_torch():
    model, exact = attached("heads of 32, half turned")
    tokens, segments = rows_of((20, 9), 2)
    segments[1] = segments[1].flip(0)
    found, expected = model.encode(tokens, segments), exact.encode(tokens, segments)
    real = segments > 0
    assert (found - expected)[real].norm() < 0.1 * expected[real].norm()


def test_two_models_read_at_the_same_time():
    """Threads of one process: who finds the team busy computes alone. Nor do they share room."""
    (first, _), (second, _) = map(attached, ("shared", "windows, sinks"))
    texts = [rows_of((5 * number + 1, 40), number) for number in range(8)]
    with torch.inference_mode():
        expected = [[model.encode(*text) for text in texts] for model in (first, second)]

    @torch.inference_mode()
    def read_all(model):
        return [model.encode(*text) for _ in range(4) for text in texts]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_all, [first, second, first, second]))
    for number, made in enumerate(found):
        for each, whole in zip(made, 4 * expected[number % 2], strict=True):
            assert torch.equal(each, whole)


def test_passes_in_either_mode_share_room():
    model, _ = attached("shared")
    text, found = rows_of((20, 9), 2), []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found.append(model.encode(*text))
    assert not found[1].is_inference()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@torch.inference_mode()
def test_a_pass_without_memory_fails_and_the_next_one_is_right(monkeypatch):
    model, _ = attached("shared")
    text, longer = rows_of((20, 9), 2), rows_of((900,), 2)
    expected = model.encode(*text)
    with monkeypatch.context() as patches:
        patches.setattr(sweep, "make_panels", lambda *_: torch.empty(1 << 60))
        with pytest.raises(RuntimeError, match="memory"):
            model.encode(*longer)
    assert torch.equal(model.encode(*text), expected)


@torch.inference_mode()
def test_one_room_is_kept_for_later():
    """The memory plan knows of one; passes at the same time have each its own."""
    model, _ = attached("windows, sinks")
    text = rows_of((20, 9), 2)
    passes = [model.encode_layers(*text) for _ in range(3)]
    for each in passes:
        next(each)
    expected = model.encode(*text)
    for each in passes:
        assert torch.equal(finish(each), expected)
    assert len(model.sweep_kernels._idle) == 1


@pytest.mark.parametrize("name", ["windows, sinks", "shared"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
@torch.inference_mode()
def test_what_is_no_number_in_one_text_spoils_no_other(name, bad):
    """Nor the texts that are read into the same room afterwards."""
    model, _ = attached(name)
    lengths = (5, 40, 17, 33)
    tokens, segments = rows_of(lengths, 5)
    embedded = model.embedding(tokens)
    expected = model.encode(tokens, segments, embedded)
    spoilt = embedded.clone()
    spoilt[1, 20] = bad
    found = model.encode(tokens, segments, spoilt)
    others = [0, 2, 3]
    assert torch.equal(found[others], expected[others])
    assert not torch.equal(found[1, 20:40], expected[1, 20:40])
    assert torch.equal(model.encode(tokens, segments, embedded), expected)


GUARD = 4096


class Guards:
    """Memory around what is asked for, all of its bits set: NaN, or -1; it must stay so."""

    def __init__(self):
        self.zones = []
        self.zeros, self.fill = torch.zeros, Scratch.fill

    def add_zeros(self, *shape, dtype=torch.float32):
        """As torch.zeros."""
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        whole = np.full(2 * GUARD + int(np.prod(sizes)) * dtype.itemsize, 0xFF, np.uint8)
        middle = whole[GUARD : len(whole) - GUARD]
        middle[:] = 0
        self.zones += [whole[:GUARD], whole[len(whole) - GUARD :]]
        return torch.from_numpy(middle).view(dtype).view(*sizes)

    def add_scratch(self, scratch, shared, table, num_rows, scratch_bytes):
        """As Scratch.fill; what earlier programs left is gone."""
        self.fill(scratch, shared, table, num_rows, scratch_bytes + GUARD)
        begin, own = shared[SCRATCH] - scratch._memory.ctypes.data, shared[SCRATCH_BYTES]
        self.check()
        scratch._memory[:] = 0xFF
        for thread in range(scratch._threads):
            place = begin + thread * own
            self.zones.append(scratch._memory[place + scratch_bytes : place + own])

    def check(self):
        """Nothing was written there."""
        for zone in self.zones:
            assert (zone == 0xFF).all()


@contextmanager
def guarded(monkeypatch):
    guards = Guards()
    with monkeypatch.context() as patches:
        patches.setattr(torch, "zeros", guards.add_zeros)
        patches.setattr(Scratch, "fill", lambda *given: guards.add_scratch(*given))
        yield guards
    guards.check()


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_programs_stay_within_their_memory(name, monkeypatch):
    """What is beside it is neither written nor used; texts fill what there is room for."""
    model, _ = attached(name)
    kernels = model.sweep_kernels
    for lengths, pasts in (
        ([64, 63, 65, 64], None),  # as many rows and slots as there is room for
        ([1] * 256, None),
        ([16] * 16, None),
        ([255], None),
        ([1, 20, 33], [256, 31, 1]),
        ([3], [2]),
    ):
        x, past = torch.randn(sum(lengths), 64, dtype=torch.bfloat16), None
        width = context_width(model.config)
        if pasts:
            kept = torch.randn(len(pasts), max(pasts), width, dtype=torch.bfloat16)
            past = Past(kept, torch.tensor(pasts))
        found = []
        for is_guarded in (True, False):
            kernels._idle.clear()
            context = torch.zeros(len(lengths), max(lengths), width, dtype=torch.bfloat16)
            if not is_guarded:
                for _ in kernels.read_layers(x, lengths, context, past):
                    pass
            else:
                with guarded(monkeypatch) as guards:
                    held = guards.add_zeros(*context.shape, dtype=torch.bfloat16)
                    for _ in kernels.read_layers(x, lengths, held, past):
                        pass
                    context = held
                kernels._idle.clear()
            found.append(context)
        assert torch.equal(*found)
        assert found[0].isfinite().all()
