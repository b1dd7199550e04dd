import logging
from dataclasses import replace

import pytest
import torch

from engine.checkpoint import load_model, save_model
from engine.errors import CheckpointError, ConfigError
from engine.experts import open_offloaded
from engine.generation import generate
from engine.model.moe import ResidentExperts
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from engine.routing import RecordingExperts, record_routing
from offload.trace import load_trace
from tests.tiny import DENSE, MOE, byte_tokenizer, random_ids, tiny_model

CONFIG = replace(MOE, num_experts=6, num_encoder_layers=3, num_decoder_layers=2)
LAYERS = ("encoder-0", "encoder-1", "encoder-2", "decoder-0", "decoder-1")


class Spy:
    """What the layers of a model meet: their inputs, seen from outside, and what they ask for."""

    def __init__(self, model):
        self.inputs = []
        self.asked = []
        for layer in model.moe_layers():
            layer.register_forward_pre_hook(self.see)

    def see(self, layer, arguments):
        self.inputs.append((layer, arguments[0].flatten(0, -2)))

    def watch(self, source):
        """Listen to what a source is asked."""
        stream = source.stream

        def listening(layer, wanted):
            self.asked.append((layer, list(wanted)))
            return stream(layer, wanted)

        source.stream = listening

    def routed(self, layer, x_ND):
        """Tokens of each expert, by the layer's own router."""
        return torch.bincount(layer.assign(layer.scores(x_ND)), minlength=6).tolist()


@torch.inference_mode()
def run(model, seed=0, rows=2):
    """An encoder sweep and three decode steps. Returns all that comes out."""
    source = random_ids(rows, 9, seed)
    hidden = model.encode(source, torch.ones_like(source))
    cache = model.start_cache(hidden, torch.ones_like(source), 8)
    steps = [model.step(random_ids(rows, 1, seed + i), cache) for i in range(3)]
    return torch.cat([hidden.flatten(), *[step.flatten() for step in steps]])


@pytest.fixture
def model():
    return tiny_model(CONFIG, seed=2)


def test_outputs_are_the_same_and_what_was_asked_is_recorded(model):
    spy = Spy(model)
    expected = run(model)
    spy.inputs.clear()
    spy.watch(model.experts)
    recorder = record_routing(model)
    assert torch.equal(run(model), expected)
    trace = recorder.trace()
    calls = list(trace.calls())
    assert trace.layers == LAYERS
    assert trace.experts_per_layer == 6
    assert [call.step for call in calls] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert [(call.layer, call.wanted) for call in calls] == spy.asked
    with torch.no_grad():
        for place, call in enumerate(calls):
            layer, x_ND = spy.inputs[place]
            counts = spy.routed(layer, x_ND)
            assert call.layer == layer.name
            assert call.counts == [counts[expert] for expert in call.wanted]
            assert sum(call.counts) == len(x_ND)
            if call.layer.endswith("-0"):
                assert call.guess == []  # nobody foresees the first layer of a stack
            else:
                guessed = spy.routed(layer, spy.inputs[place - 1][1])
                assert {*call.guess} == {e for e in range(6) if guessed[e]}
                assert [guessed[e] for e in call.guess] == sorted(filter(None, guessed))[::-1]


def test_names_of_parameters_stay_as_they_were(model, tmp_path):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    assert any(name.startswith("experts.layers.encoder-0") for name in names)
    record_routing(model)
    assert isinstance(model.experts, RecordingExperts)
    assert list(model.state_dict()) == list(before)
    assert [name for name, _ in model.named_parameters()] == names
    assert [layer.name for layer in model.moe_layers()] == list(LAYERS)
    model.load_state_dict({key: tensor + 1 for key, tensor in before.items()})
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key] + 1)
    save_model(model, tmp_path / "model")
    assert torch.equal(run(load_model(tmp_path / "model")), run(model))


def test_a_recorded_model_can_be_moved_to_another_dtype(model):
    expected = run(tiny_model(CONFIG, seed=2).bfloat16())
    recorder = record_routing(model)
    assert torch.equal(run(model.bfloat16()), expected)
    assert len(recorder.trace()) == 9


@pytest.mark.parametrize("is_training", [False, True])
def test_the_mode_of_the_model_stays(model, is_training):
    model.train(is_training)
    assert record_routing(model).training == is_training
    assert all(module.training == is_training for module in model.modules())


