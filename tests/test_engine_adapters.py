"""Soft prompts: what is loaded and refused, and that any mix of them equals each alone."""

import gc
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.adapter_table import MAX_NAMED, AdapterTable
from engine.adapters import Adapter, Slots, load_adapter, model_fingerprint
from engine.beam import beam_search
from engine.engine import Engine
from engine.errors import CheckpointError, Overloaded, PromptTooLong, RequestError
from engine.generation import generate
from engine.prompt import build_request
from engine.request import BeamParams, Failed, Finished, Piece, Request, SamplingParams
from engine.scheduler import Limits
from engine.scoring import make_question, score
from engine.sources import Source, gather
from tests.tiny import DENSE, LLAMA, MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
MODELS = {config: tiny_model(config, seed=5).double() for config in (MOE, DENSE)}
LIMIT = 4 * DENSE.max_positions


def vectors(count, seed=0, dtype=torch.float64, width=DENSE.d_model):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def make_adapter(slots, seed=0, name="task", version="1"):
    return Adapter(
        name=name, version=version, prompt_PD=vectors(slots.num_vectors, seed), slots=slots
    )


def write_folder(path, tensors=None, ours=None, **changes):
    """A folder as PEFT writes it; a change to None drops a key."""
    path.mkdir(exist_ok=True)
    values = {
        "base_model_name_or_path": "some/t5",
        "inference_mode": True,
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 3,
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "token_dim": DENSE.d_model,
    } | changes
    text = json.dumps({key: value for key, value in values.items() if value is not None})
    (path / "adapter_config.json").write_text(text, encoding="utf-8")
    if tensors is None:
        tensors = {"prompt_embeddings": vectors(3, dtype=torch.float32)}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    if ours is not None:
        (path / "infmoe_adapter.json").write_text(json.dumps(ours), encoding="utf-8")
    return path


def load(path, dtype=torch.float32, **how):
    return load_adapter(path, DENSE, dtype, **how)


# --- folders


def test_a_folder_of_peft_goes_in_front_under_its_own_name(tmp_path):
    adapter = load(write_folder(tmp_path / "lcqmc"), torch.float64)
    assert (adapter.name, adapter.slots, adapter.base_fingerprint) == (
        "lcqmc",
        Slots(front=3),
        None,
    )
    assert adapter.prompt_PD.dtype == torch.float64
    assert torch.equal(adapter.prompt_PD, vectors(3, dtype=torch.float32).double())
    assert adapter.reference == f"lcqmc@{adapter.version}"


def test_a_version_that_nobody_gave_tells_the_content(tmp_path):
    once = load(write_folder(tmp_path / "a")).version
    assert load(write_folder(tmp_path / "b"), torch.bfloat16).version == once
    other = {"prompt_embeddings": vectors(3, 1, torch.float32)}
    assert load(write_folder(tmp_path / "c", other)).version != once
    assert load(write_folder(tmp_path / "d", ours={"slots": {"back": 3}})).version != once


def test_our_file_tells_slots_version_and_base(tmp_path):
    slots = {"front": 1, "middle": 1, "back": 1, "middle_after": 4}
    ours = {"slots": slots, "version": "2.1", "base_fingerprint": "abc"}
    adapter = load(write_folder(tmp_path / "a", ours=ours))
    assert adapter.slots == Slots(**slots)
    assert (adapter.version, adapter.base_fingerprint) == ("2.1", "abc")


def test_of_two_submodules_the_first_half_is_read_as_peft_does(tmp_path):
    both = vectors(6, dtype=torch.float32)
    path = write_folder(tmp_path / "a", {"prompt_embeddings": both}, num_transformer_submodules=2)
    adapter = load(path)
    assert torch.equal(adapter.prompt_PD, both[:3])
    assert adapter.prompt_PD.untyped_storage().nbytes() == both[:3].nbytes


