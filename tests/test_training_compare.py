import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint import save_model
from engine.convert import convert
from engine.errors import ConfigError
from server.__main__ import main
from tests.tiny import DENSE, MOE, byte_tokenizer, tiny_model
from training.compare import (
    check_same_vocabulary,
    compare,
    compare_models,
    fill_objective,
    pack,
    read_documents,
)
from training.evaluate import evaluate_fill
from training.span_corruption import IGNORED

CONFIG = replace(MOE, d_ff=64)
LINES = [f"In line {i} there are {i * i} words, or fewer; more in the next." for i in range(40)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join([*LINES, "short", "a line that goes on and on " * 20]))
    return path


@pytest.fixture
def model_dir(tmp_path):
    save_model(tiny_model(CONFIG), tmp_path / "model", dtype=torch.bfloat16)
    return tmp_path / "model"


def batches_of(path, num_tokens=3000):
    objective = fill_objective(CONFIG, byte_tokenizer())
    documents = read_documents([path], byte_tokenizer(), CONFIG.max_positions, num_tokens)
    special_ids = (*objective.sentinel_ids, objective.end_id)
    return list(pack(documents, objective, CONFIG.max_positions)), special_ids


def test_a_model_equals_itself(model_dir, text):
    result = compare(model_dir, model_dir, [text], 1000)
    assert result.loss == result.reference_loss > 0
    assert result.logit_difference == result.max_logit_difference == result.kl_divergence == 0
    assert result.agreement == 1
    assert 0.1 * 1000 < result.tokens < 0.2 * 1000
    assert compare(model_dir, model_dir, [text], 1000) == result


def test_numbers_are_those_of_the_definitions(text):
    """Token by token in plain loops, against what is computed batch by batch."""
    model, reference = tiny_model(CONFIG, seed=1), tiny_model(CONFIG, seed=2)
    batches, special = batches_of(text)
    result = compare_models(model, reference, batches, special)
    losses, divergences, differences, agreements = [], [], [], []
    with torch.no_grad():
        for batch in batches:
            pair = [each(*batch[:4]).double() for each in (model, reference)]
            for row, column in (batch.labels_BT != IGNORED).nonzero().tolist():
                label = int(batch.labels_BT[row, column])
                if label in special:
                    continue
                ours, theirs = (logits[row, column] for logits in pair)
                p, q = theirs.softmax(0), ours.softmax(0)
                losses.append((-q[label].log(), -p[label].log()))
                divergences.append((p * (p / q).log()).sum())
                differences.append((ours - theirs).abs())
                agreements.append(ours.argmax() == theirs.argmax())
    expected = torch.tensor(losses).mean(0)
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(float(expected[0]), rel=1e-5)
    assert result.reference_loss == pytest.approx(float(expected[1]), rel=1e-5)
    assert result.kl_divergence == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-4)
    assert result.logit_difference == pytest.approx(
        float(torch.stack(differences).mean()), rel=1e-5
    )
    assert result.max_logit_difference == pytest.approx(float(torch.stack(differences).max()))
    assert result.agreement == pytest.approx(sum(map(float, agreements)) / len(agreements))
    assert result.agreement < 1


def test_loss_is_that_of_the_training_package(text):
    model = tiny_model(CONFIG)
    batches, special = batches_of(text)
    uniform = torch.zeros(CONFIG.vocab_size)
    expected = evaluate_fill(model, batches, uniform, special)
    result = compare_models(model, model, batches, special)
    assert result.tokens == expected.tokens
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)


def test_every_document_is_in_a_batch_once_and_cut_where_it_is_too_long(text):
    documents = read_documents([text], byte_tokenizer(), CONFIG.max_positions, 10**6)
    assert max(map(len, documents)) == CONFIG.max_positions
    assert len(documents) > len(LINES) + 1
    assert all(len(document) >= 10 for document in documents)
    batches, special = batches_of(text, 10**6)
    assert len(batches) > 2
    packed = sum(int(batch.encoder_segments_BS.max(1).values.sum()) for batch in batches)
    assert packed == len(documents)
    seen = sum(
        int((~torch.isin(ids, torch.tensor([*special, 0]))).sum())
        for batch in batches
        for ids in (batch.encoder_BS, batch.decoder_BT)
    )
    last = sum(1 for batch in batches for _ in batch)  # the last target is no decoder input
    assert seen <= sum(map(len, documents)) <= seen + last * len(documents)


