"""Clients that people use, unchanged, against a real server of the demo model.

They are an extra (`pip install -e ".[clients]"`; for JavaScript `npm install openai` in the folder
that NODE_PATH names); what is not installed is skipped by name.
"""

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

from tests.waiting import wait_for

pytestmark = pytest.mark.clients

ROOT = Path(__file__).parent.parent
MODEL = "demo"
KEY = "sk-clients-test-0123456789abcdef"
GREETING = re.compile(r"listening on (http://\S+);")


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-m", "server", "serve", "models/demo", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--log-level", "error"],
        cwd=ROOT,
        env={**os.environ, "INFMOE_API_KEY": KEY},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = next(found[1] for line in process.stderr if (found := GREETING.search(line)))
        wait_for(lambda: is_ready(url))
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=300)


def is_ready(url):
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=300):
            return True
    except urllib.error.HTTPError as error:  # 503 until the model is loaded
        error.close()
        return False


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_openai_completion(client):
    reply = client.completions.create(model=MODEL, prompt="In the beginning", max_tokens=5)
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_openai_stream_adds_up_to_the_whole(client):
    asked = {"model": MODEL, "prompt": "人工智能", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_openai_raw_response_and_errors(client):
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="a", max_tokens=1)
    assert raw.headers["x-request-id"]
    assert raw.parse().choices
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="none", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()


def test_openai_retries_are_not_needed_for_a_good_request(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY) as client:
        assert [model.id for model in client.models.list()][0] == MODEL
        assert client.models.retrieve(MODEL).id == MODEL


def test_openai_chat(client):
    asked = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert isinstance(message.content, str)
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_openai_embeddings_in_both_encodings_agree(client):
    asked = {"model": MODEL, "input": ["one text", "另一个"]}
    packed = client.embeddings.create(**asked)  # base64, which the client asks for by itself
    plain = client.embeddings.create(**asked, encoding_format="float")
    assert len(packed.data) == 2
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)


def test_openai_structured_output(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Is water wet?"}],
        max_tokens=40,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": schema, "strict": True},
        },
    )
    assert isinstance(json.loads(reply.choices[0].message.content)["ok"], bool)


def test_openai_async_many_at_once(server):
    async def scenario():
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key=KEY) as client:
            asked = [
                client.completions.create(model=MODEL, prompt=f"Text {i}", max_tokens=4, seed=i)
                for i in range(20)
            ]
            replies = await asyncio.gather(*asked)
            stream = await client.completions.create(
                model=MODEL, prompt="One", max_tokens=4, stream=True
            )
            return replies, [chunk async for chunk in stream]

    replies, chunks = asyncio.run(asyncio.wait_for(scenario(), 300))
    assert len({reply.id for reply in replies}) == 20
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL + "/v1", apiKey: process.env.KEY });
const asked = { model: "demo", prompt: "Once", max_tokens: 6, temperature: 0 };
const whole = await client.completions.create(asked);
let text = "";
for await (const chunk of await client.completions.create({ ...asked, stream: true }))
  text += chunk.choices[0]?.text ?? "";
const chat = await client.chat.completions.create({
  model: "demo", messages: [{ role: "user", content: "Hi" }], max_completion_tokens: 3 });
const vectors = await client.embeddings.create({ model: "demo", input: "x" });
let code = "";
try { await client.completions.create({ ...asked, model: "none" }); }
catch (error) { code = error.status + " " + error.code; }
console.log(JSON.stringify({ same: text === whole.choices[0].text, code,
  content: typeof chat.choices[0].message.content, width: vectors.data[0].embedding.length }));
"""


def test_openai_node(server, tmp_path):
    folder = Path(os.environ.get("NODE_PATH", ""))
    if not shutil.which("node") or not (folder / "openai").is_dir():
        pytest.skip("needs node, and the openai package in the folder that NODE_PATH names")
    (tmp_path / "node_modules").symlink_to(folder.resolve())
    script = tmp_path / "script.mjs"
    script.write_text(NODE, encoding="utf-8")
    environment = {**os.environ, "URL": server, "KEY": KEY}
    result = subprocess.run(
        ["node", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=environment,
    )
    told = json.loads(result.stdout)
    assert told.pop("width") > 1
    assert told == {"same": True, "code": "404 model_not_found", "content": "string"}


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai")
    common = {"base_url": f"{server}/v1", "api_key": KEY, "model": MODEL}
    texts = langchain.OpenAI(**common, max_tokens=4, temperature=0)
    answers = texts.batch([f"Text {i}" for i in range(25)])  # more than one call of 20 prompts
    assert len(answers) == 25
    assert "".join(texts.stream("Text 3")) == answers[3]
    chat = langchain.ChatOpenAI(**common, max_tokens=4)
    assert isinstance(chat.invoke("Hello").content, str)
    assert isinstance("".join(chunk.content for chunk in chat.stream("Hello")), str)
    vectors = langchain.OpenAIEmbeddings(**common, check_embedding_ctx_length=False)
    assert len(vectors.embed_documents(["a", "b"])) == 2


def test_llm_command(server, tmp_path):
    pytest.importorskip("llm")
    models = f"""
