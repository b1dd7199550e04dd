"""Tasks through a server: what was tuned is what is served, and what PEFT finds in the twin."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from engine.adapters import Slots
from engine.checkpoint import load_model, save_model
from engine.checkpoint_any import load_any
from engine.prepare import prepare
from server.__main__ import main
from server.keys import hash_key, write_keys
from server.schemas_keys import KeyRecord
from tests.fakes import live_server, tiny_worker
from tests.tiny import MOE, byte_tokenizer, tiny_model
from training.served import Refused, ServedScorer, Server, evaluate_served, read_key
from training.task_eval import evaluate_task
from training.task_examples import read_examples
from training.tasks import parse_task
from training.tune import TuneSettings
from training.tune_files import AdapterFacts, write_adapter
from training.tune_model import join_words
from training.tune_run import TunePlan, evaluate_model, run_tune

TOKENIZER = byte_tokenizer()
KEY = "a-key-of-the-tests-0123456789"
OF_PEFT = "ignore:.is_gradient_checkpointing. is dep:FutureWarning"


def task(name, **changes):
    values = {
        "kind": "choice",
        "template": "{text};",
        "metric": "accuracy",
        "answer": {"column": "label"},
        "labels": {"0": ["no", "nay"], "1": ["yes"]},
    }
    return parse_task(Path(f"{name}.toml"), values | changes)


CHOOSE = task("choose", cut="text", max_input_tokens=9, loss="labels")
WRITE = task(
    "write",
    kind="generate",
    metric="rouge_l",
    answer={"column": "rest"},
    labels={},
    max_tokens=6,
)
RANK = task(
    "rank",
    kind="rank",
    metric="mrr",
    template="{text};{label}",
    answer={"column": "texts", "gains": "gains"},
    labels={"1": ["yes", "ye"]},
    by="mean",
)
FROM_LIST = task("pick", answer={"column": "label", "choices_from": "texts"}, labels={})


def write_rows(path, count=24):
    rows = [
        {
            "text": "ab"[i % 2] * (2 + i % 5) + "xyz"[i % 3],
            "label": i % 2,
            "rest": "mno"[i % 3] + "pq"[i % 2],
            "texts": ["k" * (1 + i % 4), "lm", "n"],
            "gains": [i % 2, 1, 0],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def twin_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
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
    twin = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():  # so large that answers vary
        for name, weight in twin.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.0 if "shared" in name else 0.25)
    return twin


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model of the T5 family, its twin, and prompts that were tuned in front of it."""
    root = tmp_path_factory.mktemp("tuned")
    twin = twin_model()
    twin.save_pretrained(root / "t5")
    model = load_any(root / "t5")
    model.config = replace(model.config, tokenizer="bytes", max_positions=64)
    save_model(model, root / "model")
    rows = write_rows(root / "rows.jsonl")
    reports = {}
    for one in (CHOOSE, WRITE):
        plan = TunePlan(
            model=root / "model",
            data=rows,
            dev=rows,
            out=root / "adapters" / one.name,
            run=root / f"{one.name}.run",
            task=one,
            settings=TuneSettings(steps=16, rows=8, eval_every=8, front=3),
        )
        reports[one.name] = run_tune(plan).report
    return root, twin, reports


def load_served(path):
    """A model as `infmoe serve` readies it: answers come from compiled kernels."""
    model = load_model(path)
    prepare(model)
    assert model.kernels is not None
    return model


