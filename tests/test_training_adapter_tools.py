"""Adapters on the disk: listed, checked, imported from elsewhere, exported."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapters import Slots, load_adapter, model_fingerprint
from engine.checkpoint import save_model
from engine.checkpoint_prompt import read_prompt_file
from engine.errors import CheckpointError
from server.__main__ import main
from tests import cpm2_files
from tests.tiny import DENSE, tiny_model
from training.adapter_tools import (
    check_adapter,
    export_adapter,
    find_mark,
    import_adapter,
    list_adapters,
    note_score,
    show_adapter,
)
from training.tune_files import AdapterFacts, write_adapter


def vectors(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DENSE.d_model, generator=generator)


@pytest.fixture
def model(tmp_path):
    save_model(tiny_model(DENSE), tmp_path / "model")
    return tmp_path / "model"


def write(path, **facts):
    given = {
        "slots": Slots(front=1, middle=1, back=1, middle_mark=62),
        "version": "2",
        "base_fingerprint": model_fingerprint(tiny_model(DENSE)),
        "defaults": {"max_tokens": 7},
        "about": {"task": "pair", "template": "{a};{b}", "score": {"value": 0.5}},
    }
    path.parent.mkdir(exist_ok=True)
    write_adapter(path, vectors(), DENSE, AdapterFacts(**(given | facts)))
    return path


def test_all_that_an_adapter_tells_comes_back(tmp_path, model):
    path = write(tmp_path / "a")
    found = check_adapter(path, model)
    assert torch.equal(found.prompt_PD, vectors())
    assert found.slots == Slots(front=1, middle=1, back=1, middle_mark=62)
    assert (found.version, found.defaults) == ("2", {"max_tokens": 7})
    assert found.about["template"] == "{a};{b}"
    told = show_adapter(path)
    assert (told["vectors"], told["task"], told["kind"]) == (3, "pair", "PROMPT_TUNING")
    write_adapter(path, vectors(3, 1), DENSE, AdapterFacts(slots=Slots(back=3)))
    assert check_adapter(path, model).slots == Slots(back=3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task", 1, "task is 1; expected a text"),
        ("labels", [], r"labels is \[\]; expected an object"),
        ("slots", {"front": 3, "middle_mark": 1}, "middle_mark is 1; it is for vectors in the"),
        ("slots", {"front": 2, "middle": 1, "middle_after": 1, "middle_mark": 1}, "instead of"),
        ("slots", {"front": 2, "middle": 1, "middle_mark": -1}, "middle_mark is -1"),
    ],
)
def test_what_is_told_wrongly_is_refused(tmp_path, key, value, message):
    path = write(tmp_path / "a")
    (path / "infmoe_adapter.json").write_text(json.dumps({key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_adapter(path, DENSE, torch.float32)


def test_folders_are_listed_with_those_that_are_damaged(tmp_path):
    write(tmp_path / "all" / "a")
    write(tmp_path / "all" / "b" / "v1")
    bad = write(tmp_path / "all" / "c")
    (bad / "adapter_model.safetensors").write_bytes(b"")
    first, second, third = list_adapters(tmp_path / "all")
    assert (first["name"], first["vectors"], first["task"]) == ("a", 3, "pair")
    assert second["name"] == "b/v1"
    assert "is not what manifest.json lists" in third["error"]
    with pytest.raises(CheckpointError, match="is no directory of adapters"):
        list(list_adapters(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        show_adapter(tmp_path)


def test_a_score_is_noted_and_all_else_stays(tmp_path, model):
    path = write(tmp_path / "a")
    (path / "README.md").write_text("a card", encoding="utf-8")
    note_score(path, model, {"metric": "accuracy", "value": 0.75, "rows": 8})
    found = check_adapter(path, model)
    assert torch.equal(found.prompt_PD, vectors())
    assert found.about["score"] == {"metric": "accuracy", "value": 0.75, "rows": 8}
    assert (found.about["task"], found.version, found.defaults) == ("pair", "2", {"max_tokens": 7})
    assert found.slots == Slots(front=1, middle=1, back=1, middle_mark=62)
    assert (path / "README.md").read_text(encoding="utf-8") == "a card"
    (path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not what manifest.json lists"):
        note_score(path, model, {})


def test_another_base_is_refused_unless_it_is_allowed(tmp_path, model):
    path = write(tmp_path / "a", base_fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        check_adapter(path, model)
    assert check_adapter(path, model, is_any_base_allowed=True)
    with pytest.raises(CheckpointError, match="was trained on 000000000000, .* or say --any-base"):
        import_adapter(path, model, tmp_path / "b")
    found = import_adapter(path, model, tmp_path / "b", is_any_base_allowed=True)
    assert found.base_fingerprint == model_fingerprint(tiny_model(DENSE))
    assert (found.slots.middle_mark, found.about["task"]) == (62, "pair")


def bare(path, content):
    if path.suffix == ".safetensors":
        save_file(content if isinstance(content, dict) else {"prompt": content}, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.safetensors", vectors()),
        ("p.safetensors", {"prompt_embeddings": vectors(), "other": torch.ones(1)}),
        ("p.pt", vectors()),
        ("p.pt", vectors().half().float()),
        ("p.bin", {"prompt_embeddings": vectors()}),
        ("p.pt", {"module": {"encoder.prompt_embeds.weight": vectors(), "x": torch.ones(1)}}),
    ],
)
def test_vectors_come_from_bare_files(tmp_path, model, name, content):
    path = bare(tmp_path / name, content)
    slots = Slots(front=2, back=1)
    found = import_adapter(path, model, tmp_path / "out", slots, version="3")
    assert torch.allclose(found.prompt_PD, vectors(), atol=1e-2)
    assert (found.slots, found.version) == (slots, "3")
    assert check_adapter(tmp_path / "out", model)


class Harm:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.pt", [Harm()], "refused: it asks to import or call"),
        ("p.pt", [1], "holds a list, expected a dense tensor"),
        ("p.pt", vectors().to_sparse(), "expected a dense tensor"),
        ("p.pt", {"a": vectors(), "b": vectors()}, "holds 2 tensors, none of them named"),
        ("p.safetensors", {"a": vectors(), "b": vectors() + 1}, "holds 2 tensors"),
    ],
)
def test_files_that_are_not_vectors_are_refused(tmp_path, name, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_prompt_file(bare(tmp_path / name, content))


def test_vectors_that_do_not_fit_are_refused(tmp_path, model):
    for content, message in (
        (torch.ones(3, 16), r"has shape \[3, 16\]; expected vectors x 32"),
        (torch.ones(3, 32).int(), "no finite numbers"),
        (torch.full((3, 32), torch.nan), "no finite numbers"),
    ):
        path = bare(tmp_path / "p.pt", content)
        with pytest.raises(CheckpointError, match=message):
            import_adapter(path, model, tmp_path / "out")
    path = bare(tmp_path / "p.pt", vectors())
    with pytest.raises(CheckpointError, match="has 3 vectors; the slots are for 5"):
        import_adapter(path, model, tmp_path / "out", Slots(front=5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a PEFT folder nor a CPM-2 checkpoint"):
        import_adapter(tmp_path / "empty", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
@pytest.mark.parametrize("kind", ["prompt", "p"])
def test_peft_folders_of_both_kinds_are_imported(tmp_path, model, kind):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4))
    if kind == "prompt":  # writes rows for the decoder too, which it never reads
        config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    else:
        config = peft.PromptEncoderConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, encoder_hidden_size=16
        )
    wrapped = peft.get_peft_model(t5, config).eval()
    wrapped.save_pretrained(tmp_path / "peft")
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]
    found = import_adapter(tmp_path / "peft", model, tmp_path / "out")
    assert torch.equal(found.prompt_PD, stored[:4])
    assert found.slots == Slots(front=4)
    path = tmp_path / "peft" / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for changes, message in (
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; allowed: PROMPT_TUNING, P_TUNING"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_virtual_tokens": 3}, "rows for 3 vectors"),
    ):
        path.write_text(json.dumps(values | changes), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            import_adapter(tmp_path / "peft", model, tmp_path / "other")


def test_the_prompt_inside_a_cpm2_checkpoint_is_imported(tmp_path):
    def add(rank, state):
        state["encoder.prompt_embeds.weight"] = vectors(10)

    base = cpm2_files.tiny_model()
    save_model(replace_tokenizer(base), tmp_path / "model")
    cpm2_files.write_rank_files(cpm2_files.tiny_model(), tmp_path / "with", 2, change=add)
    slots = Slots(front=5, back=5)
    found = import_adapter(tmp_path / "with", tmp_path / "model", tmp_path / "out", slots)
    assert torch.equal(found.prompt_PD, vectors(10))
    cpm2_files.write_rank_files(cpm2_files.tiny_model(), tmp_path / "without", 2)
    with pytest.raises(CheckpointError, match="holds no soft prompt"):
        import_adapter(tmp_path / "without", tmp_path / "model", tmp_path / "other")


def replace_tokenizer(model):
    model.config = replace(model.config, tokenizer="bytes")
    return model


def test_vectors_are_exported_as_one_tensor_and_come_back(tmp_path, model):
    path = write(tmp_path / "a")
    assert export_adapter(path, tmp_path / "p.safetensors") == 3
    assert torch.equal(read_prompt_file(tmp_path / "p.safetensors"), vectors())
    for out in (tmp_path / "p.safetensors", tmp_path / "p.pt"):
        with pytest.raises(CheckpointError, match="give a new file that ends in .safetensors"):
            export_adapter(path, out)
    assert find_mark(model, "a;") == 62
    with pytest.raises(CheckpointError, match="has no token for ''"):
        find_mark(model, "")


def run(capsys, *words):
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        code = end.code or 0
    return code, capsys.readouterr()


def test_the_commands(tmp_path, model, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": "ab"[i % 2] * 2, "label": i % 2}) for i in range(4)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    common = (model, rows, "--task", "sentiment_zh")
    tune = ("tune", *common, "--out", tmp_path / "all/t", "--steps", 2, "--rows", 2, "--front", 2)
    code, told = run(capsys, *tune, "--dev", rows)
    assert code == 0, told.err
    assert told.out.strip() == str(tmp_path / "all/t")
    assert "64 parameters trained" in told.err
    code, told = run(capsys, "eval-task", *common, "--adapter", tmp_path / "all/t", "--json")
    assert json.loads(told.out)["rows"] == 4
    code, told = run(capsys, "eval-task", *common, "--answers", tmp_path / "answers")
    assert len((tmp_path / "answers").read_text(encoding="utf-8").splitlines()) == 4
    assert "precision" in told.out
    code, told = run(capsys, "adapter", "list", tmp_path / "all")
    assert json.loads(told.out)["task"] == "sentiment_zh"
    assert json.loads(told.out)["score"]["metric"] == "accuracy"
    code, told = run(capsys, "adapter", "show", tmp_path / "all/t")
    assert json.loads(told.out)["labels"]["1"] == ["好", "满意"]
    code, told = run(capsys, "adapter", "check", tmp_path / "all/t", "--model", model)
    assert "t@1: 2 vectors, fits" in told.err
    out = tmp_path / "p.safetensors"
    code, told = run(capsys, "adapter", "export", tmp_path / "all/t", "--out", out)
    assert code == 0
    more = ("--front", 1, "--middle", 1, "--middle-mark", ";")
    code, told = run(
        capsys, "adapter", "import", out, "--model", model, "--out", tmp_path / "i", *more
    )
    assert code == 0, told.err
    assert load_adapter(tmp_path / "i", DENSE, torch.float32).slots.middle_mark == 62
    code, told = run(capsys, "tune", model, "--out", tmp_path / "x")
    assert code == 2
    code, told = run(capsys, *tune)
    assert code == 1
    assert "is there already" in told.err


def test_a_recipe_is_run_and_not_talked_over(tmp_path, model, capsys):
    row = json.dumps({"text": "a", "label": 1})
    (tmp_path / "rows.jsonl").write_text(row, encoding="utf-8")
    assert model.name == "model"
    recipe = tmp_path / "run.toml"
    said = {"model": "model", "data": "rows.jsonl", "out": "r", "task": "sentiment_zh"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in said.items()]
    recipe.write_text("\n".join([*lines, "[tune]", "steps = 1", "rows = 1"]), encoding="utf-8")
    code, told = run(capsys, "tune", recipe, "--steps", 3)
    assert code == 2
    assert "is for the recipe to say" in told.err
    code, told = run(capsys, "tune", recipe, "--dtype", "fp32")
    assert (code, told.out.strip()) == (0, str(tmp_path / "r"))
