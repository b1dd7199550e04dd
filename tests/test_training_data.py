import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import TokenizerError
from tests.tiny import byte_tokenizer
from training.sampler import Sampler
from training.shards import Shard, prepare_shard, read_shard
from training.span_corruption import (
    IGNORED,
    Objective,
    Packer,
    continue_text,
    corrupt_spans,
    span_lengths,
)

S = list(range(900, 910))
OBJECTIVE = Objective(sentinel_ids=tuple(S), start_id=1, end_id=2, pad_id=0, mean_span=3)


def objective(**changes) -> Objective:
    values = {"sentinel_ids": tuple(S), "start_id": 1, "end_id": 2, "pad_id": 0}
    return Objective(**values | changes)


def rebuild(example) -> list[int]:
    """Put the answers back where their sentinels stand."""
    answers, current = {}, None
    for token in example.targets.tolist():
        if token in S:
            current = token
            answers[current] = []
        else:
            answers[current].append(token)
    text = []
    for token in example.encoder.tolist():
        text += answers[token] if token in S else [token]
    return text


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 300),
    density=st.floats(0.05, 0.6),
    mean_span=st.floats(1, 12),
    seed=st.integers(0, 2**31),
)
def test_corrupted_spans_put_back_give_the_document(length, density, mean_span, seed):
    document = np.arange(10, 10 + length)
    rng = np.random.default_rng(seed)
    example = corrupt_spans(document, objective(density=density, mean_span=mean_span), rng)
    assert rebuild(example) == document.tolist()
    used = [t for t in example.encoder.tolist() if t in S]
    assert used == S[: len(used)]  # sentinels in order
    closing = S[len(used)]
    assert [t for t in example.targets.tolist() if t in S] == [*used, closing]
    noise = len(example.targets) - len(used) - 1
    assert noise == min(max(round(length * density), 1), length)
    neighbours = zip(example.encoder[:-1], example.encoder[1:], strict=True)
    assert not any(a in S and b in S for a, b in neighbours)  # spans never touch
    assert len(example.encoder) <= length


def test_span_lengths_are_uniform_over_all_splits():
    rng = np.random.default_rng(0)
    splits = [tuple(span_lengths(4, 2, rng)) for _ in range(3000)]
    shares = [splits.count(split) / 3000 for split in ((1, 3), (2, 2), (3, 1))]
    assert sum(shares) == 1
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)


def test_density_and_span_length_are_as_asked():
    rng = np.random.default_rng(0)
    many = objective(density=0.15, mean_span=3, continuation_share=0)
    examples = [corrupt_spans(np.arange(10, 110), many, rng) for _ in range(50)]
    assert {len(e.targets) for e in examples} == {15 + 5 + 1}  # 15 tokens in 5 spans, and closing


def test_continuation_splits_the_document():
    rng = np.random.default_rng(0)
    document = np.arange(10, 30)
    for is_end in (True, False):
        example = continue_text(document, OBJECTIVE, rng, is_end=is_end)
        assert example.encoder[-1] == example.targets[0] == S[-1]
        tail = example.targets[1:-1] if is_end else example.targets[1:]
        assert [*example.encoder[:-1], *tail] == document.tolist()
        assert (example.targets[-1] == 2) is np.True_ if is_end else example.targets[-1] != 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.0}, "density is 1.0"),
        ({"mean_span": 0.5}, "mean_span is 0.5"),
        ({"continuation_share": 1.5}, "continuation_share is 1.5"),
        ({"mean_span": float("nan")}, "mean_span is nan"),
        ({"sentinel_ids": (900,)}, "the vocabulary has 1 sentinels; 2 are needed"),
    ],
)
def test_impossible_objectives(change, message):
    with pytest.raises(ValueError, match=message):
        objective(**change)


