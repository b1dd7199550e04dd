import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.trace import LayerCall, TraceBuilder, load_trace, save_trace
from offload.trace_kinds import KINDS, STAY, Texts, generate_trace

LAYERS = ("encoder-0", "encoder-1", "decoder-0", "decoder-1")
TEXTS = Texts(layers=LAYERS, experts_per_layer=6, texts=3, source_tokens=20, steps=7, batch=2)
CALLS = [
    LayerCall(0, "encoder-0", [4, 0], [5, 1], []),
    LayerCall(1, "decoder-0", [2], [1], []),  # decoded between two layers of the sweep
    LayerCall(1, "decoder-1", [5], [1], [3, 5]),
    LayerCall(0, "encoder-1", [1, 2, 3], [2, 2, 2], [1]),
    LayerCall(2, "decoder-0", [0], [1], []),
]


def build(calls=CALLS, layers=LAYERS, experts=6):
    builder = TraceBuilder(layers, experts)
    for call in calls:
        builder.add(call)
    return builder.build()


def arrays(trace):
    """What a file of the trace holds."""
    names = ("steps", "layer_ids", "wanted_ends", "guess_ends", "experts", "counts", "guesses")
    return {
        "version": np.int64(1),
        "layers": np.array(trace.layers),
        "experts_per_layer": np.int64(trace.experts_per_layer),
    } | {name: getattr(trace, name) for name in names}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "a.npz"
    save_trace(build(), path)
    loaded = load_trace(path)
    assert list(loaded.calls()) == CALLS
    assert (loaded.layers, loaded.experts_per_layer) == (LAYERS, 6)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]
    with np.load(path, allow_pickle=False) as archive:
        assert archive["version"] == 1


def test_a_trace_of_nothing_is_one_too(tmp_path):
    path = tmp_path / "a.npz"
    save_trace(build([]), path)
    assert list(load_trace(path).calls()) == []