def spoil(value):
    prompt = vectors(3, dtype=torch.float32)
    prompt[1, 4] = value
    return {"prompt_embeddings": prompt}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; expected PROMPT_TUNING"),
        ({"peft_type": None}, "peft_type is None"),
        ({"task_type": "CAUSAL_LM"}, "task_type is 'CAUSAL_LM'; expected SEQ_2_SEQ_LM"),
        ({"token_dim": 64}, "token_dim is 64; expected 32"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules is 3; expected 1 or 2"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
        ({"num_virtual_tokens": 0}, f"is 0; allowed: 1 to {LIMIT - 1}"),
        ({"num_virtual_tokens": LIMIT}, f"is {LIMIT}; allowed: 1 to {LIMIT - 1}"),
        ({"num_virtual_tokens": 4}, r"shape \[3, 32\]; expected \[4, 32\]"),
        ({"num_transformer_submodules": 2}, r"shape \[3, 32\]; expected \[6, 32\]"),
        (
            {"tensors": {"prompt_embeddings": vectors(3, width=16)}, "token_dim": None},
            r"\[3, 16\]; expected \[3, 32\]",
        ),
        ({"tensors": {"prompt_embeddings": torch.ones(96)}}, r"shape \[96\]"),
        ({"tensors": {"prompt_embeddings": torch.ones(3, 32).int()}}, "is I32, expected a float"),
        ({"tensors": {"weights": torch.ones(3, 32)}}, "there is no tensor prompt_embeddings"),
        (
            {"tensors": {**spoil(0.0), "prefix_task_rows": torch.ones(1)}},
            "holds prefix_task_rows as well",
        ),
        ({"tensors": spoil(torch.nan)}, "NaN or infinite"),
        ({"tensors": spoil(-torch.inf)}, "NaN or infinite"),
        ({"ours": {"slot": {}}}, "unknown keys slot; known: slots, version, base_fingerprint"),
        ({"ours": {"slots": {"left": 3}}}, "unknown keys left; known: front"),
        ({"ours": {"slots": 3}}, "slots is 3; expected an object"),
        ({"ours": {"slots": {"front": 2.0}}}, "front is 2.0; it must be a whole number"),
        ({"ours": {"slots": {"front": 2}}}, "are for 2 vectors; there are 3"),
        ({"ours": {"version": 1}}, "version is 1; expected a text"),
        ({"ours": {"version": "a@b"}}, "version 'a@b' is none"),
        ({"ours": {"base_fingerprint": []}}, r"base_fingerprint is \[\]; expected a text"),
        ({"ours": []}, "is no JSON object"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    path = write_folder(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="too large"):
        load(write_folder(tmp_path / "a", spoil(1e6)), torch.float16)


def test_missing_damaged_and_pickled_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="adapter_config.json: cannot be read: No such"):
        load(tmp_path / "nowhere")
    path = write_folder(tmp_path / "a")
    tensors = path / "adapter_model.safetensors"
    torch.save(spoil(0.0), tensors)
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        load(path)
    tensors.rename(path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin: is a pickle.*safe_serial"):
        load(path)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: is missing"):
        load(path)
    (path / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is no JSON"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "name 'a b' is none"),
        ({"name": "../x"}, "name '../x' is none"),
        ({"version": ""}, "version '' is none"),
        ({"prompt_PD": vectors(0)}, r"shape \[0, 32\]; expected vectors x width, not empty"),
        ({"prompt_PD": vectors(3)[0]}, r"shape \[32\]"),
        ({"slots": Slots(front=1, back=1)}, "for 2 vectors; there are 3"),
    ],
)
def test_an_impossible_adapter_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        replace(make_adapter(Slots(front=3)), **changes)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"front": -1}, "front is -1"),
        ({"back": True}, "back is True"),
        ({"front": 1, "middle_after": 2}, "middle_after is 2, but middle is 0"),
    ],
)
def test_impossible_slots_are_refused(slots, message):
    with pytest.raises(CheckpointError, match=message):
        Slots(**slots)


# --- fingerprints