def test_packing_keeps_examples_whole_and_apart():
    rng = np.random.default_rng(0)
    packer = Packer(rows=2, source_length=30, target_length=12, objective=OBJECTIVE)
    placed = []
    for index in range(20):
        example = corrupt_spans(np.arange(100 + 20 * index, 112 + 20 * index), OBJECTIVE, rng)
        if packer.add(example):
            placed.append(example)
    batch = packer.batch()
    found = []
    for row in range(2):
        for segment in range(1, int(batch.encoder_segments_BS[row].max()) + 1):
            here = batch.encoder_segments_BS[row] == segment
            there = batch.decoder_segments_BT[row] == segment
            labels = batch.labels_BT[row][there].numpy()
            decoder = batch.decoder_BT[row][there].numpy()
            assert decoder.tolist() == [1, *labels[:-1]]  # start, then shifted by one
            found.append((batch.encoder_BS[row][here].tolist(), labels.tolist()))
    expected = [(e.encoder.tolist(), e.targets.tolist()) for e in placed]
    assert sorted(found) == sorted(expected)
    assert len(placed) >= 4
    padding = batch.decoder_segments_BT == 0
    assert (batch.labels_BT[padding] == IGNORED).all()
    assert (batch.encoder_BS[batch.encoder_segments_BS == 0] == 0).all()


def write_text(path, documents):
    path.write_text("".join(d + "\n" for d in documents), encoding="utf-8")
    return path


def test_a_shard_holds_the_documents_of_its_text(tmp_path):
    text = write_text(tmp_path / "a.txt", ["a long line<n>and another", "short", "ten bytes!"])
    shard = prepare_shard(text, tmp_path / "shard", byte_tokenizer(), "key")
    documents = [byte_tokenizer().decode(shard.document(i).tolist()) for i in range(2)]
    assert documents == ["a long line\nand another", "ten bytes!"]  # short ones are dropped
    assert shard.num_tokens == 33
    assert shard.tokens.dtype == np.uint16


def test_a_shard_is_made_once_and_again_when_stale(tmp_path):
    text = write_text(tmp_path / "a.txt", ["the first document"])
    calls = []
    for key in ("one", "one", "two"):
        prepare_shard(text, tmp_path / "s", byte_tokenizer(), key, lambda *a: calls.append(a))
    assert calls == [(19, 19), (19, 19)]  # made, kept, made again for another tokenizer
    write_text(text, ["another document, longer"])
    shard = prepare_shard(text, tmp_path / "s", byte_tokenizer(), "two")
    assert shard.num_tokens == 24


def test_texts_without_documents_are_refused_and_leave_nothing(tmp_path):
    text = write_text(tmp_path / "a.txt", ["short"])
    with pytest.raises(ValueError, match=r"a.txt: no document of at least 10 tokens"):
        prepare_shard(text, tmp_path / "s", byte_tokenizer(), "k")
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="a shard without documents"):
        Shard(np.array([], np.uint16), np.array([0]))


def test_damaged_shards_are_named(tmp_path):
    text = write_text(tmp_path / "a.txt", ["the first document"])
    folder = tmp_path / "s"
    prepare_shard(text, folder, byte_tokenizer(), "k")
    np.save(folder / "tokens.npy", np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match="tokens and offsets disagree"):
        read_shard(folder)
    for content in (b"x", b""):
        (folder / "tokens.npy").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable shard"):
            read_shard(folder)
    np.save(folder / "tokens.npy", np.zeros(3, np.uint16))
    for offsets in (np.array(3), np.array([], np.int64)):
        np.save(folder / "offsets.npy", offsets)
        with pytest.raises(ValueError, match="tokens and offsets disagree"):
            read_shard(folder)


def test_a_shard_that_was_cut_off_is_made_again(tmp_path):
    text = write_text(tmp_path / "a.txt", ["the first document"])
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "junk").write_text("x")
    assert prepare_shard(text, tmp_path / "s", byte_tokenizer(), "k").num_tokens == 18
    assert not (tmp_path / "s.partial").exists()
    assert json.loads((tmp_path / "s" / "shard.json").read_text())["tokenizer"] == "k"