class PeftScorer:
    """Asks a model of Hugging Face with the prompt that PEFT put in front of it."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def logits(self, source, answer):
        return self.model(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *answer]])
        ).logits[0]

    def label_scores(self, examples, task):
        found = []
        for example in examples:
            logs = []
            for word in (word for words in example.words for word in words):
                rows = self.logits(example.sources[0], word[:-1]).log_softmax(-1)
                logs.append(rows[torch.arange(len(word)), torch.tensor(word)])
            found.append(join_words(logs, [len(words) for words in example.words], task))
        return found

    def write(self, sources, max_tokens):
        return [TOKENIZER.decode(self.answer(source, max_tokens)) for source in sources]

    def answer(self, source, max_tokens):
        ids = []
        while len(ids) < max_tokens:
            logits = self.logits(source, ids)[-1]
            logits[[0, 2]] = -torch.inf  # padding and the unknown stand for no text
            if (token := int(logits.argmax())) == 1:
                break
            ids.append(token)
        return ids


@pytest.mark.filterwarnings(OF_PEFT)
@pytest.mark.parametrize("one", [CHOOSE, WRITE], ids=["labels", "text"])
def test_a_tuned_prompt_scores_the_same_wherever_it_is_asked(tuned, one):
    peft = pytest.importorskip("peft")
    root, twin, reports = tuned
    model, rows, adapter = root / "model", root / "rows.jsonl", root / "adapters" / one.name
    trained = reports[one.name]
    command = evaluate_model(model, rows, one, adapter, rows=5)
    loaded = load_served(model)
    with tiny_worker(loaded) as worker, live_server(worker, adapters=root / "adapters") as url:
        served = evaluate_served(url, rows, one, one.name, rows=7)
        without = evaluate_served(url, rows, one)
    examples = read_examples(rows, one, TOKENIZER, loaded.config, 3)
    theirs = PeftScorer(peft.PeftModel.from_pretrained(twin, adapter).eval())
    found = evaluate_task(theirs, examples, one)
    assert trained.summary() == command.summary() == served.summary() == found.summary()
    assert trained.answers == command.answers == served.answers == found.answers
    assert len(set(trained.answers)) > 1
    assert without.summary() == evaluate_model(model, rows, one).summary()
    assert without.answers != served.answers


@pytest.mark.parametrize("one", [RANK, FROM_LIST], ids=["ranking", "choices"])
def test_texts_that_are_ranked_and_choices_of_a_row_are_asked_as_well(tmp_path, one):
    save_model(tiny_model(MOE), tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    here = evaluate_model(tmp_path / "model", rows, one)
    loaded = load_served(tmp_path / "model")
    with tiny_worker(loaded) as worker, live_server(worker) as url:
        there = evaluate_served(url, rows, one)
    assert there.summary() == here.summary()
    assert there.answers == here.answers


def test_vectors_in_the_middle_find_their_place_and_leave_less_room(tmp_path):
    one = task("pair", template="{text};{middle}{label}", cut="text")
    save_model(tiny_model(MOE), tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a" * 600, "label": 1}) + "\n", encoding="utf-8")
    slots = Slots(front=1, middle=2, back=1, middle_mark=TOKENIZER.encode(";")[0])
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "all" / "p", vectors, MOE, AdapterFacts(slots=slots, version="7"))
    here = evaluate_model(tmp_path / "model", rows, one, tmp_path / "all" / "p")
    with tiny_worker() as worker, live_server(worker, adapters=tmp_path / "all") as url:
        assert ServedScorer(Server(url), "p@7").longest_text() == 4 * 64 - 4
        there = evaluate_served(url, rows, one, "p@7")
    assert there.answers == here.answers


# --- the command


def test_the_command_asks_a_server_with_a_key(tmp_path, tuned, capsys):
    root, _, reports = tuned
    secrets = tmp_path / "keys.jsonl"
    write_keys(secrets, [KeyRecord(name="a", sha256=hash_key(KEY))])
    file = tmp_path / "key"
    file.write_text(KEY + "\n", encoding="utf-8")
    one = tmp_path / "choose.toml"
    one.write_text(
        'kind = "choice"\ntemplate = "{text};"\nmetric = "accuracy"\ncut = "text"\n'
        'max_input_tokens = 9\nanswer = { column = "label" }\n'
        'labels = { 0 = ["no", "nay"], 1 = ["yes"] }\n',
        encoding="utf-8",
    )
    rows = str(root / "rows.jsonl")
    with (
        tiny_worker(load_model(root / "model")) as worker,
        live_server(worker, adapters=root / "adapters", keys_file=secrets) as url,
    ):
        asked = ["eval-task", rows, "--task", str(one), "--url", url, "--adapter", "choose"]
        with pytest.raises(SystemExit, match="1"):
            main(asked)
        assert "/v1/models: 401:" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="0"):
            main([*asked, "--api-key-file", str(file)])
        told = capsys.readouterr().out.splitlines()
        with pytest.raises(SystemExit, match="1"):
            main([*asked[:-1], "nobody", "--api-key-file", str(file)])
        assert "there is no adapter 'nobody'" in capsys.readouterr().err
    assert told[:-1] == reports["choose"].summary()
    assert json.loads(told[-1])["score"]["value"] == reports["choose"].score.value


@pytest.mark.parametrize(
    "arguments",
    [
        ["model", "rows.jsonl"],
        ["rows.jsonl", "--task", "lcqmc"],
        ["model", "rows.jsonl", "--task", "lcqmc", "--url", "http://localhost:1"],
        ["rows.jsonl", "--task", "lcqmc", "--url", "http://localhost:1", "--dtype", "fp32"],
        ["model", "rows.jsonl", "--task", "lcqmc", "--note-score"],
        ["model", "rows.jsonl", "--task", "lcqmc", "--api-key-file", "key"],
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["eval-task", *arguments])


# --- what goes wrong


class Script(BaseHTTPRequestHandler):
    """Answers with the next of some replies: a status, headers, a body."""

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        status, headers, body = self.server.replies.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def scripted():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}/base/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FULL = (429, {"retry-after": "3"}, b'{"error": {"message": "the queue is full"}}')


def test_a_full_queue_is_waited_for_but_not_for_ever(scripted):
    server, url = scripted
    waits = []
    server.replies = [FULL, (429, {"retry-after": "soon"}, b""), (200, {}, b'{"a": 1}')]
    assert Server(url, wait=waits.append).post("/x", {}) == {"a": 1}
    assert waits == [3, 1]
    server.replies = [FULL] * 200
    with pytest.raises(Refused, match="/base/x: 429: the queue is full"):
        Server(url, wait=waits.append).post("/x", {})
    assert sum(waits) >= 300
    assert server.replies


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'{"error": "no"}'])
def test_what_is_no_infmoe_server_is_named(scripted, body):
    server, url = scripted
    server.replies = [(404, {}, body)]
    with pytest.raises(Refused, match="/base/x: 404: no InfMoE server"):
        Server(url).post("/x", {})


@pytest.mark.parametrize("body", [b"{}", b'{"data": []}', b'{"data": [1]}'])
def test_a_server_that_tells_no_model_is_named(scripted, body):
    server, url = scripted
    server.replies = [(200, {}, body)]
    with pytest.raises(Refused, match="/base/v1/models: tells no model"):
        Server(url).is_decoder_only()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://a:b", "http://"])
def test_addresses_are_checked(url):
    with pytest.raises(Refused, match="write http://HOST:PORT"):
        Server(url)


def test_a_server_that_is_not_there_is_told(scripted):
    server, _ = scripted
    port = server.server_address[1]
    with pytest.raises(Refused, match="does not answer"):
        Server(f"https://127.0.0.1:{port}").post("/x", {})


@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "schlüssel"])
def test_a_file_without_a_key_is_refused(tmp_path, text):
    (tmp_path / "key").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="holds no key"):
        read_key(tmp_path / "key")


def test_rows_that_cannot_be_used_are_told_before_any_question(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    with tiny_worker() as worker, live_server(worker) as url:
        with pytest.raises(ValueError, match=r"line 1: label '0' is unknown; known: 2"):
            evaluate_served(url, rows, task("odd", labels={"2": ["no"], "3": ["yes"]}))
        with pytest.raises(ValueError, match=r"line 1: the text has 5 tokens; the limit is 3"):
            evaluate_served(url, rows, task("long", max_input_tokens=3))


def test_a_word_that_comes_back_otherwise_is_not_spelt(scripted):
    server, url = scripted
    server.replies = [(200, {}, b'{"tokens": [0, 1]}'), (200, {}, b'{"prompt": "sky"}')]
    from training.served import ServedTokens

    with pytest.raises(ValueError, match="the tokenizer cannot spell 'partridge sky'"):
        ServedTokens(Server(url)).spell("partridge sky")