def test_a_fingerprint_tells_models_apart_but_not_copies():
    model = tiny_model(DENSE, seed=1)
    found = model_fingerprint(model)
    assert found == model_fingerprint(tiny_model(DENSE, seed=1)) != model_fingerprint(MODELS[DENSE])
    assert model_fingerprint(tiny_model(DENSE, seed=1).bfloat16()) == found
    assert model_fingerprint(tiny_model(DENSE, seed=1).double()) == found
    assert model_fingerprint(tiny_model(replace(DENSE, max_positions=65), seed=1)) != found
    rotary = tiny_model(LLAMA, seed=1)  # a part of whose config is an object
    other = replace(LLAMA, rotary=replace(LLAMA.rotary, theta=500.0))
    assert model_fingerprint(rotary) != model_fingerprint(tiny_model(other, seed=1))
    assert model_fingerprint(tiny_model(replace(DENSE, num_encoder_layers=3), seed=1)) != found
    with torch.no_grad():
        model.embedding.weight[-2] += 1  # of the sampled rows every other one
    assert model_fingerprint(model) != found


def test_another_base_is_refused_unless_told(tmp_path):
    path = write_folder(tmp_path / "a", ours={"base_fingerprint": "that of another"})
    with pytest.raises(CheckpointError, match="that of another, the model mine"):
        load(path, fingerprint="mine")
    assert load(path).base_fingerprint == "that of another"
    assert load(path, fingerprint="that of another").name == "a"
    assert load(write_folder(tmp_path / "plain"), fingerprint="mine").name == "plain"


# --- what the encoder reads


def test_vectors_go_into_their_slots():
    adapter = make_adapter(Slots(front=2, middle=1, back=1, middle_after=3))
    source = Source((11, 12, 13, 14), adapter)
    assert source.padded_ids(0) == [0, 0, 11, 12, 13, 0, 14, 0]
    assert source.vector_positions() == [0, 1, 5, 7]
    assert source.num_positions == 8
    short = Source((11,), adapter)
    assert short.padded_ids(0) == [0, 0, 11, 0, 0]
    assert short.vector_positions() == [0, 1, 3, 4]


SLOTS = st.builds(
    lambda front, middle, back, after, mark: Slots(
        front=front,
        middle=middle,
        back=back,
        middle_after=after if middle and mark is None else 0,
        middle_mark=mark if middle else None,
    ),
    *[st.integers(0, 4)] * 4,
    st.sampled_from([None, 100, 101]),  # ids of the letters a and b
).filter(lambda slots: slots.num_vectors > 0)
IDS = st.lists(st.integers(3, 258), min_size=1, max_size=12).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.tuples(IDS, SLOTS), min_size=1, max_size=4),
    config=st.sampled_from([MOE, DENSE]),
)
@torch.no_grad()
def test_embeddings_of_real_tokens_equal_the_tokens(asked, config):
    model = MODELS[config]
    sources, plain = [], []
    for seed, (ids, slots) in enumerate(asked):
        generator = torch.Generator().manual_seed(seed)
        extra = torch.randint(3, 259, (slots.num_vectors,), generator=generator)
        adapter = Adapter(
            name="a", version="1", prompt_PD=model.embedding(extra).clone(), slots=slots
        )
        front, middle, _ = extra.tensor_split([slots.front, slots.front + slots.middle])
        back = extra[slots.front + slots.middle :]
        cut = slots.middle_after
        if slots.middle_mark is not None:
            after = [place for place, i in enumerate(ids, 1) if i == slots.middle_mark]
            cut = after[0] if after else len(ids)
        sources.append(Source(ids, adapter))
        plain.append(
            Source((*front.tolist(), *ids[:cut], *middle.tolist(), *ids[cut:], *back.tolist()))
        )
    expected, found = gather(model, plain), gather(model, sources)
    assert expected.x_BSD is None
    assert found.x_BSD is not None
    assert torch.equal(found.segments_BS, expected.segments_BS)
    assert torch.equal(model.encode(*found), model.encode(*expected))


def test_a_mix_with_and_without_adapters_leaves_texts_as_they_are():
    model = MODELS[DENSE]
    sources = [Source((5, 6)), Source((5, 6), make_adapter(Slots(back=3)))]
    with torch.no_grad():
        found = gather(model, sources)
        expected = model.embedding(torch.tensor([5, 6]))
    assert torch.equal(found.x_BSD[:, :2], expected.expand(2, -1, -1))
    assert torch.equal(found.x_BSD[1, 2:], sources[1].adapter.prompt_PD)
    assert found.segments_BS.tolist() == [[1, 1, 0, 0, 0], [1] * 5]


