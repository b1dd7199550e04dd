"""Tasks for models that go on in the text they read: choices, whole texts, learning, PEFT."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.adapters import Slots, load_adapter
from engine.checkpoint import save_model
from engine.checkpoint_any import load_any
from engine.errors import ConfigError
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from engine.scoring import make_question, score
from server.__main__ import main
from tests.fakes import live_server, tiny_worker
from tests.test_training_tasks import ROWS
from tests.tiny import DENSE, LLAMA, MIXTRAL, byte_tokenizer, tiny_model
from training.served import evaluate_served
from training.task_eval import evaluate_task
from training.task_examples import Example, read_examples
from training.task_readers import decoder_start, encoder_ids, inner_ids, needs_space
from training.task_rows import read_rows
from training.tasks import open_task, parse_task, ready_tasks
from training.tune import TuneSettings
from training.tune_files import AdapterFacts, write_adapter
from training.tune_model import Scorer, SoftPrompt
from training.tune_run import TunePlan, evaluate_model, run_tune

TOKENIZER = byte_tokenizer()
LONG = replace(LLAMA, max_positions=512)
OF_PEFT = "ignore:.is_gradient_checkpointing. is dep:FutureWarning"


def task(**changes):
    values = {
        "kind": "choice",
        "template": "{text} is",
        "metric": "accuracy",
        "answer": {"column": "label"},
        "labels": {"0": ["no", "nay"], "1": ["yes"]},
    }
    return parse_task(Path("task.toml"), values | changes)


CHOOSE = task()
LABELLED = task(template="On {label}:", continuation="{text}")
WHOLE = task(template="", continuation="{text}, {label}.", by="mean")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(count):
    return [
        {"text": "ab"[i % 2] * (1 + i % 4) + "xyz"[i % 3], "label": i % 2} for i in range(count)
    ]


def examples(tmp_path, task, config=LONG, count=5, vectors=0):
    path = write(tmp_path / "rows.jsonl", *rows_of(count))
    return read_examples(path, task, TOKENIZER, config, vectors)


@torch.no_grad()
def slow_score(model, source, target, prompt=None):
    """Log-probabilities of a target read anew, without context or cache; vectors in front."""
    ids = torch.tensor([[*source, *target]])
    x = model.embedding(ids)
    vectors = 0 if prompt is None else len(prompt)
    if vectors:
        x = torch.cat([prompt.unsqueeze(0).to(x.dtype), x], 1)
        ids = torch.cat([ids.new_zeros(1, vectors), ids], 1)
    logs = model.logits(model.read(ids, torch.ones_like(ids), x))[0].log_softmax(-1)
    begin = vectors + len(source) - 1
    return logs[begin:-1].gather(1, torch.tensor(target).unsqueeze(1)).squeeze(1)


# --- what is read


def test_a_text_is_neither_closed_nor_answered_elsewhere():
    begun = replace(LONG, begin_token_ids=(5,))
    assert encoder_ids("ab", TOKENIZER, LONG) == TOKENIZER.encode("ab")
    assert encoder_ids("ab", TOKENIZER, begun) == [5, *TOKENIZER.encode("ab")]
    assert decoder_start(TOKENIZER, LONG) == ()


def test_words_go_on_in_the_text(tmp_path):
    (example,) = examples(tmp_path, CHOOSE, count=1)
    assert example.sources == (tuple(TOKENIZER.encode("ax is")),)
    assert example.words[0][1] == tuple(TOKENIZER.encode(" nay"))
    for before, word, expected in [
        ("is", "yes", True),
        ("Answer:", "yes", True),
        ("is ", "yes", False),
        ("(", "yes", False),
        ("是", "yes", False),
        ("is", "好", False),
        ("", "yes", False),
        ("is", ", yes", False),
    ]:
        assert needs_space(before, word) == expected, (before, word)


def test_ids_of_what_comes_after_a_text_lack_what_begins_one():
    class Pieces:
        """As Llama's: a mark before the first word and for each space."""

        def encode(self, text):
            return [ord(letter) for letter in "_" + text.replace(" ", "_")]

    assert inner_ids(Pieces().encode, " ab") == [ord(letter) for letter in "_ab"]
    assert inner_ids(Pieces().encode, "ab") == [ord(letter) for letter in "ab"]
    assert inner_ids(lambda text: [len(text)], "ab") == [2]  # joins even over a newline


