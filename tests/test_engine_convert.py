import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from engine.checkpoint import load_model, save_model
from engine.config import CPM2_11B, CPM2_MOE_198B
from engine.convert import convert, count_parameters, detect_kind, inspect, load_any, open_source
from engine.errors import CheckpointError, ConfigError
from engine.model.initial import num_parameters
from tests.cpm2_files import TINY, tiny_model, write_rank_files, write_vocabulary

ROOT = Path(__file__).parents[1]
MOE = dataclasses.replace(TINY, num_experts=4)


@pytest.fixture
def moe_files(tmp_path):
    """A CPM-2-MoE checkpoint of 4 experts by 2 ranks."""
    write_rank_files(tiny_model(MOE).half(), tmp_path / "cpm2", 2, by_expert=True)
    return tmp_path / "cpm2"


@pytest.fixture
def t5_files(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 4,
    }
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").write_bytes(b"pieces")
    return tmp_path / "t5"


def pickled(directory):
    from safetensors.torch import load_file

    path = directory / "model.safetensors"
    torch.save(load_file(path), directory / "pytorch_model.bin")
    path.unlink()
    return directory


def assert_same(model, expected):
    assert model.config == expected.config
    assert model.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
def test_cpm2(tmp_path, config):
    model = tiny_model(config).half()
    write_rank_files(model, tmp_path / "cpm2", 2, by_expert=config is MOE)
    convert(tmp_path / "cpm2", tmp_path / "out")
    assert_same(load_model(tmp_path / "out"), model)
    assert (tmp_path / "out" / "vocab.txt").exists()
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / "conversion.json").exists()
    convert(tmp_path / "cpm2", tmp_path / "wide", torch.float32)
    assert_same(load_model(tmp_path / "wide"), model.float())


def test_hugging_face(t5_files, tmp_path):
    expected = load_any(t5_files)
    convert(t5_files, tmp_path / "out")
    assert_same(load_any(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "spiece.model").read_bytes() == b"pieces"
    convert(pickled(t5_files), tmp_path / "from-pickle", torch.bfloat16)
    assert_same(load_any(tmp_path / "from-pickle", torch.bfloat16), expected.bfloat16())


def test_a_tokenizer_that_cannot_be_opened_later_is_warned_of(t5_files, tmp_path, caplog):
    (t5_files / "spiece.model").unlink()
    assert (t5_files / "generation_config.json").exists()  # travels along, but is no vocabulary
    with caplog.at_level(logging.WARNING):
        convert(t5_files, tmp_path / "out")
    assert "without spiece.model the result takes ids only" in caplog.text


def test_native_to_another_dtype(tmp_path, caplog):
    model = tiny_model(MOE)
    save_model(model, tmp_path / "in")
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "in", tmp_path / "out", torch.bfloat16)
    assert "has no tokenizer files" in caplog.text
    assert_same(load_any(tmp_path / "out"), model.bfloat16())


def test_pickles_are_not_served_as_they_are(moe_files, t5_files):
    with pytest.raises(CheckpointError, match="cpm2: holds pickles; run `infmoe convert` on it"):
        load_any(moe_files)
    with pytest.raises(CheckpointError, match="pickles only; run `infmoe convert` on it"):
        load_any(pickled(t5_files))


def test_prompt_is_left_out_with_a_warning(tmp_path, caplog):
    def change(rank, state):
        state["encoder.prompt_embeds.weight"] = torch.ones(3, 32)

    write_rank_files(tiny_model(), tmp_path / "cpm2", 1, change=change)
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "cpm2", tmp_path / "out")
    assert "soft prompt stored with the model is left out" in caplog.text
    assert_same(load_any(tmp_path / "out"), tiny_model())


def test_vocabulary_from_elsewhere(moe_files, tmp_path):
    (moe_files / "vocab.txt").unlink()
    vocabulary = tmp_path / "mine.txt"
    write_vocabulary(vocabulary, 96, bilingual=True)
    convert(moe_files, tmp_path / "out", vocab=vocabulary)
    assert load_any(tmp_path / "out").config.tokenizer == "cpm2_zh_en"
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == vocabulary.read_bytes()