def test_vectors_count_towards_the_length_of_a_prompt():
    adapter = make_adapter(Slots(front=10))
    longest = [65] * (LIMIT - 11)  # one sentinel closes it
    assert make_request(longest, adapter=adapter).source.num_positions == LIMIT
    with pytest.raises(PromptTooLong, match=f"has {LIMIT - 9} tokens beside the 10 of its adapter"):
        make_request([*longest, 65], adapter=adapter)


# --- the engine


@dataclass(frozen=True, eq=False)
class Job:
    """A request as the engine sees it."""

    request: Request
    is_cancelled: Callable[[], bool] = lambda: False
    submitted: float = 0.0


def make_request(text="hello", config=DENSE, name="r", adapter=None, **params):
    return build_request(text, TOKENIZER, config, SamplingParams(**params), name, adapter=adapter)


def run(engine, arrivals, on_turn=lambda turn: None):
    events = {job: [] for jobs in arrivals.values() for job in jobs}
    turn = 0
    while turn <= max(arrivals) or engine.running or len(engine.scheduler):
        for job in arrivals.get(turn, ()):
            engine.add(job)
        for job, event in engine.turn():
            events.setdefault(job, []).append(event)
        on_turn(turn)
        turn += 1
        assert turn < 5000, "the engine does not come to an end"
    return events


def pieces(events):
    return [event for event in events if isinstance(event, Piece)]


def assert_as_alone(model, job, events):
    expected = list(generate(model, TOKENIZER, job.request))
    assert pieces(events) == pieces(expected)
    names = ("reason", "stop_reason", "prompt_tokens", "completion_tokens", "seed")
    assert all(getattr(events[-1], n) == getattr(expected[-1], n) for n in names)
    assert len([event for event in events if isinstance(event, Finished | Failed)]) == 1