def test_positions_are_kept_for_the_answer(tmp_path):
    short = replace(LLAMA, max_positions=16)
    for given in (replace(CHOOSE, cut="text"), replace(LABELLED, cut="text")):
        path = write(tmp_path / "a.jsonl", {"text": "b" * 50, "label": 1})
        (example,) = read_examples(path, given, TOKENIZER, short)
        longest = max(
            len(example.sources[number]) + len(ids) for g in example.asked() for number, ids in g
        )
        assert longest == 16
        assert math.isfinite(
            evaluate_task(Scorer(tiny_model(short), TOKENIZER), [example], given).score.value
        )
    with pytest.raises(ValueError, match=r"line 1: the text has \d+ tokens; the limit is"):
        read_examples(path, CHOOSE, TOKENIZER, short)
    written = task(kind="generate", metric="bleu", labels={}, max_tokens=4)
    with pytest.raises(ValueError, match="line 1: the text has 53 tokens; the limit is 12"):
        read_examples(path, written, TOKENIZER, short)


# --- choices by what follows, and by whole texts


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["dense", "moe"])
@pytest.mark.parametrize("given", [CHOOSE, LABELLED, WHOLE], ids=["word", "label", "whole"])
def test_scores_are_those_of_each_text_read_anew(tmp_path, config, given):
    model = tiny_model(config, seed=3).double()
    found = examples(tmp_path, given, config)
    scorer = Scorer(model, TOKENIZER)
    with torch.no_grad():
        scores = scorer.label_scores(found, given)
    for example, score_L in zip(found, scores, strict=True):
        for pairs, value in zip(example.asked(), score_L.tolist(), strict=True):
            words = [slow_score(model, example.sources[n], ids) for n, ids in pairs]
            sums = [word.mean() if given.by == "mean" else word.sum() for word in words]
            assert value == pytest.approx(torch.stack(sums).logsumexp(0).item(), abs=1e-5)


def test_the_label_is_put_into_the_text(tmp_path):
    row = rows_of(1)[0]["text"]
    (example,) = examples(tmp_path, LABELLED, count=1)
    assert example.is_paired
    pairs = [pair for group in example.asked() for pair in group]
    texts = [f"On {word}: {row}" for word in ("no", "nay", "yes")]
    for (number, target), text in zip(pairs, texts, strict=True):
        assert TOKENIZER.decode([*example.sources[number], *target]) == text
        assert TOKENIZER.decode(target) == f" {row}"
    (example,) = examples(tmp_path, WHOLE, count=1)
    whole = TOKENIZER.encode(f"{row}, yes.")
    assert (example.sources[2], example.words[1]) == (tuple(whole[:1]), (tuple(whole[1:]),))
    begun = replace(LONG, begin_token_ids=(5,))
    (example,) = examples(tmp_path, WHOLE, begun, count=1)
    assert (example.sources[2], example.words[1]) == ((5,), (tuple(whole),))
    (example,) = examples(tmp_path, WHOLE, replace(DENSE, max_positions=512), count=1)
    assert example.sources[2] == tuple(encoder_ids("", TOKENIZER, DENSE))
    assert example.words[1] == (tuple(whole),)


def test_a_text_without_anything_to_score_is_told(tmp_path):
    bare = task(template="", continuation="{label}", labels={"0": "a", "1": "bc"})
    with pytest.raises(ValueError, match="line 1: the text 'a' has no token to be scored"):
        examples(tmp_path, bare)