@pytest.mark.parametrize("content", [None, b"", b'{"version": 1'])
def test_a_shard_whose_removal_or_record_was_cut_off_is_made_again(tmp_path, content):
    text = write_text(tmp_path / "a.txt", ["the first document"])
    folder = tmp_path / "s"
    prepare_shard(text, folder, byte_tokenizer(), "k")
    (folder / "tokens.npy").unlink()
    (folder / "shard.json").unlink()
    if content is not None:
        (folder / "shard.json").write_bytes(content)
    assert prepare_shard(text, folder, byte_tokenizer(), "k").num_tokens == 18


def test_a_folder_that_is_no_shard_is_not_removed(tmp_path):
    text = write_text(tmp_path / "a.txt", ["the first document"])
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "photo.jpg").write_text("x")
    with pytest.raises(ValueError, match=r"s: holds photo\.jpg, which is no part of a shard"):
        prepare_shard(text, tmp_path / "s", byte_tokenizer(), "k")
    assert (tmp_path / "s" / "photo.jpg").exists()


def test_a_text_that_is_not_utf8_names_itself(tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes("the first document\n第二\n".encode("gbk"))
    with pytest.raises(ValueError, match=r"a\.txt:2: not UTF-8"):
        prepare_shard(text, tmp_path / "s", byte_tokenizer(), "k")


def test_windows_stay_inside_a_document_and_tell_its_end():
    documents = [np.arange(100, 105), np.arange(200, 250)]
    shard = Shard(np.concatenate(documents), np.array([0, 5, 55]))
    rng = np.random.default_rng(0)
    firsts = []
    for _ in range(300):
        window, is_end = shard.window(rng, 20)
        document = documents[int(window[0]) // 100 - 1]
        assert set(window) <= set(document)
        assert len(window) == min(20, len(document))
        assert is_end == (window[-1] == document[-1])
        firsts.append(int(window[0]) // 100)
    assert 0.05 < firsts.count(1) / 300 < 0.14  # 5 of 55 tokens


def make_sampler(**changes):
    shards = [Shard(np.arange(100, 400) % 500 + 3, np.array([0, 40, 300]))] * 2
    values = {"rows": 3, "source_length": 40, "target_length": 16, "window": 40} | changes
    chosen = objective(mean_span=3, continuation_share=0.3)
    return Sampler(shards, [2.0, 1.0], chosen, **values)


def test_a_batch_depends_on_seed_and_number_only():
    one, two = make_sampler(), make_sampler()
    one.batch(1, 0)
    for a, b in zip(one.batch(1, 7), two.batch(1, 7), strict=True):
        assert (a == b).all()
    assert not (one.batch(1, 7).encoder_BS == one.batch(1, 8).encoder_BS).all()
    assert not (one.batch(1, 7).encoder_BS == one.batch(2, 7).encoder_BS).all()


def test_targets_that_can_never_fit_are_refused():
    """They would be left out in silence, or leave a batch without a single label."""
    with pytest.raises(ValueError, match="spans of 40 tokens make 9 targets, target_length is 8"):
        make_sampler(target_length=8)
    assert make_sampler(target_length=9).batch(1, 0).labels_BT.shape == (3, 9)


def test_batches_are_well_filled():
    batch = make_sampler().batch(1, 0)
    assert (batch.encoder_segments_BS > 0).float().mean() > 0.6
    assert batch.encoder_BS.shape == (3, 40)
    assert batch.labels_BT.shape == (3, 16)


def test_a_text_that_the_tokenizer_refuses_leaves_no_shard(tmp_path):
    class Refusing:
        vocab_size = 10

        def encode(self, text):
            raise TokenizerError("no")

    text = write_text(tmp_path / "a.txt", ["the first document"])
    with pytest.raises(TokenizerError):
        prepare_shard(text, tmp_path / "s", Refusing(), "k")
    assert not (tmp_path / "s").exists()