PLANS = st.lists(
    st.tuples(
        st.text("ab <", min_size=1, max_size=20),
        st.one_of(st.none(), st.integers(0, 3)),
        st.integers(1, 10),
        st.sampled_from([0.0, 1.0]),
        st.integers(0, 10),
        st.booleans(),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=120, deadline=None)
@given(
    plans=PLANS,
    slots=st.lists(SLOTS, min_size=4, max_size=4),
    max_rows=st.integers(1, 5),
    sweep=st.integers(1, 80),
    config=st.sampled_from([MOE, DENSE]),
)
def test_any_mix_of_adapters_equals_each_alone(plans, slots, max_rows, sweep, config):
    model = MODELS[config]
    adapters = [make_adapter(one, number, str(number)) for number, one in enumerate(slots)]
    arrivals = {}
    for number, (text, adapter, length, temperature, turn, is_cancelled) in enumerate(plans):
        request = make_request(
            text,
            config,
            str(number),
            None if adapter is None else adapters[adapter],
            max_tokens=length,
            temperature=temperature,
            seed=number,
        )
        job = Job(request, is_cancelled=lambda is_cancelled=is_cancelled: is_cancelled)
        arrivals.setdefault(turn, []).append(job)
    limits = Limits(max_rows=max_rows, max_sweep_tokens=sweep, window_s=0.0)
    engine = Engine(model, TOKENIZER, limits)
    for job, events in run(engine, arrivals).items():
        if job.is_cancelled():
            assert not events
        else:
            assert_as_alone(model, job, events)
    assert engine.running == 0


def test_an_adapter_changes_the_answer_but_not_the_usage():
    model = MODELS[DENSE]
    jobs = [
        Job(make_request("same", adapter=adapter, max_tokens=12, logprobs=0))
        for adapter in (None, make_adapter(Slots(front=4)), make_adapter(Slots(back=4), 1))
    ]
    events = run(Engine(model, TOKENIZER, Limits()), {0: jobs})
    assert {events[job][-1].prompt_tokens for job in jobs} == {5}
    logprobs = {events[job][0].logprobs[0].logprob for job in jobs}
    assert len(logprobs) == 3


def test_equal_texts_are_encoded_once_for_each_adapter_and_version():
    model = MODELS[DENSE]
    sizes = []

    class Counting:
        def __getattr__(self, name):
            return getattr(model, name)

        def encode_layers(self, tokens, segments, x):
            sizes.append(tuple(tokens.shape))
            return model.encode_layers(tokens, segments, x)

    first = make_adapter(Slots(front=2))
    second = make_adapter(Slots(front=2), 1, version="2")
    adapters = [None, first, second] * 3
    jobs = [Job(make_request("same", adapter=a, max_tokens=3, seed=0)) for a in adapters]
    events = run(Engine(Counting(), TOKENIZER, Limits()), {0: jobs})
    assert sizes == [(3, 7)]
    for job in jobs:
        assert_as_alone(model, job, events[job])


def test_caches_and_sweeps_have_room_for_the_vectors():
    model = MODELS[DENSE]
    adapter = make_adapter(Slots(front=50, back=50))
    jobs = [Job(make_request("ab", adapter=adapter, max_tokens=4, seed=i)) for i in range(4)]
    engine = Engine(model, TOKENIZER, Limits(cache_bytes=400_000, max_sweep_tokens=250))
    seen = []

    def look(turn):
        batch = engine._batch
        seen.append(len(batch))
        assert len(batch) <= 1 or batch._cache.nbytes <= 400_000
        assert engine._sweep is None or len(engine._sweep.jobs) * 103 <= 250

    events = run(engine, {0: jobs}, look)
    assert max(seen) > 1
    for job in jobs:
        assert_as_alone(model, job, events[job])


def test_a_batch_job_with_one_adapter_does_not_starve_another():
    """One row at a time: the request that came last is not the last to begin."""
    big, other = (make_adapter(Slots(front=2), seed, name) for seed, name in enumerate("ab"))
    jobs = [Job(make_request("x", name=f"a{i}", adapter=big, max_tokens=1)) for i in range(6)]
    jobs.append(Job(make_request("x", name="b", adapter=other, max_tokens=1)))
    engine = Engine(MODELS[DENSE], TOKENIZER, Limits(max_rows=1, window_s=0.0))
    for job in jobs:
        engine.add(job)
    ended = []
    while engine.running or len(engine.scheduler):
        ended += [
            job.request.request_id for job, event in engine.turn() if isinstance(event, Finished)
        ]
    assert ended.index("b") <= 1
    assert [name for name in ended if name != "b"] == [f"a{i}" for i in range(6)]


def test_two_hundred_adapters_in_mixed_rows():
    model = MODELS[MOE]
    table = AdapterTable(10**7)
    for number in range(200):
        middle = number % 3
        slots = Slots(
            front=1 + number % 4, middle=middle, back=number % 2, middle_after=2 if middle else 0
        )
        table.add(make_adapter(slots, number, f"task-{number}"))
    jobs = [
        Job(
            make_request(
                "text" * (1 + number % 3),
                MOE,
                adapter=table.resolve(f"task-{number * 7 % 200}"),
                max_tokens=3,
                temperature=1.0,
                seed=number,
            )
        )
        for number in range(200)
    ]
    arrivals = {turn: jobs[turn * 10 : turn * 10 + 10] for turn in range(20)}
    events = run(Engine(model, TOKENIZER, Limits(max_rows=64)), arrivals)
    for job in jobs:
        assert_as_alone(model, job, events[job])


def test_a_misfit_that_was_never_checked_fails_its_own_row_only():
    model = MODELS[DENSE]
    narrow = Adapter(name="a", version="1", prompt_PD=vectors(3, width=16), slots=Slots(front=3))
    bad = Job(make_request("bad", adapter=narrow, max_tokens=3))
    good = Job(make_request("good", adapter=make_adapter(Slots(front=3)), max_tokens=3, seed=0))
    events = run(Engine(model, TOKENIZER, Limits()), {0: [bad, good]})
    assert isinstance(events[bad][-1], Failed)
    assert_as_alone(model, good, events[good])


def test_scores_and_beams_are_read_with_the_adapter():
    model = MODELS[DENSE]
    adapters = [None, make_adapter(Slots(front=3)), make_adapter(Slots(back=2), 1)]
    choices = [TOKENIZER.encode(text) for text in ("x", "yz")]
    questions = [
        make_question(make_request("same", adapter=adapter), choices, TOKENIZER)
        for adapter in [*adapters, adapters[1]]
    ]
    together = score(model, TOKENIZER, questions)
    for question, scores in zip(questions, together, strict=True):
        (alone,) = score(model, TOKENIZER, [question])
        for one, other in zip(scores, alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
    assert together[1] == together[3]
    assert len({scores[0].total for scores in together}) == 3
    request = make_request("same", adapter=adapters[1], max_tokens=3)
    best = beam_search(model, TOKENIZER, request, BeamParams(num_beams=2))[0]
    assert (
        best
        != beam_search(model, TOKENIZER, replace(request, adapter=None), BeamParams(num_beams=2))[0]
    )


# --- the table


def small(name="a", version="1", seed=0, count=1):
    return make_adapter(Slots(front=count), seed, name, version)


ONE = small().prompt_PD.nbytes


def test_names_mean_the_version_that_was_added_last():
    table = AdapterTable(10 * ONE)
    table.add(small(version="1"))
    first = table.resolve("a")
    table.add(small(version="2", seed=1))
    assert table.resolve("a").version == "2"
    assert table.resolve("a@1") is first
    table.add(small(version="1"))  # the same again: back to it
    assert table.resolve("a") is first
    assert table.known() == ["a@1", "a@2"]


@pytest.mark.parametrize("reference", ["b", "a@2", "a@", "", "@1", "A", "x" * 300])
def test_what_is_not_known_is_refused_with_what_is(reference):
    table = AdapterTable(10 * ONE)
    with pytest.raises(RequestError, match="is not known; none is"):
        table.resolve(reference)
    table.add(small())
    for call in (table.resolve, table.remove):
        with pytest.raises(RequestError, match="is not known; known: a@1") as caught:
            call(reference)
        assert caught.value.field == "adapter"
        assert len(str(caught.value)) < 200


def test_a_long_list_is_cut():
    table = AdapterTable(100 * ONE)
    for number in range(MAX_NAMED + 3):
        table.add(small(f"t{number:02}"))
    with pytest.raises(RequestError, match=r"t19@1 and 3 more$"):
        table.resolve("b")


def test_one_version_has_one_content():
    table = AdapterTable(10 * ONE)
    table.add(small())
    with pytest.raises(CheckpointError, match="a@1 is known with another content"):
        table.add(small(seed=1))
    with pytest.raises(CheckpointError, match="another content"):
        table.add(replace(small(), slots=Slots(back=1)))
    assert table.nbytes == ONE


def test_the_ones_unused_for_longest_go_when_room_is_needed():
    table = AdapterTable(3 * ONE)
    for name in "abc":
        table.add(small(name))
    table.resolve("a")  # dropped at once: used, but not in flight
    table.add(small("d"))
    assert table.known() == ["a@1", "c@1", "d@1"]
    table.add(small("e", count=2))
    assert table.known() == ["d@1", "e@1"]
    assert table.nbytes == 3 * ONE


def test_what_is_in_flight_stays_and_is_counted():
    table = AdapterTable(2 * ONE)
    table.add(small("a"))
    table.add(small("b"))
    request = make_request(adapter=table.resolve("a"))
    table.add(small("c"))
    assert table.known() == ["a@1", "c@1"]
    held = table.resolve("c")
    with pytest.raises(Overloaded, match="those in flight or pinned 512; the table holds 512"):
        table.add(small("d"))
    assert table.known() == ["a@1", "c@1"]
    table.remove("a")
    assert table.known() == ["c@1"]
    assert table.nbytes == 2 * ONE  # the request reads it still
    assert request.adapter.name == "a"
    del request
    assert table.nbytes == ONE
    table.add(small("d"))
    assert held.name == "c"


def test_one_larger_than_the_table_is_refused():
    table = AdapterTable(2 * ONE)
    table.add(small())
    with pytest.raises(CheckpointError, match=r"b@1 takes 768 bytes; the table holds 512"):
        table.add(small("b", count=3))
    assert table.known() == ["a@1"]


def test_versions_are_removed_one_by_one_or_all():
    table = AdapterTable(10 * ONE)
    for version in "12":
        table.add(small(version=version))
    table.remove("a@2")
    with pytest.raises(RequestError, match="'a' is not known; known: a@1"):
        table.resolve("a")
    table.add(small(version="2"))
    table.remove("a")
    assert table.known() == []
    assert table.nbytes == 0


def test_a_new_version_replaces_the_old_one_while_requests_run():
    model = MODELS[DENSE]
    table = AdapterTable(2 * 4 * ONE)
    table.add(small(version="1", seed=1, count=4))
    engine = Engine(model, TOKENIZER, Limits())
    late = []

    def ask(text):
        adapter = table.resolve("a")
        return Job(make_request(text, adapter=adapter, max_tokens=9, seed=0, ignore_eos=True))

    def replace_it(turn):
        if turn == 4:  # the early ones are decoding
            assert len(engine._batch) == 3
            table.add(small(version="2", seed=2, count=4))
            late.extend(map(ask, "abc"))
            for job in late:
                engine.add(job)

    events = run(engine, {0: [ask(text) for text in "abc"]}, replace_it)
    assert [job.request.adapter.version for job in events] == ["1"] * 3 + ["2"] * 3
    for job, told in events.items():
        assert_as_alone(model, job, told)
    assert table.known() == ["a@1", "a@2"]
    del job, told
    events.clear()
    late.clear()
    gc.collect()
    table.add(small("b", count=4))  # the old version is not in flight any more
    assert table.known() == ["a@2", "b@1"]


def test_many_threads_resolve_while_versions_change():
    table = AdapterTable(6 * ONE)
    table.add(small(version="0"))
    done, wrong = threading.Event(), []

    def ask():
        held = []
        while not done.is_set():
            adapter = table.resolve("a")
            expected = vectors(1, int(adapter.version) % 3)
            if not torch.equal(adapter.prompt_PD, expected):
                wrong.append(adapter.reference)
            held = [*held[-1:], adapter]

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for version in range(1, 60):
        table.add(small(version=str(version), seed=version % 3))
        assert table.nbytes <= 6 * ONE
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


# --- PEFT itself


# transformers deprecates what PEFT asks it for
of_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")


def tiny_t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=384,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


def peft_encoder_input(model, ids):
    """What PEFT gives to the encoder for a text."""
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"])

    hook = model.get_base_model().encoder.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0]]))
    hook.remove()
    return seen[0]


def our_encoder_input(t5, adapter, ids):
    model = tiny_model(DENSE)
    with torch.no_grad():
        model.embedding.weight.copy_(t5.shared.weight)
        return gather(model, [Source(tuple(ids), adapter)]).x_BSD


@of_peft
def test_peft_opens_our_folder_and_puts_the_same_into_the_encoder(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    path = write_folder(tmp_path / "a", ours={"version": "1"})
    t5, ids = tiny_t5(), [5, 9, 11, 1]
    found = peft_encoder_input(peft.PeftModel.from_pretrained(t5, path), ids)
    assert found.shape == (1, 7, 32)
    assert torch.equal(found, our_encoder_input(t5, load(path), ids))


@of_peft
@pytest.mark.parametrize("submodules", [None, 1])
def test_we_open_what_peft_saves_and_read_the_same(tmp_path, submodules):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=submodules
    )
    t5, ids = tiny_t5(), [5, 9, 1]
    model = peft.get_peft_model(t5, config).eval()
    model.save_pretrained(tmp_path / "saved")
    adapter = load(tmp_path / "saved")
    assert adapter.num_vectors == 4
    assert torch.equal(peft_encoder_input(model, ids), our_encoder_input(t5, adapter, ids))