def test_few_labels_are_drawn_by_seed(tmp_path):
    news = replace(open_task("zero_shot_news"), cut=None)
    path = write(tmp_path / "a.jsonl", *[{"sentence": "球", "label": 103}] * 40)
    found = read_examples(path, news, TOKENIZER, LONG)
    drawn = [example.labels for example in found]
    assert all(
        len(labels) == 4 and labels[e.answer] == "103"
        for labels, e in zip(drawn, found, strict=True)
    )
    assert len(set(drawn)) > 20
    assert len({label for labels in drawn for label in labels}) == 15
    assert [e.labels for e in read_examples(path, news, TOKENIZER, LONG)] == drawn
    other = read_examples(path, replace(news, seed=1), TOKENIZER, LONG)
    assert [example.labels for example in other] != drawn
    assert TOKENIZER.decode(found[0].sources[found[0].answer]) == "这是关于体育的文章："
    report = evaluate_task(Scorer(tiny_model(LONG), TOKENIZER), found[:4], news)
    assert {*report.answers} <= {label for labels in drawn for label in labels}
    every = read_examples(path, replace(news, candidates=15), TOKENIZER, LONG)
    assert all(len(example.labels) == 15 for example in every)


@pytest.mark.parametrize("name", ready_tasks())
def test_ready_tasks_read_score_and_learn(tmp_path, name):
    given = replace(open_task(name), max_tokens=30)
    (example,) = read_examples(write(tmp_path / "a.jsonl", ROWS[name]), given, TOKENIZER, LONG)
    scorer = Scorer(tiny_model(LONG), TOKENIZER)
    report = evaluate_task(scorer, [example] * 2, given)
    assert report.rows == 2
    assert 0 <= report.score.value <= 100
    loss, count = scorer.loss([example], given)
    assert loss.item() > 0
    assert count >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continuation": "{text}"}, "it or the template needs {label}"),
        ({"continuation": ""}, "needs {label}"),
        ({"continuation": "{label}{middle}"}, "continuation is empty or has {middle}"),
        ({"template": "{label}", "continuation": ""}, "continuation is empty or has"),
        ({"candidates": 1}, "candidates is 1; it must be 0"),
        ({"candidates": 2.5}, "candidates is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"kind": "generate", "metric": "bleu", "labels": {}, "candidates": 2}, "are for a choice"),
    ],
)
def test_task_files_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        task(**changes)


# --- ChID's own files


def test_the_files_of_chid_are_read_as_they_are(tmp_path):
    text = "他#idiom#，又#idiom#。"
    row = {
        "content": text,
        "groundTruth": ["甲甲", "乙乙"],
        "candidates": [["甲甲", "丙"], ["丁", "乙乙"]],
    }
    path = write(tmp_path / "a.json", row | {"realCount": 2}, row)
    columns = open_task("zero_shot_idioms").columns()
    found = read_rows(path, columns)
    assert [one.line for one in found] == [1, 1, 2, 2]
    assert found[1].values == {
        "before": "他，又",
        "after": "。",
        "candidates": ["丁", "乙乙"],
        "answer": "乙乙",
    }
    several = {"content": ["他#idiom07#。", "#idiom12#了"], "candidates": ["甲", "乙"]}
    path = write(tmp_path / "dev.json", several)
    with pytest.raises(
        ValueError, match="dev_answer.json: cannot be read as JSON, the answers of dev"
    ):
        read_rows(path, columns)
    (tmp_path / "dev_answer.json").write_text('{"#idiom07#": 1, "#idiom12#": 0}')
    (first, second) = read_rows(path, columns)
    assert (first.values["answer"], second.values["answer"]) == (1, 0)
    given = open_task("zero_shot_idioms")
    (one, _) = read_examples(path, given, TOKENIZER, LONG)
    assert TOKENIZER.decode([*one.sources[1], *one.words[1][0]]).endswith("乙。")
    assert one.answer == 1
    (tmp_path / "dev_answer.json").write_text('{"#idiom07#": 1}')
    with pytest.raises(ValueError, match="line 1: no answer for #idiom12#"):
        read_rows(path, columns)
    write(path, row | {"groundTruth": ["甲甲"]})
    with pytest.raises(ValueError, match="line 1: no answer for #idiom#"):
        read_rows(path, columns)