def test_files_have_an_equal_share(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("z" * 5000)
    documents = read_documents([text, other], byte_tokenizer(), 50, 400)
    joined = [byte_tokenizer().decode(document.tolist()) for document in documents]
    assert sum(len(document) for document in joined if set(document) == {"z"}) == 200
    assert 180 <= sum(len(document) for document in joined if set(document) != {"z"}) <= 200


@pytest.mark.parametrize(
    ("kind", "divergence", "agreement"), [("int8", 0.02, 0.9), ("int4", 0.3, 0.6)]
)
def test_quantised_experts_are_near_the_original(
    capsys, tmp_path, model_dir, text, kind, divergence, agreement
):
    convert(model_dir, tmp_path / kind, quantization=kind)
    arguments = ["eval", tmp_path / kind, "--against", model_dir, "--text", text]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert out.count("\n") == 6
    result = json.loads(out.splitlines()[-1])
    assert result["model"] == str(tmp_path / kind)
    assert result["tokens"] > 100
    assert 0 < result["kl_divergence"] < divergence
    assert result["max_logit_difference"] > result["logit_difference"] > 0
    assert result["agreement"] > agreement
    assert result["loss"] == pytest.approx(result["reference_loss"], rel=0.1)
    code, only_json, _ = run(capsys, *arguments, "--json")
    assert json.loads(only_json) == result


# What is refused


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_a_text_is_needed(capsys, model_dir):
    code, out, err = run(capsys, "eval", model_dir, "--against", model_dir)
    assert (code, out) == (2, "")
    assert "--text" in err
    assert "no text comes with infmoe" in err


def test_texts_that_cannot_be_used(model_dir, tmp_path):
    path = tmp_path / "text"
    with pytest.raises(FileNotFoundError, match="text"):
        compare(model_dir, model_dir, [path], 100)
    path.write_text("too short\n\n")
    with pytest.raises(ConfigError, match=r"no document of at least 10 tokens: \S*text$"):
        compare(model_dir, model_dir, [path], 100)
    path.write_bytes("北京".encode("gbk") * 20)
    with pytest.raises(ConfigError, match="text: not UTF-8"):
        compare(model_dir, model_dir, [path], 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 400}, "vocab_size is 384 against 400; both need the same vocabulary"),
        ({"tokenizer": "cpm2_zh"}, "tokenizer is 'bytes' against 'cpm2_zh'"),
        ({"pad_token_id": 2}, "pad_token_id is 0 against 2"),
    ],
)
def test_models_of_different_vocabularies(model_dir, tmp_path, text, change, message):
    save_model(tiny_model(replace(DENSE, **change)), tmp_path / "other")
    with pytest.raises(ConfigError, match=message):
        compare(model_dir, tmp_path / "other", [text], 100)


def test_vocabularies_of_different_words(tmp_path):
    config = replace(DENSE, tokenizer="cpm2_zh")
    sides = [(tmp_path / name, config) for name in ("a", "b")]
    for path, _ in sides:
        path.mkdir()
        (path / "vocab.txt").write_text("<unk>\none\n")
    check_same_vocabulary(*sides)
    (tmp_path / "b" / "vocab.txt").write_text("<unk>\ntwo\n")
    with pytest.raises(ConfigError, match=r"a cannot be compared .*: their vocab\.txt differ"):
        check_same_vocabulary(*sides)
    (tmp_path / "b" / "vocab.txt").unlink()  # says nothing: the reference's is used, if it has one
    check_same_vocabulary(*sides)


def test_a_model_that_ends_no_text(model_dir):
    with pytest.raises(ConfigError, match="eos_token_ids of the reference is empty"):
        fill_objective(replace(CONFIG, eos_token_ids=()), byte_tokenizer())


def test_divergence_of_equal_distributions_is_zero_where_logits_are_shifted(text):
    """Logits differ by a constant, probabilities do not."""
    model = tiny_model(CONFIG)

    class Shifted(type(model)):
        def logits(self, hidden):
            return F.linear(hidden, self.lm_head.weight) + 3.0

    shifted = Shifted(CONFIG).eval()
    shifted.load_state_dict(model.state_dict())
    batches, special = batches_of(text)
    result = compare_models(shifted, model, batches, special)
    assert result.logit_difference == pytest.approx(3.0, rel=1e-5)
    assert result.kl_divergence == pytest.approx(0.0, abs=1e-5)
    assert result.agreement == 1
