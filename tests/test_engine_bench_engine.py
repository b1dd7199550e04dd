import json
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from threading import Thread

import pytest
import torch

from engine.bench import decoder_bytes
from engine.bench_engine import (
    Settings,
    even_texts,
    find_obstacles,
    measure_size,
    take_turns,
    uneven_texts,
)
from engine.bench_engine_child import Child, Order, Start, carry_out, serve
from engine.bench_engine_contenders import (
    INVARIANT,
    KINDS,
    Answer,
    BenchJob,
    IdTokenizer,
    Text,
    is_installed,
    serve_static,
)
from engine.bench_engine_model import SIZES, TINY, make_t5, write_t5
from engine.bench_engine_report import Run, compare_tokens, make_row, ratios
from engine.checkpoint_hf import open_huggingface
from engine.checkpoint_hf_t5 import HEAD
from engine.convert import count_parameters
from engine.detokenizer import Detokenizer
from engine.errors import EngineError
from engine.request import Failed, Request
from server.__main__ import main

INSTALLED = [name for name, kind in KINDS.items() if is_installed(kind)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the tiny model."""
    path = tmp_path_factory.mktemp("work")
    write_t5(path / "tiny", TINY)
    return path


def settings(folder, **changes) -> Settings:
    values = {
        "sizes": ("tiny",),
        "batches": (1, 3),
        "source_tokens": 9,
        "decode_tokens": 6,
        "uneven_texts": 5,
        "repeats": 1,
    }
    return Settings(folder=folder, **(values | changes))


def run(contender, case, end_s, *rows, seed=1) -> Run:
    return Run(contender, case, seed, [Answer(list(row), 0.5, end_s) for row in rows])


# models and texts


def test_the_sizes_are_what_they_are_called():
    assert 240e6 < count_parameters(SIZES["mid"])["total"] < 260e6
    assert count_parameters(TINY)["total"] < 1e6


def test_a_model_is_written_once_and_the_same_for_the_same_seed(folder, tmp_path):
    source = open_huggingface(make_t5(folder / "tiny", TINY))
    assert (source.config, source.dtype) == (TINY, torch.bfloat16)
    (tmp_path / "tiny.partial").mkdir()  # of a run that was broken off
    again = open_huggingface(make_t5(tmp_path / "tiny", TINY))
    for (name, one), (_, other) in zip(source.dense(), again.dense(), strict=True):
        assert torch.equal(one, other), name
    head = dict(source.dense())[HEAD]
    assert not head[TINY.pad_token_id].any()
    assert head[TINY.pad_token_id + 1].any()


def test_another_model_in_the_folder_is_refused(folder):
    with pytest.raises(ValueError, match="tiny: is another model than the one to measure"):
        make_t5(folder / "tiny", replace(TINY, d_ff=64))


def test_texts_are_the_same_for_the_same_seed(folder):
    given = settings(folder)
    assert even_texts(given, TINY, 3, 1) == even_texts(given, TINY, 3, 1)
    assert even_texts(given, TINY, 3, 1) != even_texts(given, TINY, 3, 2)
    texts = uneven_texts(given, TINY, 2.0, 1)
    assert texts == uneven_texts(given, TINY, 2.0, 1)
    arrivals = [text.arrives_s for text in texts]
    assert arrivals[0] == 0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(2)
    assert len({len(text.ids) for text in texts}) > 1
    assert len({text.num_tokens for text in texts}) > 1
    assert all(2 <= len(text.ids) <= 18 and 2 <= text.num_tokens <= 12 for text in texts)


def test_ids_are_spelled_as_numbers():
    tokenizer = IdTokenizer(50)
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, [7, 49])) == tokenizer.decode([7, 49]) == "7 49 "
    assert tokenizer.encode("7 49") == [7, 49]
    assert tokenizer.sentinel_index(7) is None
    with pytest.raises(ValueError, match="there is no sentinel 0"):
        tokenizer.sentinel_id(0)


# contenders


@pytest.mark.parametrize("name", [name for name in INSTALLED if name.endswith("fp32")])
def test_all_make_the_tokens_of_ours(folder, name):
    ours, other = (KINDS[each].open(folder / "tiny", torch.float32) for each in ("ours-fp32", name))
    texts = uneven_texts(settings(folder), TINY, 0.0, 3)
    expected = ours.generate(texts)
    assert [len(answer.tokens) for answer in expected] == [text.num_tokens for text in texts]
    assert TINY.pad_token_id not in {token for answer in expected for token in answer.tokens}
    answers = other.generate(texts)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert all(0 < answer.first_s < answer.end_s for answer in answers)


def test_ours_waits_for_texts_that_come_later(folder):
    ours = KINDS["ours-fp32"].open(folder / "tiny", torch.float32)
    text = Text((5, 6, 7), 2)
    first, later = ours.generate([text, text._replace(arrives_s=0.2)])
    assert first.tokens == later.tokens
    assert later.first_s > 0.2


def test_a_failure_in_the_engine_ends_the_benchmark():
    job = BenchJob(Request(request_id="text-3", encoder_ids=(5,)), 0.0)
    assert not job.is_cancelled()
    with pytest.raises(EngineError, match="text-3: no memory"):
        job.take(Failed("no memory"))


def test_static_batches_take_those_that_have_come_in_order():
    batches = []

    class Echo:
        def generate(self, texts):
            batches.append([text.ids[0] for text in texts])
            return [Answer([*text.ids], 0.1, 0.2) for text in texts]

    arrivals = [0.0, 0.0, 0.0, 0.05, 60.0]
    texts = [Text((number,), 1, arrival) for number, arrival in enumerate(arrivals)]
    answers = serve_static(Echo(), texts[:4], 2)
    assert batches in ([[0, 1], [2], [3]], [[0, 1], [2, 3]])  # a slow machine is late
    assert [answer.tokens for answer in answers] == [[0], [1], [2], [3]]
    assert answers[0].first_s >= 0.1
    assert answers[3].end_s >= 0.25


@contextmanager
def child_in_a_thread(start):
    """A child without the process; it is loaded."""
    ours, theirs = Pipe()
    thread = Thread(target=serve, args=(theirs,), daemon=True)
    thread.start()
    with ours:
        child = Child(start.name, ours)
        child.load(start)
        yield child
    thread.join(300)
    assert not thread.is_alive()


def test_a_child_answers_as_the_contender_does(folder):
    texts = uneven_texts(settings(folder), TINY, 0.0, 3)
    ours = KINDS["ours-fp32"].open(folder / "tiny", torch.float32)
    with child_in_a_thread(Start("ours-fp32", folder / "tiny", 1)) as child:
        assert child.loaded.decoder_bytes == decoder_bytes(ours.model)
        answers = child.generate(texts)
        assert [a.tokens for a in answers] == [a.tokens for a in ours.generate(texts)]
        assert child.measure_adapters(texts, 1)["rows"] == len(texts)


def test_a_contender_that_fails_is_told(folder, tmp_path):
    with (
        pytest.raises(EngineError, match=r"ours-bf16: .*nothing"),
        child_in_a_thread(Start("ours-bf16", tmp_path / "nothing", 1)),
    ):
        pass
    with (
        child_in_a_thread(Start("ours-fp32", folder / "tiny", 1)) as child,
        pytest.raises(EngineError, match="ours-fp32: max_tokens is 0; it must be at least 1"),
    ):
        child.generate([Text((5,), 0)])


def test_a_process_that_ends_is_told():
    ours, theirs = Pipe()
    theirs.close()
    with ours, pytest.raises(EngineError, match="ours-fp32: its process ended; out of memory"):
        Child("ours-fp32", ours).generate([Text((5,), 1)])


def test_static_batches_are_for_others():
    class Echo:
        def generate(self, texts):
            return [Answer([len(texts)], 0.1, 0.2) for _ in texts]

    texts = [Text((number,), 1) for number in range(4)]
    assert [a.tokens for a in carry_out(Echo(), Order(texts))] == [[4]] * 4
    assert [a.tokens for a in carry_out(Echo(), Order(texts, 3))] == [[3]] * 3 + [[1]]


def test_another_contender_begins_each_round():
    said = []
    work = {name: lambda name=name: said.append(name) or [] for name in ("a", "b", "c")}
    runs = [take_turns(work, "1", seed) for seed in (0, 1)]
    assert said == ["a", "b", "c", "b", "c", "a"]
    assert [run.contender for run in runs[1]] == ["b", "c", "a"]


# the report


def test_rates_count_what_was_made():
    measured = run("ours-bf16", "3", 2.5, [1, 2, 3], [4, 5, 6])
    assert measured.tokens_per_s == 6 / 2.5
    assert measured.decode_tokens_per_s == 4 / 2.0
    assert measured.first_ms == 500
    row = make_row("ours-bf16", None, [measured, run("transformers-bf16", "3", 1.0, [1])])
    assert row["3"]["decode_tokens_per_s"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert make_row("ours-fp32", "skipped", [measured]) == {"note": "skipped"}
    uneven = make_row("ours-bf16", None, [measured._replace(case="uneven")])["uneven"]
    assert list(uneven) == ["tokens_per_s"]


def test_tokens_are_compared_with_ours_of_the_same_type():
    runs = [
        run("ours-fp32", "1", 1.0, [1, 2, 3], [4, 5]),
        run("transformers-fp32", "1", 1.0, [1, 2, 3], [4, 5]),
        run("ctranslate2-fp32", "1", 1.0, [1, 2, 3], [4, 6]),
        run("transformers-bf16", "1", 1.0, [9]),
    ]
    assert compare_tokens(runs) == {
        "transformers-fp32": {"texts": 2, "equal": 2, "first_difference": None},
        "ctranslate2-fp32": {
            "texts": 2,
            "equal": 1,
            "first_difference": {"case": "1", "seed": 1, "text": 1, "token": 1},
        },
    }


def test_ratios_are_of_medians_of_the_same_type():
    runs = [run("ours-fp32", "1", end_s, [1, 2]) for end_s in (1.0, 2.0, 9.0)]
    runs += [run("ctranslate2-fp32", "1", 1.0, [1, 2]), run("transformers-bf16", "1", 1.0, [1])]
    assert ratios(runs) == {"1 ours_over_ctranslate2-fp32": 0.5}


def test_a_missing_package_is_told(folder):
    missing = KINDS["ctranslate2-fp32"]._replace(package="no_such_package")
    assert find_obstacles(settings(folder), {"ctranslate2-fp32": missing}) == {
        "ctranslate2-fp32": "not installed: no_such_package; pip install no_such_package"
    }


def test_what_is_skipped_is_told(folder):
    given = settings(folder, skip=[name for name in KINDS if name != "ours-fp32"])
    report = measure_size(given, "tiny")
    assert report["rows"]["transformers-bf16"] == {"note": "skipped"}
    assert "adapters" not in report
    assert find_obstacles(settings(folder))[INVARIANT] == "not asked for: --invariant"
    assert INVARIANT not in find_obstacles(settings(folder, invariant=True))
    assert report["rows"]["ours-fp32"]["3"]["tokens_per_s"]["min"] > 0
    assert report["tokens_equal"] == report["ratios"] == {}
    assert "share_of_memory_limit" not in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ("huge",)}, "'huge' is unknown; known: tiny, mid"),
        ({"skip": ("vllm",)}, "'vllm' is unknown; known: ours-bf16, "),
        ({"batches": (1, 33)}, "are not within 1 to 32"),
    ],
)
def test_wrong_settings_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(folder, **changes)


def test_all_together(capsys, folder):
    lengths = ["--source-tokens", "8", "--decode-tokens", "4"]
    more = ["--invariant", "--adapters", "3", "--skip", "ours-fp32", "--skip", "transformers-fp32"]
    with pytest.raises(SystemExit) as caught:
        main(["bench-engine", "--work", str(folder), "--size", "tiny", *lengths, *more])
    out, err = capsys.readouterr()
    assert not caught.value.code
    report = json.loads(out.splitlines()[-1])
    tiny = report["models"]["tiny"]
    assert "tiny: round 5 of 5" in err
    assert (report["repeats"], report["static_rows"]) == (5, 8)
    present = [name for name in INSTALLED if name not in more]
    for name, row in tiny["rows"].items():
        assert (row["note"] == "") == (name in present)
        for case in ("1", "8", "32") if name in present else ():
            assert row[case]["tokens_per_s"]["min"] > 0
            assert row[case]["first_token_ms"]["median"] > 0
    assert tiny["rows"]["ours-bf16"]["uneven"]["tokens_per_s"]["median"] > 0
    assert tiny["share_of_memory_limit"]["max"] > 0
    assert tiny["ratios"]["8 ours_over_invariant-bf16"] > 0
    assert tiny["adapters"]["each_its_own_over_one"] > 0
    if "transformers-bf16" in present:
        assert tiny["tokens_equal"]["transformers-bf16"]["texts"] == 6 * (1 + 8 + 32 + 32)
        assert tiny["ratios"]["uneven ours_over_transformers-bf16"] > 0