def test_offloaded_experts_are_recorded_as_resident_ones(model, tmp_path):
    resident = record_routing(model)
    expected = run(model)
    save_model(tiny_model(CONFIG, seed=2), tmp_path / "model")
    with open_offloaded(tmp_path / "model", CONFIG, torch.float32, 200_000) as experts:
        offloaded = load_model(tmp_path / "model", experts=experts)
        experts.attach(offloaded)
        keys = list(offloaded.state_dict())
        recorder = record_routing(offloaded)
        assert list(offloaded.state_dict()) == keys
        assert not any(key.startswith("experts.") for key in keys)
        assert torch.equal(run(offloaded), expected)
        assert experts.stats.misses > 0
        recorder.save(tmp_path / "a.npz")
    calls = list(resident.trace().calls())
    assert list(load_trace(tmp_path / "a.npz").calls()) == calls


def test_recording_leaves_the_guesses_of_the_source_alone(tmp_path):
    save_model(tiny_model(CONFIG, seed=2), tmp_path / "model")
    counts = []
    for is_recorded in (False, True):
        with open_offloaded(tmp_path / "model", CONFIG, torch.float32, 200_000) as experts:
            model = load_model(tmp_path / "model", experts=experts)
            experts.attach(model)
            if is_recorded:
                record_routing(model)
            for seed in range(8):
                run(model, seed, rows=1)
            precisions = experts._pipeline.lookahead.precisions()
            counts.append((precisions, experts.stats.hits + experts.stats.misses))
    assert counts[0] == counts[1]
    assert counts[0][0]


def test_a_generated_text_is_recorded_token_by_token(model):
    request = build_request(
        "some text",
        byte_tokenizer(),
        CONFIG,
        SamplingParams(max_tokens=6, temperature=1.0, seed=1),
        "r",
    )

    def text():
        return [e for e in generate(model, byte_tokenizer(), request) if isinstance(e, Piece)]

    expected = text()
    recorder = record_routing(model)
    assert text() == expected
    calls = list(recorder.trace().calls())
    assert [call.layer for call in calls[:3]] == list(LAYERS[:3])
    assert {call.layer for call in calls[3:]} == set(LAYERS[3:])


def test_a_decode_step_between_two_layers_of_a_sweep_is_a_step_of_its_own(model):
    recorder = RecordingExperts(ResidentExperts(CONFIG), model.moe_layers())
    for name in ("encoder-0", "decoder-0", "decoder-1", "encoder-1", "decoder-0", "encoder-2"):
        recorder.foresee(name, torch.randn(3, CONFIG.d_model))
        list(recorder.stream(name, [0, 1]))
    assert recorder.trace().steps.tolist() == [0, 1, 1, 0, 2, 0]
    recorder.foresee("encoder-0", torch.randn(3, CONFIG.d_model))
    list(recorder.stream("encoder-0", [0]))
    assert recorder.trace().steps.tolist() == [0, 1, 1, 0, 2, 0, 3]


def test_memory_is_bounded_and_the_end_is_told_once(model, caplog):
    expected = run(model)
    recorder = record_routing(model, max_records=5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(run(model), expected)
    assert len(recorder.trace()) == 5
    assert [record.getMessage() for record in caplog.records] == [
        "recorded the routing of 5 layers; no more"
    ]


class Broken:
    """A source whose experts cannot be read."""

    def foresee(self, layer, x_ND):
        pass

    def stream(self, layer, wanted):
        raise CheckpointError(f"{layer} is damaged")


def test_what_the_source_raises_is_raised_and_the_record_goes_on(model, tmp_path):
    resident = model.experts
    del model.experts
    model.experts = Broken()
    recorder = record_routing(model)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="encoder-0 is damaged"):
            run(model)
    assert [call.layer for call in recorder.trace().calls()] == ["encoder-0"] * 2
    recorder.save(tmp_path / "a.npz")
    assert load_trace(tmp_path / "a.npz").steps.tolist() == [0, 1]
    model.experts = resident
    run(model)


def test_a_dense_model_has_no_routing():
    with pytest.raises(ConfigError, match="the model is dense"):
        record_routing(tiny_model(DENSE))