def test_the_next_layer_of_a_step_is_found_across_others():
    assert build().following().tolist() == [3, 2, -1, -1, -1]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    save_trace(build(), path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_trace(build([]), path)
    assert len(load_trace(path)) == len(CALLS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.npz"):
        load_trace(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", np.arange(3).tobytes()])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: is no \.npz file"):
        load_trace(path)


WRONG = [
    ({"version": np.int64(2)}, "version is 2; this program reads traces of version 1"),
    ({"version": None}, "version is missing"),
    ({"counts": None}, "array counts is missing"),
    ({"more": np.arange(3)}, "array more is not part of a trace"),
    ({"layers": np.arange(4)}, r"layers is int64 of shape \(4,\); it must be a row of names"),
    ({"layers": np.array(["a", "b", "c", "c"])}, "layers are 4 names; they must differ"),
    ({"experts_per_layer": np.arange(2)}, "experts_per_layer is .* a whole number"),
    ({"experts_per_layer": np.int64(0)}, "experts_per_layer is 0, not in 1..65535"),
    ({"experts_per_layer": np.int64(3)}, "experts holds 5; the most is 2"),
    ({"steps": np.zeros(5)}, r"steps is float64 of shape \(5,\); it must be a row of int64"),
    ({"steps": np.array([0, 1, 1, 0, -1])}, "steps holds -1; the least is 0"),
    ({"steps": np.array([0, 1, 1, 0])}, "layer_ids has 5 entries, not 4"),
    ({"steps": np.array([0, 0, 1, 2, 3])}, "step 0 does not pass the layers of one stack"),
    ({"steps": np.array([0, 1, 1, 0, 1])}, "step 1 does not pass the layers of one stack"),
    ({"layer_ids": np.array([0, 2, 3, 1, 4], np.uint16)}, "layer_ids holds 4; the most is 3"),
    ({"wanted_ends": np.array([2, 2, 4, 7, 8])}, "wanted_ends gives a layer 0 experts"),
    ({"wanted_ends": np.array([2, 3, 4, 7, 9])}, "experts has 8 entries, not 9"),
    ({"guess_ends": np.array([0, 0, 2, 1, 3])}, "guess_ends gives a layer -1 guesses"),
    ({"experts": np.array([4, 4, 2, 5, 1, 2, 3, 0], np.uint16)}, "experts names an expert twice"),
    ({"counts": np.array([5, 0, 1, 1, 2, 2, 2, 1], np.uint32)}, "counts holds 0; the least is 1"),
    ({"guesses": np.array([3, 6, 1], np.uint16)}, "guesses holds 6; the most is 5"),
    ({"guesses": np.array([3, 3, 1], np.uint16)}, "guesses names an expert twice"),
    ({"steps": np.array([None] * 5)}, "cannot be read: Object arrays cannot be loaded"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_file_that_describes_no_run_is_refused(tmp_path, change, message):
    path = tmp_path / "a.npz"
    content = arrays(build()) | change
    np.savez(path, **{name: values for name, values in content.items() if values is not None})
    with pytest.raises(ValueError, match=rf"a\.npz: {message}"):
        load_trace(path)


def loading(path) -> str:
    """What comes of loading a file that may be damaged."""
    try:
        return f"{path}: {len(list(load_trace(path).calls()))} layers"
    except ValueError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("traces") / "a.npz"
    save_trace(build(), path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert loading(path).startswith(f"{path}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_a_sweep_and_then_steps(kind, tmp_path):
    trace = generate_trace(kind, TEXTS)
    calls = list(trace.calls())
    one = ["encoder-0", "encoder-1", *["decoder-0", "decoder-1"] * 7]
    assert [call.layer for call in calls] == one * 3
    assert trace.steps.max() == 3 * 8 - 1
    for call in calls:
        assert sum(call.counts) == (20 if call.layer.startswith("encoder") else 2)
        assert call.counts == sorted(call.counts, reverse=True)
        assert bool(call.guess) <= call.layer.endswith("1")  # nobody foresees a first layer
    save_trace(trace, tmp_path / "a.npz")
    assert list(load_trace(tmp_path / "a.npz").calls()) == calls
    assert list(generate_trace(kind, TEXTS).calls()) == calls
    assert list(generate_trace(kind, replace(TEXTS, seed=1)).calls()) != calls


def test_a_model_of_one_stack_has_traces_too():
    decoder = generate_trace("uniform", replace(TEXTS, layers=LAYERS[2:]))
    assert {call.layer for call in decoder.calls()} == set(LAYERS[2:])
    encoder = generate_trace("uniform", replace(TEXTS, layers=LAYERS[:2]))
    assert encoder.steps.tolist() == [0, 0, 1, 1, 2, 2]


LONG = Texts(
    layers=("decoder-0", "decoder-1"), experts_per_layer=8, texts=1, source_tokens=1, steps=4000
)


def decoded(kind, layer, texts=LONG):
    """The expert that each step of batch 1 wants of a layer."""
    return np.array(
        [call.wanted[0] for call in generate_trace(kind, texts).calls() if call.layer == layer]
    )


def test_uniform_uses_all_experts_alike():
    shares = np.bincount(decoded("uniform", "decoder-0"), minlength=8) / LONG.steps
    np.testing.assert_allclose(shares, 1 / 8, atol=0.02)


def test_zipf_has_favourites_of_its_own_in_each_layer():
    expected = 1 / np.arange(1, 9) / (1 / np.arange(1, 9)).sum()
    favourites = []
    for layer in LONG.layers:
        shares = np.bincount(decoded("zipf", layer), minlength=8) / LONG.steps
        np.testing.assert_allclose(np.sort(shares)[::-1], expected, atol=0.03)
        favourites.append(np.argsort(-shares).tolist())
    assert favourites[0] != favourites[1]


def test_bursts_stay_for_some_steps():
    experts = decoded("bursty", "decoder-0")
    stays = (np.diff(experts) == 0).mean()
    assert stays == pytest.approx(STAY + (1 - STAY) / 8, abs=0.02)
    again = (np.diff(decoded("uniform", "decoder-0")) == 0).mean()
    assert again == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("precision", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_guesses_are_as_right_as_they_are_told_to_be(precision, batch):
    texts = replace(LONG, precision=precision, batch=batch, experts_per_layer=16, steps=2000)
    calls = [c for c in generate_trace("uniform", texts).calls() if c.layer == "decoder-1"]
    assert all(len(call.guess) == len(call.wanted) for call in calls)
    right = [len({*call.guess} & {*call.wanted}) / len(call.guess) for call in calls]
    assert np.mean(right) == pytest.approx(precision, abs=0.03)


def test_where_all_experts_are_wanted_no_guess_can_be_wrong():
    texts = replace(LONG, steps=4, batch=2000, precision=0.5)
    for call in generate_trace("uniform", texts).calls():
        assert len(call.wanted) == 8
        assert len(call.guess) <= 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": 0}, "texts is 0; it must be at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"source_tokens": 0}, "source_tokens is 0"),
        ({"experts_per_layer": 0}, "experts_per_layer is 0"),
        ({"precision": 1.1}, "precision is 1.1; it must lie between 0 and 1"),
        ({"precision": float("nan")}, "precision is nan"),
    ],
)
def test_impossible_texts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TEXTS, **change)


def test_an_unknown_kind_is_told():
    with pytest.raises(ValueError, match="'normal' is no kind of trace; there are uniform, zipf"):
        generate_trace("normal", TEXTS)