def test_vocabulary_where_none_is_needed(t5_files, tmp_path):
    with pytest.raises(CheckpointError, match="has no rank files of CPM; a vocabulary is not"):
        convert(t5_files, tmp_path / "out", vocab=tmp_path / "vocab.txt")


def test_cpm2_without_a_vocabulary_is_inspected_but_not_converted(tmp_path):
    small = dataclasses.replace(TINY, vocab_size=26240, d_model=8, num_heads=2, d_ff=8)
    write_rank_files(tiny_model(small), tmp_path / "cpm2", 1)
    (tmp_path / "cpm2" / "vocab.txt").unlink()
    assert inspect(tmp_path / "cpm2")["tokenizer_files"] == []
    with pytest.raises(CheckpointError, match=r"vocab\.txt is missing; put it there, or name it"):
        convert(tmp_path / "cpm2", tmp_path / "out")


def test_progress(moe_files, tmp_path):
    steps = []
    convert(moe_files, tmp_path / "out", progress=steps.append)
    assert [step.item for step in steps[-4:]] == [f"experts of {n}" for n in MOE.moe_layers()]
    done = [step.done_bytes for step in steps]
    assert done == sorted(done)
    assert {step.total_bytes for step in steps} == {done[-1]}
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert done[-1] <= stored


# Interrupted conversions


def interrupt_after(item):
    def progress(step):
        if step.item == item:
            raise KeyboardInterrupt

    return progress


def inodes(directory):
    return {path.name: path.stat().st_ino for path in directory.glob("experts-*")}