# --- prompts


@pytest.mark.parametrize("slots", [Slots(front=3), Slots(front=1, middle=2, middle_after=2)])
def test_scorer_engine_and_server_agree(tmp_path, slots):
    model = tiny_model(LLAMA, seed=2)
    prompt_PD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "prompt", prompt_PD, LLAMA, AdapterFacts(slots=slots))
    adapter = load_adapter(tmp_path / "prompt", LLAMA, torch.float32)
    scorer = Scorer(model, TOKENIZER, SoftPrompt(prompt_PD, slots))
    texts = ["abc", "defgh", "i"]
    sources = [tuple(TOKENIZER.encode(text)) for text in texts]
    requests = [
        build_request(
            list(ids),
            TOKENIZER,
            LLAMA,
            SamplingParams(max_tokens=6, temperature=0),
            "q",
            adapter=adapter,
        )
        for ids in sources
    ]
    words = [TOKENIZER.encode(word) for word in ("xyz", "u")]
    told = score(model, TOKENIZER, [make_question(r, words, TOKENIZER) for r in requests])
    with torch.no_grad():
        encoded = scorer.encode(sources)
        for row, scores in enumerate(told):
            found = scorer.target_logprobs(encoded, [row, row], [tuple(word) for word in words])
            for one, expected in zip(found, scores, strict=True):
                torch.testing.assert_close(one, torch.tensor(expected.logprobs), atol=1e-4, rtol=0)
    answers = [
        "".join(e.text for e in generate(model, TOKENIZER, r) if isinstance(e, Piece))
        for r in requests
    ]
    assert scorer.write(sources, 6) == answers
    if slots.middle == 0:
        slow = slow_score(model, sources[1], words[0], prompt_PD)
        torch.testing.assert_close(torch.tensor(told[1][0].logprobs), slow, atol=1e-4, rtol=0)


def test_vectors_that_cannot_be_there_are_refused(tmp_path):
    model = tiny_model(LLAMA)
    with pytest.raises(ConfigError, match="1 vectors are behind the text; a decoder-only"):
        Scorer(model, TOKENIZER, SoftPrompt(torch.ones(2, 32), Slots(front=1, back=1)))
    with pytest.raises(ConfigError, match="mask text_blind is for encoders"):
        Scorer(model, TOKENIZER, SoftPrompt(torch.ones(1, 32), Slots(front=1), "text_blind"))
    save_model(model, tmp_path / "model")
    plan = TunePlan(
        model=tmp_path / "model",
        data=write(tmp_path / "rows.jsonl", *rows_of(4)),
        out=tmp_path / "out",
        task=CHOOSE,
        settings=TuneSettings(front=1, back=1),
    )
    with pytest.raises(ConfigError, match="vectors are behind the text"):
        run_tune(plan)


@pytest.mark.parametrize("given", [CHOOSE, replace(CHOOSE, loss="labels"), LABELLED, WHOLE])
def test_gradients_are_those_of_small_steps(tmp_path, given):
    model = tiny_model(LLAMA, seed=4).double().requires_grad_(False)
    found = examples(tmp_path, given, count=3)
    prompt = SoftPrompt(
        torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), Slots(front=2)
    )
    prompt.double()
    scorer = Scorer(model, TOKENIZER, prompt)
    loss, _ = scorer.loss(found, given)
    loss.backward()
    gradient, width = prompt.prompt_PD.grad.clone(), 1e-2
    direction = torch.randn_like(gradient)
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            prompt.prompt_PD += sign * width * direction
            values.append(scorer.loss(found, given)[0].item())
            prompt.prompt_PD -= sign * width * direction
    slope = (values[0] - values[1]) / (2 * width)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=0.02, abs=2e-3)