- model_id: ours
  model_name: {MODEL}
  api_base: {server}/v1
  api_key_name: ours
  completion: true
- model_id: ours-chat
  model_name: {MODEL}
  api_base: {server}/v1
  api_key_name: ours
"""
    (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
    (tmp_path / "keys.json").write_text(json.dumps({"ours": KEY}), encoding="utf-8")
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    for model in ("ours", "ours-chat"):
        for flags in ([], ["--no-stream"]):
            result = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "llm",
                    "-m",
                    model,
                    "Hello",
                    "-o",
                    "max_tokens",
                    "5",
                    *flags,
                ],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
                env=environment,
            )
            assert result.returncode == 0, result.stderr


def instances(kind, arguments):
    harness = pytest.importorskip("lm_eval.api.instance")
    return [
        harness.Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


@pytest.fixture
def harness_model(server, monkeypatch):
    models = pytest.importorskip("lm_eval.models.openai_completions")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return models.LocalCompletionsAPI(
        base_url=f"{server}/v1/completions", model=MODEL, auth_token=KEY, batch_size=4
    )


def test_lm_eval_generates(harness_model):
    asked = instances(
        "generate_until",
        [("The sea", {"until": ["\n", "."], "max_gen_toks": 6}), ("A", {"until": ["b"]})],
    )
    answers = harness_model.generate_until(asked)
    assert len(answers) == 2
    assert "." not in answers[0]


def test_lm_eval_scores_what_our_own_route_scores(harness_model, server):
    pairs = [("The sea was", " calm"), ("The sea was", " a house"), ("天气", "很好")]
    found = harness_model.loglikelihood(instances("loglikelihood", pairs))
    assert [len(pair) for pair in found] == [2, 2, 2]
    assert all(math.isfinite(logprob) and logprob < 0 for logprob, _ in found)


def test_our_harness_model_scores_through_the_encoder(server):
    pytest.importorskip("lm_eval")
    from server.harness import InfmoeModel

    model = InfmoeModel(base_url=server, api_key=KEY)
    pairs = [("The sea was", " calm"), ("The sea was", " a house")]
    found = model.loglikelihood(instances("loglikelihood", pairs))
    with urllib.request.urlopen(
        urllib.request.Request(
            f"{server}/v1/score",
            json.dumps({"context": "The sea was", "continuations": [" calm", " a house"]}).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {KEY}"},
        ),
        timeout=300,
    ) as reply:
        told = json.load(reply)["data"][0]["scores"]
    assert [logprob for logprob, _ in found] == [score["logprob"] for score in told]
    answers = model.generate_until(
        instances("generate_until", [("The sea", {"until": ["."], "max_gen_toks": 4})])
    )
    assert "." not in answers[0]


def test_guidellm(server, tmp_path):
    pytest.importorskip("guidellm")
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(
        tmp_path / "words"
    )
    texts = tmp_path / "prompts.jsonl"
    texts.write_text(
        "".join(json.dumps({"prompt": f"This is text {i}"}) + "\n" for i in range(8)), "utf-8"
    )
    target = tmp_path / "report.json"
    command = [sys.executable, "-m", "guidellm", "benchmark", "--target", server]
    result = subprocess.run(
        [
            *command,
            *("--model", MODEL, "--data", str(texts), "--processor", str(tmp_path / "words")),
            *("--rate-type", "synchronous", "--max-requests", "6"),
            *("--disable-progress", "--output-path", str(target)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "GUIDELLM__OPENAI__API_KEY": KEY,
            "GUIDELLM__OPENAI__MAX_OUTPUT_TOKENS": "8",  # else 16384, more than this model may
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(target.read_text(encoding="utf-8"))
    totals = report["benchmarks"][0]["request_totals"]
    assert totals["successful"] >= 1
    assert totals["errored"] == 0


def test_curl(server):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    common = ["curl", "-sS", f"{server}/v1/completions", "-H", f"Authorization: Bearer {KEY}"]
    common += ["-H", "content-type: application/json", "-d"]
    good = subprocess.run(
        [*common, '{"prompt": "Hi", "max_tokens": 3, "stream": true}', "-N"],
        capture_output=True,
        timeout=300,
        check=True,
    )
    assert good.stdout.endswith(b"data: [DONE]\n\n")
    bad = subprocess.run([*common, "{"], capture_output=True, timeout=300, check=True)
    assert json.loads(bad.stdout)["error"]["code"] == "invalid_json"