def test_interrupted_conversion_goes_on(moe_files, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        convert(moe_files, out, progress=interrupt_after("experts of encoder-1"))
    assert not out.exists()
    first = inodes(partial)
    assert sorted(first) == ["experts-encoder-0.safetensors", "experts-encoder-1.safetensors"]
    convert(moe_files, out)
    assert first.items() <= inodes(out).items()  # kept, not written again
    assert_same(load_any(out), tiny_model(MOE).half())


@pytest.mark.parametrize("change", ["source", "dtype", "vocabulary", "quantization"])
def test_interrupted_conversion_starts_over_if_anything_changed(moe_files, tmp_path, change):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(
            moe_files,
            out,
            progress=interrupt_after("experts of decoder-0"),
            quantization="int8" if change == "quantization" else "none",
        )
    model, dtype = tiny_model(MOE).half(), None
    if change == "source":
        shutil.rmtree(moe_files)
        model = tiny_model(MOE, seed=1).half()
        write_rank_files(model, moe_files, 2, by_expert=True)
    elif change == "dtype":
        model, dtype = model.bfloat16(), torch.bfloat16
    elif change == "vocabulary":
        os.utime(moe_files / "vocab.txt", (1, 1))
    convert(moe_files, out, dtype)
    assert_same(load_any(out), model)


@pytest.mark.parametrize("name", ["spiece.model", "model.safetensors"])
def test_files_that_change_while_they_are_read(t5_files, tmp_path, name):
    def change(_):
        os.utime(t5_files / name, (1, 1))

    with pytest.raises(CheckpointError, match="its files changed while they were read; run it ag"):
        convert(t5_files, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()
    convert(t5_files, tmp_path / "out")
    assert_same(load_any(tmp_path / "out"), load_any(t5_files))


def test_a_file_that_has_gone_when_it_is_compared(t5_files, tmp_path):
    with pytest.raises(CheckpointError, match=r"spiece\.model: cannot be read: No such file"):
        convert(t5_files, tmp_path / "out", progress=lambda _: remove(t5_files / "spiece.model"))


def remove(path):
    path.unlink(missing_ok=True)


KILLED = """
import os, sys
from pathlib import Path
import engine.checkpoint_cpm2 as cpm2
from engine.convert import convert

class Dying(cpm2.Cpm2Source):
    def experts(self, layer):
        for expert, tensors in enumerate(super().experts(layer)):
            if (layer, expert) == ("decoder-0", 2):
                os._exit(9)
            yield tensors

cpm2.Cpm2Source = Dying
convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_conversion_goes_on(moe_files, tmp_path):
    """The process dies in the middle of an expert file, so nothing of it cleans up."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", KILLED, str(moe_files), str(out)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert (partial / "experts-decoder-0.safetensors.partial").exists()
    with pytest.raises(CheckpointError, match=r"out\.partial is an unfinished conversion: run it"):
        load_any(out)
    first = inodes(partial)
    convert(moe_files, out)
    kept = [name for name, inode in inodes(out).items() if first.get(name) == inode]
    assert sorted(kept) == ["experts-encoder-0.safetensors", "experts-encoder-1.safetensors"]
    assert_same(load_any(out), tiny_model(MOE).half())
    assert list(out.glob("*.partial")) == []


def test_conversion_killed_while_it_reaches_the_disk_goes_on(moe_files, tmp_path, monkeypatch):
    """All is written but not yet in place: hundreds of gigabytes are not to be written again."""
    out, fsync = tmp_path / "out", os.fsync

    def killed_at_the_end(handle):
        if Path(f"/proc/self/fd/{handle}").readlink() == tmp_path / "out.partial" / "config.json":
            raise KeyboardInterrupt
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            convert(moe_files, out)
    first = inodes(tmp_path / "out.partial")
    assert len(first) == 4
    convert(moe_files, out)
    assert inodes(out) == first
    assert_same(load_any(out), tiny_model(MOE).half())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_interrupted_quantisation_goes_on(tmp_path, kind):
    config = dataclasses.replace(MOE, d_ff=64)
    write_rank_files(tiny_model(config).half(), tmp_path / "cpm2", 2, by_expert=True)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(
            tmp_path / "cpm2",
            out,
            progress=interrupt_after("experts of encoder-1"),
            quantization=kind,
        )
    first = inodes(tmp_path / "out.partial")
    assert len(first) == 2
    steps = []
    convert(tmp_path / "cpm2", out, progress=steps.append, quantization=kind)
    assert first.items() <= inodes(out).items()
    assert steps[-1].done_bytes == steps[-1].total_bytes
    convert(tmp_path / "cpm2", tmp_path / "whole", quantization=kind)
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path.name
    assert inspect(out)["experts"]["quantization"] == kind


SECOND = """
import sys
from pathlib import Path
from engine.convert import convert
from engine.errors import CheckpointError, ConfigError
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
except CheckpointError as error:
    print(error)
"""


def test_a_second_conversion_into_the_same_directory_is_refused(moe_files, tmp_path):
    out = tmp_path / "out"
    told = []

    def start_another(step):
        if step.item in ("embedding.weight", "experts of encoder-1"):
            command = [sys.executable, "-c", SECOND, str(moe_files), str(out)]
            second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            told.append(second.stdout)

    convert(moe_files, out, progress=start_another)
    assert (
        told
        == [
            f"{out}.partial: is being written by another conversion; wait for its end, or choose "
            "another directory\n"
        ]
        * 2
    )
    assert_same(load_any(out), tiny_model(MOE).half())
    assert sorted(path.name for path in out.iterdir() if "expert" not in path.name) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


FULL_DISK = """
import resource, sys
from pathlib import Path
from engine.convert import convert
from engine.errors import CheckpointError, ConfigError

def fill(step):
    if step.item == sys.argv[3]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))

try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=fill)
except CheckpointError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize(
    ("when", "named", "kept"),
    [
        ("embedding.weight", r"model\.safetensors", 0),
        ("experts of encoder-1", r"experts-decoder-0\.safetensors", 2),
    ],
)
def test_a_full_disk_leaves_nothing_that_loads_and_the_next_run_goes_on(
    moe_files, tmp_path, when, named, kept
):
    """A limit on the size of files fails in the middle of one, as a full disk does."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", FULL_DISK, str(moe_files), str(out), when]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(rf"^refused: \S*{named}: cannot be written: File too large$", run.stderr, re.M)
    for path in (out, partial):
        with pytest.raises(CheckpointError):
            load_any(path)
    first = inodes(partial)
    assert len(first) == kept
    convert(moe_files, out)
    assert first.items() <= inodes(out).items()
    assert_same(load_any(out), tiny_model(MOE).half())


def test_interrupted_conversion_goes_on_from_another_folder(moe_files, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        convert(moe_files, tmp_path / "out", progress=interrupt_after("experts of encoder-1"))
    first = inodes(tmp_path / "out.partial")
    monkeypatch.chdir(tmp_path)
    convert(Path("cpm2"), Path("out"))
    assert first.items() <= inodes(tmp_path / "out").items()


def test_a_damaged_source_fails_and_leaves_no_model(moe_files, tmp_path):
    path = moe_files / "100000" / "mp_rank_03_01_model_states.pt"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"mp_rank_03_01_model_states\.pt: truncated"):
        convert(moe_files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_experts_that_cannot_be_quantised(moe_files, t5_files, tmp_path):
    with pytest.raises(ConfigError, match="d_ff is 48; int4 experts need"):
        convert(moe_files, tmp_path / "out", quantization="int4")
    with pytest.raises(ConfigError, match="the model is dense"):
        convert(t5_files, tmp_path / "out", quantization="int8")
    assert list(tmp_path.glob("out*")) == []


def test_refuses_targets(moe_files, tmp_path):
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(moe_files, moe_files)
    for name in ("m.partial", "m.replaced"):  # both are deleted on the way
        save_model(tiny_model(), tmp_path / name)
        with pytest.raises(CheckpointError, match="is the source itself, or would overwrite it"):
            convert(tmp_path / name, tmp_path / "m")
    with pytest.raises(CheckpointError, match="is not empty and holds no native model"):
        convert(moe_files, tmp_path)
    with pytest.raises(CheckpointError, match="int8 cannot be written"):
        convert(moe_files, tmp_path / "out", torch.int8)


# What is there


def test_detects_the_kind(moe_files, t5_files, tmp_path):
    save_model(tiny_model(), tmp_path / "native")
    assert detect_kind(moe_files) == "cpm"
    assert detect_kind(moe_files / "100000") == "cpm"
    assert detect_kind(t5_files) == "huggingface"
    assert detect_kind(tmp_path / "native") == "native"
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "absent", "absent: does not exist"),
        (tmp_path / "empty", "empty: is empty"),
        (tmp_path, "holds no model; expected config.json"),
        (moe_files / "vocab.txt", "vocab.txt: cannot be listed: Not a directory"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_source(path)


def test_inspects_every_kind(moe_files, t5_files, tmp_path):
    convert(moe_files, tmp_path / "native")
    for path, kind, dtype in [
        (moe_files, "cpm2", "float16"),
        (t5_files, "huggingface", "float32"),
        (tmp_path / "native", "native", "float16"),
    ]:
        facts = json.loads(json.dumps(inspect(path)))
        assert (facts["kind"], facts["dtype"]) == (kind, dtype)
        assert facts["config"]["vocab_size"] == 96
        sizes = [(path / file["name"]).stat().st_size for file in facts["files"]]
        assert sizes == [file["bytes"] for file in facts["files"]]
        assert facts["bytes"] == sum(sizes)
        assert facts["experts"].get("quantization") == ("none" if kind == "native" else None)
    assert facts["tokenizer_files"] == ["vocab.txt"]
    assert facts["parameters"]["total"] == num_parameters(tiny_model(MOE))
    assert len(facts["files"]) == 5


def test_counts_parameters_of_the_published_models():
    dense = count_parameters(CPM2_11B)
    assert dense["total"] == dense["active"] == 11_087_097_856
    assert dense["experts"] == dense["one_expert"] == 0
    moe = count_parameters(CPM2_MOE_198B)
    assert moe["total"] == 198_543_978_496
    assert moe["one_expert"] == 125_829_120 + 4096
    assert moe["active"] == 11_297_861_632 + 48 * 32 * 4096