def test_a_run_learns_and_its_adapter_is_served(tmp_path):
    save_model(tiny_model(MIXTRAL), tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", *rows_of(12))
    plan = TunePlan(
        model=tmp_path / "model",
        data=data,
        dev=data,
        out=tmp_path / "adapters" / "prompt",
        run=tmp_path / "run",
        task=CHOOSE,
        settings=TuneSettings(steps=12, rows=6, eval_every=6, front=3),
    )
    losses = []
    report = run_tune(plan, lambda row: losses.append(row["loss"])).report
    assert sum(losses[-3:]) < sum(losses[:3])
    peft = json.loads((plan.out / "adapter_config.json").read_text())
    assert (peft["task_type"], peft["num_layers"]) == ("CAUSAL_LM", 3)
    assert evaluate_model(plan.model, data, CHOOSE, plan.out).answers == report.answers


# --- commands, servers, PEFT


def test_command_evaluates_a_directory(tmp_path, capsys):
    save_model(tiny_model(LONG), tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", ROWS["zero_shot_inference"])
    command = ["eval-task", str(tmp_path / "model"), str(data), "--task", "zero_shot_inference"]
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["task"], facts["rows"]) == ("zero_shot_inference", 1)
    with pytest.raises(SystemExit, match="0"):
        main(["score", str(tmp_path / "model"), "It is", "--choice", " a", "--choice", " b"])
    assert json.loads(capsys.readouterr().out)["best"] in (0, 1)


@pytest.mark.parametrize("config", [LLAMA, DENSE], ids=["decoder", "encoder"])
def test_a_server_is_asked_the_same(tmp_path, config):
    model = tiny_model(config, seed=6)
    save_model(model, tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", *rows_of(6))
    with tiny_worker(model) as engine, live_server(engine) as url:
        for given in (CHOOSE, LABELLED, WHOLE):
            expected = evaluate_model(tmp_path / "model", data, given)
            assert evaluate_served(url, data, given).answers == expected.answers


@pytest.mark.filterwarnings(OF_PEFT)
def test_peft_opens_what_was_written_and_finds_the_same(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    peft = pytest.importorskip("peft", reason="the oracle")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    twin = transformers.LlamaForCausalLM(config).eval()
    twin.save_pretrained(tmp_path / "llama")
    model = load_any(tmp_path / "llama")
    prompt_PD = torch.randn(4, 32)
    facts = AdapterFacts(slots=Slots(front=4), base_name="llama")
    write_adapter(tmp_path / "prompt", prompt_PD, model.config, facts)
    together = peft.PeftModel.from_pretrained(twin, str(tmp_path / "prompt"))
    source, target = tuple(TOKENIZER.encode("It is")), tuple(TOKENIZER.encode(" good"))
    with torch.no_grad():
        ids = torch.tensor([[*source, *target]])
        logits = together(input_ids=ids).logits[0, 4:]  # PEFT tells those of the vectors as well
        rows = logits[len(source) - 1 : -1].log_softmax(-1)
        scorer = Scorer(model, TOKENIZER, SoftPrompt(prompt_PD, Slots(front=4)))
        (found,) = scorer.target_logprobs(scorer.encode([source]), [0], [target])
    expected = rows.gather(1, torch.tensor(target).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pairs_of_an_example_are_told_in_order():
    words = (((1,), (2,)), ((3,),))
    plain = Example(1, ((9,), (8,)), words)
    assert plain.asked()[2] == ((1, (1,)), (1, (2,)))
    paired = Example(1, ((9,), (8,), (7,)), words, answer=1, is_paired=True)
    assert paired.asked() == [((0, (1,)), (1, (2,))), ((2, (3,)),)]
    assert paired.right == ((7,), (3,))
