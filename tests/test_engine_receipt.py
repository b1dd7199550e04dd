import json
from dataclasses import replace

import pytest
import torch

from engine.adapters import Adapter, Slots, model_fingerprint
from engine.generation import generate
from engine.grammar import compile_grammar
from engine.prompt import build_request
from engine.receipt import adapter_checksum, effective_parameters, make_receipt
from engine.request import BeamParams, Continuations, Finished, Pooling, SamplingParams
from tests.tiny import MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()


def adapter(fill=0.5, version="2"):
    return Adapter(
        name="news",
        version=version,
        prompt_PD=torch.full((2, MOE.d_model), fill),
        slots=Slots(front=2),
        base_fingerprint="abc",
    )


def test_neutral_parameters_are_left_out_and_the_others_told():
    assert effective_parameters(SamplingParams()) == {"max_tokens": 64, "temperature": 0.0}
    given = {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_k": 3,
        "logit_bias": ((4, 1.5),),
        "stop": ("a", "b"),
        "bad_words": ((1, 2),),
        "include_stop": True,
    }
    told = effective_parameters(SamplingParams(**given, seed=3))
    assert told == given | {"logit_bias": [[4, 1.5]], "stop": ["a", "b"], "bad_words": [[1, 2]]}


def test_a_greedy_choice_has_no_filters():
    told = effective_parameters(SamplingParams(top_k=3, top_p=0.5, repetition_penalty=2.0))
    assert told == {"max_tokens": 64, "temperature": 0.0, "repetition_penalty": 2.0}


def test_a_grammar_is_told_by_its_kind_and_checksum():
    grammars = [compile_grammar("choice", [word], TOKENIZER) for word in "ab"]
    told = [effective_parameters(SamplingParams(grammar=one))["grammar"] for one in grammars]
    assert [entry["kind"] for entry in told] == ["choice", "choice"]
    assert told[0]["sha256"] != told[1]["sha256"]


def test_an_adapter_with_other_vectors_or_slots_has_another_checksum():
    same = adapter_checksum(adapter())
    assert adapter_checksum(adapter(version="3")) == same
    assert adapter_checksum(adapter(fill=0.25)) != same
    assert adapter_checksum(replace(adapter(), slots=Slots(back=2))) != same


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_receipt_is_enough_to_ask_the_same_again(with_adapter):
    model = tiny_model(seed=4)
    used = adapter() if with_adapter else None
    params = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.9)
    asked = build_request("some text", TOKENIZER, MOE, params, "r", adapter=used)
    *pieces, finished = generate(model, TOKENIZER, asked)
    assert isinstance(finished, Finished)
    receipt = make_receipt(
        asked, finished, model_fingerprint=model_fingerprint(model), is_batch_invariant=True
    )
    read = json.loads(json.dumps(receipt))
    assert read["adapter"] == ("news@2" if with_adapter else None)
    assert read["adapter_checksum"] == (adapter_checksum(used) if used else None)
    assert read["adapter_base_fingerprint"] == ("abc" if with_adapter else None)
    assert read["model_fingerprint"] == model_fingerprint(model)
    assert read["is_batch_invariant"] is True
    again = replace(asked, params=SamplingParams(**read["parameters"], seed=read["seed"]))
    *repeated, _ = generate(model, TOKENIZER, again)
    assert [piece.token_ids for piece in repeated] == [piece.token_ids for piece in pieces]


def test_a_task_is_told_with_its_parameters():
    asked = build_request("a", TOKENIZER, MOE, SamplingParams(), "r")
    finished = Finished("stop", None, 1, 1, 0, 0.0, 0.0, 0.0)
    receipt = make_receipt(
        replace(asked, task=BeamParams(num_beams=2)),
        finished,
        model_fingerprint="f",
        is_batch_invariant=False,
    )
    assert receipt["task"] == {
        "name": "BeamParams",
        "num_beams": 2,
        "length_penalty": 1.0,
        "stops_early": False,
    }


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        (BeamParams(), {"max_tokens": 64, "stop": ["x"]}),
        (Pooling(), {}),
        (Continuations(choices=((1,),)), {}),
    ],
)
def test_a_task_tells_no_seed_and_only_the_parameters_that_it_goes_by(task, parameters):
    params = SamplingParams(seed=3, temperature=0.5, top_p=0.5, repetition_penalty=2, stop=("x",))
    asked = replace(build_request("a", TOKENIZER, MOE, params, "r"), task=task)
    finished = Finished("stop", None, 1, 1, 3, 0.0, 0.0, 0.0)
    receipt = make_receipt(asked, finished, model_fingerprint="f", is_batch_invariant=False)
    assert (receipt["seed"], receipt["parameters"]) == (None, parameters)
