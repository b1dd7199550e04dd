"""The demo model as users meet it: served by the command, called by an unmodified client."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

from engine.convert import load_any
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from engine.tokenizer import open_tokenizer
from server.__main__ import main
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"


@contextlib.contextmanager
def serving(*options):
    """A server process on a free port, and what it has logged at the end; drained, or killed."""
    command = [sys.executable, "-m", "server", "serve", str(DEMO), "--port", "0", *options]
    log = []
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            greeting = process.stderr.readline()
            url = re.search(r"http://127\.0\.0\.1:\d+", greeting).group()
            wait_for(lambda: is_ready(url))
            yield url, log
            process.send_signal(signal.SIGTERM)
            log.append(process.communicate(timeout=300)[1])
        finally:
            process.kill()
    assert process.returncode == 0, log


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health/ready", timeout=300):
            return True
    except urllib.error.HTTPError as error:  # 503 until the model is loaded
        error.close()
        return False


@pytest.fixture(scope="module")
def demo_url():
    with serving() as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(demo_url):
    with openai.OpenAI(base_url=demo_url + "/v1", api_key="unused") as opened:
        yield opened


def plain(prompt: str, *, fill: bool = False, **params) -> str:
    """The text that the library gives for the same request."""
    model = load_any(DEMO)
    tokenizer = open_tokenizer(DEMO, model.config.tokenizer)
    sampling = SamplingParams(**params)
    request = build_request(prompt, tokenizer, model.config, sampling, "t", fill=fill)
    pieces = [e for e in generate(model, tokenizer, request) if isinstance(e, Piece)]
    return "".join(p.text for p in pieces)


PROMPTS = ["The President of the United States", "中国人民"]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_client_gets_what_the_library_gives(client, prompt):
    reply = client.completions.create(model="demo", prompt=prompt, max_tokens=16, temperature=0)
    assert reply.choices[0].text == plain(prompt, max_tokens=16)
    assert reply.usage.completion_tokens <= 16
    chunks = client.completions.create(
        model="demo", prompt=prompt, max_tokens=16, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in chunks) == reply.choices[0].text


@pytest.mark.slow
def test_a_seed_repeats_a_sampled_text(client):
    options = {"model": "demo", "prompt": "And God said", "max_tokens": 24, "temperature": 1.0}
    first, second = (client.completions.create(seed=7, **options).choices[0].text for _ in "ab")
    assert first == second
    assert len(first) > 10


@pytest.mark.slow
def test_blanks_are_filled_over_http(client):
    reply = client.completions.create(
        model="demo",
        prompt="In the <span> God created the <span> and the earth.",
        max_tokens=24,
        temperature=0,
        extra_body={"fill": True},
    )
    assert len(reply.choices[0].model_extra["spans"]) == 2
    assert all(span.strip() for span in reply.choices[0].model_extra["spans"])


@pytest.mark.slow
def test_models_and_metrics_name_the_demo(demo_url, client):
    assert [model.id for model in client.models.list()] == ["demo"]
    with urllib.request.urlopen(demo_url + "/metrics", timeout=300) as reply:
        assert b"infmoe_" in reply.read()


@pytest.mark.slow
def test_mistakes_come_back_as_openai_errors(client):
    with pytest.raises(openai.NotFoundError, match="model"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="x", temperature=9)
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model="demo", prompt="")


def test_the_demo_is_a_small_mixture_of_experts(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", str(DEMO), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["num_experts"] >= 4
    assert facts["config"]["router"] == "cpm_2"
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 16_000_000


def least_memory() -> int:
    """The least budget that a server of the demo names when it is given too little."""
    command = [sys.executable, "-m", "server", "serve", str(DEMO), "--port", "0"]
    refused = subprocess.run(
        [*command, "--memory", "1MB"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    return int(re.search(r"give (\d+) bytes or more", refused.stderr)[1])


@pytest.mark.slow
def test_the_demo_serves_the_same_text_within_some_of_its_experts():
    """Room for 11 experts more than the least, give or take what a process takes more or less."""
    with serving("--memory", str(least_memory() + 3 * 2**20)) as (url, log):
        with openai.OpenAI(base_url=url + "/v1", api_key="unused") as opened:
            reply = opened.completions.create(
                model="demo", prompt=PROMPTS[0], max_tokens=16, temperature=0
            )
        with urllib.request.urlopen(url + "/metrics", timeout=300) as metrics:
            text = metrics.read().decode()
        with urllib.request.urlopen(url + "/v1/info", timeout=300) as info:
            facts = json.load(info)
    assert reply.choices[0].text == plain(PROMPTS[0], max_tokens=16)
    slots = int(re.search(r"; (\d+) slots for 24 experts", log[0])[1])
    assert 2 <= slots < 24
    assert float(re.search(r"^infmoe_expert_misses_total (\S+)$", text, re.M)[1]) > 0
    assert facts["plan"]["planned_bytes"]["host"] <= facts["plan"]["budget_bytes"]["host"]
    part = r'^infmoe_plan_bytes\{part="expert_slots"\} (\S+)$'
    assert float(re.search(part, text, re.M)[1]) == slots * facts["plan"]["slot_bytes"]
