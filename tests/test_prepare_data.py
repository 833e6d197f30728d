"""Corpora in, token files out: nothing lost, nothing invented, nothing left out without a word."""

import contextlib
import gzip
import hashlib
import http.client
import json
import lzma
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import grammar
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from eval import read_problems
from prepare_data import EOT, Documents, PrepareConfig, find_files, load_tokenizer, make_tokenizer, prepare

STORIES = [f"Story {i}.\nOnce there was a cat.\n\nIt was {i} years old, or 1{i}." for i in range(40)]
MARKED, ROWS = f"\n{EOT}\n".join(STORIES), [json.dumps({"text": story, "id": 1}) + "\n" for story in STORIES]
ARTICLES = [" = A = \n \n Text . \n = = Part = = \n \n More . \n \n", " = Next one = \n \n B = c . \n"] * 9
PROBLEM = "Question: Two  more? Answer: <<3+2=5>> <<5*2=10>> #### 10"
ROW = json.dumps({"question": "Two  more? ", "answer": "#### <<3+2=5>>5, then $<<5*2=10>>10\n#### 10"})
PROSE = json.dumps({"question": "q", "answer": "Add them to get 4.\n#### 4"})
PROSE_PROBLEM = "Question: q Answer: Add them to get 4. #### 4"
SUMS = "".join(f"{i}+1? ####||<<{i}+1={i + 1}>> #### {i + 1}\n" for i in range(200))
PARTS = [[f"Question: {i}+1? ####", f" Answer: <<{i}+1={i + 1}>>", f" #### {i + 1}{EOT}"] for i in range(200)]
SPECS = {name: make_tokenizer(name, True, texts=STORIES) for name in ("bytes", "words")}
ENCODINGS = {name: load_tokenizer(json.loads(json.dumps(spec))) for name, spec in SPECS.items()}


def zstd_open(*args):
    return pytest.importorskip("backports.zstd").open(*args)


def write(path, text):
    """'\\udcff' in text becomes the byte 0xff; the suffix says how it is packed."""
    path.parent.mkdir(exist_ok=True, parents=True)
    opener = {".gz": gzip.open, ".xz": lzma.open, ".zst": zstd_open}.get(path.suffix.lower(), open)
    with opener(path, "wb") as file:
        file.write(text.encode(errors="surrogateescape"))
    return str(path)


def prepared(tmp_path, name="mine", **kwargs):
    """meta, {split: tokens} and the tokenizer."""
    folder = tmp_path / "data" / name
    (folder / "meta.json").unlink(missing_ok=True)  # without it the folder counts as not prepared
    prepare(PrepareConfig(name=name, data_dir=str(tmp_path / "data"), **{"tokenizer": "bytes", **kwargs}))
    meta = json.loads((folder / "meta.json").read_text())
    splits = {split: np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val")}
    return meta, splits, load_tokenizer(meta["tokenizer"])


def parts_of(*paths, kind="marked", **options):
    """The documents of files, each a list of its parts."""
    documents = Documents([str(path) for path in paths], kind, **options)
    parts = list(documents)
    documents.report()
    return parts


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("data/*/[!.]*") if path.is_file()}


# ---- every kind of source

SOURCES = [
    *[({}, f"a.txt{packed}", MARKED, STORIES) for packed in ("", ".gz", ".xz", ".zst")],
    *[({}, f"a.jsonl{packed}", "".join(ROWS), STORIES) for packed in ("", ".gz", ".zst")],
    ({}, "A.TXT.GZ", MARKED, STORIES),
    ({}, "bom.txt", "\ufeff" + MARKED, STORIES),
    ({}, "bom.jsonl", "\ufeff" + "\r\n\r\n".join(ROWS), STORIES),
    ({}, "crlf.txt", MARKED.replace("\n", "\r\n"), STORIES),
    ({"text_field": "content"}, "c.jsonl", "".join(ROWS).replace('"text"', '"content"'), STORIES),
    ({}, "a:b.txt.jsonl", "".join(ROWS), STORIES),
    ({}, "long.jsonl", json.dumps({"text": "long" * 999}) + "\n" + ROWS[0], ["long" * 999, STORIES[0]]),
    ({"documents": "articles"}, "w.txt", " \n" + "".join(ARTICLES), ARTICLES),
    ({"documents": "articles"}, "w.txt", "".join(ARTICLES).replace("\n", "\r\n"), ARTICLES),
    ({"documents": "problems"}, "p.txt", "Two  more?||<<3+2=5>> <<5*2=10>> #### 10\n" * 3, [PROBLEM] * 3),
    ({"documents": "problems"}, "p.jsonl", f"{ROW}\r\n" * 3, [PROBLEM] * 3),
    ({"documents": "problems"}, "q.jsonl", f"{PROSE}\n" * 3, [PROSE_PROBLEM] * 3),
]


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
@pytest.mark.parametrize("options, file, text, wanted", SOURCES)
def test_every_source_keeps_every_document(tmp_path, monkeypatch, tokenizer, options, file, text, wanted):
    monkeypatch.setattr(prepare_data, "PIECE", 50)
    source = write(tmp_path / file, text)
    options |= {"source": source, "val_source": source, "tokenizer": tokenizer}
    meta, splits, encoding = prepared(tmp_path, **options)
    for tokens in splits.values():
        assert encoding.decode(tokens.tolist()).split(EOT) == [*wanted, ""]
    assert meta["documents"] == len(wanted) and meta["settings"]["source"] == source
    assert meta["opens_with_eot"] and meta["one_per_line"] == (options.get("documents") == "problems")
    assert meta["dtype"] == "uint16" and max(splits["train"]) < meta["vocab_size"] == meta["eot_id"] + 1
    assert meta["sha256"]["val"] == hashlib.sha256(splits["val"].tobytes()).hexdigest()
    assert meta["tokens"] == {split: len(tokens) for split, tokens in splits.items()}


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.zst", MARKED)
    monkeypatch.delitem(prepare_data.fsspec.utils.compressions, "zst", raising=False)
    with pytest.raises(ValueError, match="a.txt.zst cannot be read .*run: pip install -U fsspec backports"):
        parts_of(path)


def parquet(path, rows):
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The datasets library writes nothing outside tmp_path."""
    pytest.importorskip("datasets")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_parquet(tmp_path, cache):
    """Its name is no pattern; a row without a text does not fit."""
    stories = STORIES * 5
    rows = [{"id": i, "content": story if i != 7 else None} for i, story in enumerate(stories)]
    path = parquet(tmp_path / "data[1]*.parquet", rows)
    assert parts_of(path, text_field="content") == [[story] for i, story in enumerate(stories) if i != 7]


def test_a_folder_tells_what_it_reads_and_what_not(tmp_path, capsys, cache):
    """Hidden files do not count; links are followed, and a link that leads back adds nothing."""
    folder = tmp_path / ".cache" / "mine"
    files = {"README.txt": "About.", "d.jsonl.zst": "".join(ROWS[:9]), "b/A.TXT.GZ": EOT.join(STORIES[20:])}
    others = {"a.txt.bak": "Old", "b/notes.pdf": "%PDF"}
    hidden = {".ipynb_checkpoints/README.txt": "Old.", "b/.hidden.txt": "No."}
    for name, text in (files | others | hidden).items():
        write(folder / name, text)
    parquet(folder / "E.PARQUET", [{"text": story} for story in STORIES[9:15]])
    write(tmp_path / "elsewhere" / "c.txt", EOT.join(STORIES[15:20]))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "loop").symlink_to(folder)
    found = find_files(str(folder), "")
    assert sorted(parts_of(*found)) == sorted([text] for text in [*STORIES, "About."])
    printed = capsys.readouterr().out
    assert f"{folder}, files read: 5 (" in printed and "files left out: 2 (" in printed
    assert all(name in printed for name in others) and "idden" not in printed
    assert len(find_files(f"{folder}/", "")) == 5


def test_hub_data_sets_stream(tmp_path, monkeypatch):
    load = Mock(return_value=[{"text": story} for story in STORIES])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    assert prepared(tmp_path, "fineweb_edu", val_fraction=0.1)[0]["documents"] == 40
    wanted = {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "split": "train", "streaming": True}
    load.assert_called_once_with(**wanted)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        prepared(tmp_path, "fineweb_edu")


def test_urls_are_fetched_once_and_kept_apart(tmp_path):
    """Two addresses may end in the same name."""
    urls = {}
    for key, text in {"source": "train " * 50, "val_source": "valid"}.items():
        urls[key] = "file://" + write(tmp_path / key / "t.txt", text)
    for _ in range(2):
        assert prepared(tmp_path, **urls)[0]["tokens"] == {"train": 301, "val": 6}
        (tmp_path / "source" / "t.txt").unlink(missing_ok=True)
    with pytest.raises(OSError, match="t.txtx"):
        prepared(tmp_path, source=urls["source"] + "x")


def test_half_a_download_is_none(tmp_path, monkeypatch):
    """And the file has the name of the address's path."""
    address, errors = "https://a.b/t.txt?download=true", [http.client.IncompleteRead(b"half")]

    def retrieve(url, path):
        write(Path(path), "half" if errors else MARKED)
        if errors:
            raise errors.pop()

    monkeypatch.setattr(prepare_data.urllib.request, "urlretrieve", retrieve)
    with pytest.raises(http.client.IncompleteRead):
        prepared(tmp_path, source=address)
    assert prepared(tmp_path, source=address)[0]["documents"] == 40
    assert len(list((tmp_path / "data/mine/download").glob("*-t.txt"))) == 1


# ---- long documents


def test_a_long_document_is_cut_between_tokens(tmp_path, monkeypatch):
    """Encoded in pieces, a document has the tokens it has as a whole, blank lines and all."""
    rng = random.Random(0)
    words = ["word ", "12", "\n", "\n\n", "  ", "a. ", "\t", "The end.\n", " x\n"]
    text = "".join(rng.choice(words) for _ in range(20000))
    encoding = load_tokenizer(make_tokenizer("words", texts=[text]))  # blanks of all lengths are tokens
    monkeypatch.setattr(prepare_data, "PIECE", 300)
    for path in (write(tmp_path / "a.txt", text), write(tmp_path / "a.jsonl", json.dumps({"text": text}))):
        (pieces,) = parts_of(path)
        assert len(pieces) > 100 and max(map(len, pieces)) <= 600
        tokens = [token for piece in pieces for token in encoding.encode_ordinary(piece)]
        assert tokens == encoding.encode_ordinary(text)


def test_documents_end_at_marks(tmp_path):
    """With one line end before and behind a mark; what is blank between two is no document."""
    text = f"w w{EOT}two\n{EOT}\n{EOT}\n\nthree\n\n\n{EOT}long{EOT} \n{EOT}\nend\n\n"
    wanted = [["w w"], ["two"], ["\nthree\n\n"], ["long"], ["end\n\n"]]
    assert parts_of(write(tmp_path / "a.txt", text)) == wanted


@pytest.mark.parametrize("monster", [" " * 1_000_067, "\n" * 1_000_067, "A" * 1_000_067, "!" * 1_000_067])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_monsters(tmp_path, monster, kind):
    text = f"a{monster}b"
    source = write(tmp_path / f"a.{kind}", text if kind == "txt" else json.dumps({"text": text}))
    _, splits, encoding = prepared(tmp_path, source=source, tokenizer="gpt2" if gpt2_is_there() else "bytes")
    assert encoding.decode([*splits["train"].tolist(), *splits["val"].tolist()]) == text + EOT


def gpt2_is_there():
    with contextlib.suppress(Exception):
        return load_tokenizer(make_tokenizer("gpt2"))


# ---- rows that do not fit

BAD_ROWS = ['{"text": null}', '"text"', "[1]", '{"a": 1}', '{"text": "\\ud83d"}', '{"text": "cut']


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_rows_that_do_not_fit_are_counted_and_named(tmp_path, capsys, bad):
    path = write(tmp_path / "a.jsonl", "".join(ROWS * 5) + bad)
    assert len(parts_of(path)) == 200
    said = f"1 of 201 rows do not fit and are left out; the first is {path}, line 201"
    assert said in capsys.readouterr().out
    write(tmp_path / "a.jsonl", "".join(ROWS) + bad)
    with pytest.raises(ValueError, match="1 of 41 rows do not fit; .*, line 41.*Set --text_field"):
        parts_of(path)


@pytest.mark.parametrize("n_good, n_bad", [(0, 100), (40, 100), (20_000, 203)])
def test_too_many_bad_rows_are_told_at_once(tmp_path, n_good, n_bad):
    """That is, 100 or more, and more than 1 in 100."""
    path = write(tmp_path / "a.jsonl", ROWS[0] * n_good + '{"content": "Once"}\n' * 9999)
    message = f"{n_bad} of {n_good + n_bad:,} rows do not fit; the first is .*KeyError.'text'.*--text_field"
    with pytest.raises(ValueError, match=message):
        list(Documents([path], "marked"))


def test_what_is_left_out_is_printed_also_when_no_more_is_wanted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ROWS[0] + "[1]\n" + '{"text": ""}\n' + ROWS[0] * 200)
    prepared(tmp_path, source=path, max_tokens=60, val_source=write(tmp_path / "b.txt", MARKED))
    printed = capsys.readouterr().out
    assert re.search("1 of [0-9]+ rows do not fit", printed) and "1 empty rows left out" in printed


LINES = {  # a good one, then bad ones
    "p.txt": ["q||<<1+1=2>> #### 2", "no bars #### 3", "q||no answer", "||x #### 1", "q||#### "],
    "p.jsonl": [ROW, '{"question": "q"}', '{"question": 1, "answer": "#### 1"}', "[1]"],
}


@pytest.mark.parametrize("file", LINES)
def test_malformed_problems_are_counted(tmp_path, capsys, file):
    good, *bad = LINES[file]
    path = write(tmp_path / file, "\n".join([good] * 30 + bad + [""] + [good] * 600))
    meta, _, _ = prepared(tmp_path, documents="problems", source=path)
    assert meta["documents"] == 630
    wanted = f"{len(bad)} of {630 + len(bad)} rows do not fit and are left out; the first is {path}, line 31"
    assert wanted in capsys.readouterr().out


# ---- nothing is replaced without a word

ARITHMETIC = {"name": "arithmetic", "source": None}
BAD_SOURCES = [
    ("a.txt", "\n \n", {}, "a.txt is empty, or too short to hold out"),
    ("a.txt", "\udcff", {}, "a.txt cannot be read as UTF-8 text"),
    ("a.txt", "version https://git-lfs.github.com/spec/v1\nsize 1\n", {}, "Git LFS pointer"),
    ("a.md", "text", {}, "a.md' does not exist, or holds no .txt.*, .jsonl or .parquet files"),
    ("a.txt", "text", {"tokenizer": "words", "vocab_size": 0}, "vocab_size is 0; wanted 257 to 50257"),
    ("a.txt", "text", {"vocab_size": 300}, "vocab_size is 300; wanted .*, with gpt2 or words"),
    ("a.txt", "text", {"val_fraction": 0}, "val_fraction from 0 to 0.5; got .*0"),
    ("a.txt", "text", {"documents": "poems"}, "wanted documents of marked, articles, problems.*'poems'"),
    ("a.txt", "", {"name": "nonsense", "source": None}, "wanted a new name with a --source, or arithmetic"),
    ("a.txt", "text", {"name": "arithmetic"}, "arithmetic is generated"),
    ("a.txt", "", ARITHMETIC | {"num_problems": 10**6}, "num_problems is 1000000; .* between 1 and 100,000"),
    ("a.txt", "q||t #### 1", {"documents": "problems"}, "too short to hold out 1 of every 100 documents"),
    ("a.txt", "text", {"name": "../esc"}, "name '../esc'.*: wanted a new name"),
    ("a.txt.gz", "text", {"cut": True}, "a.txt.gz cannot be read as UTF-8"),
    ("a.txt.zst", "text", {"cut": True}, "a.txt.zst cannot be read as UTF-8"),
]


@pytest.mark.parametrize("file, text, options, message", BAD_SOURCES)
def test_bad_sources_leave_nothing_behind(tmp_path, file, text, options, message):
    source, options = write(tmp_path / file, text), dict(options)
    if options.pop("cut", False):
        Path(source).write_bytes(Path(source).read_bytes()[:-4])
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **{"source": source, **options})
    assert list(tmp_path.glob("data/*/*")) == []


def test_prepared_data_are_never_replaced(tmp_path, capsys):
    source, data_dir = write(tmp_path / "a.txt", MARKED), str(tmp_path / "data")
    meta = prepare(PrepareConfig("mine", source, tokenizer="bytes", data_dir=data_dir))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="mine was prepared with tokenizer='bytes', max_tokens=1e.30; rem"):
        prepare(PrepareConfig("mine", source, tokenizer="words", max_tokens=9, data_dir=data_dir))
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "a.txt").unlink()
    again = PrepareConfig("mine", source, tokenizer="bytes", data_dir=str(tmp_path / "moved"))
    assert prepare(again) == meta and "mine is prepared already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "moved/mine").iterdir()} == before
    meta["settings"]["split_digits"] = False  # a setting of an earlier version does not count
    (tmp_path / "moved/mine/meta.json").write_text(json.dumps(meta))
    assert prepare(again) == meta


def test_an_interrupted_preparation_counts_as_none(tmp_path, monkeypatch):
    """Whether it stops while it writes, or between two files that it moves."""
    folder = tmp_path / "data" / "arithmetic"
    monkeypatch.setattr(prepare_data, "write_tokens", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, "arithmetic", num_problems=100)
    assert os.listdir(folder) == []
    monkeypatch.undo()
    moves = [os.replace, os.replace, Mock(side_effect=OSError("disk full"))]
    monkeypatch.setattr(prepare_data.os, "replace", lambda *paths: moves.pop(0)(*paths))
    with pytest.raises(OSError, match="disk full"):
        prepared(tmp_path, "arithmetic", num_problems=100)
    monkeypatch.undo()
    assert len(os.listdir(folder)) == 2 and "meta.json" not in os.listdir(folder)
    assert prepared(tmp_path, "arithmetic", num_problems=100, seed=1)[0]["settings"]["seed"] == 1


def test_another_run_in_the_meantime(tmp_path, monkeypatch):
    """Its data are kept."""
    options, write_data = {"data_dir": str(tmp_path / "data"), "num_problems": 100}, prepare_data.write_data

    def slow(*args):
        monkeypatch.setattr(prepare_data, "write_data", write_data)
        prepare(PrepareConfig(**options, seed=1))
        return write_data(*args)

    monkeypatch.setattr(prepare_data, "write_data", slow)
    with pytest.raises(ValueError, match="arithmetic was prepared by another run in the meantime"):
        prepare(PrepareConfig(**options))
    assert json.loads(contents(tmp_path)["meta.json"])["settings"]["seed"] == 1


def test_test_problems_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, test = write(tmp_path / "p.txt", SUMS), write(tmp_path / "test.txt", "q||t #### 5\n")
    prepared(tmp_path, documents="problems", source=source, test_source="test.txt")
    monkeypatch.chdir("/")
    assert read_problems(str(tmp_path / "data" / "mine")) == [("q", "5")] == read_problems(test)


# ---- what is held out

EVERY_NTH = [(0.1, [9, 19, 29, 39]), (0.5, range(1, 40, 2)), (0.03, [32]), (0.15, range(6, 40, 7))]


@pytest.mark.parametrize("fraction, held_out", EVERY_NTH)
def test_every_nth_document_is_held_out(tmp_path, fraction, held_out):
    source = write(tmp_path / "a.txt", MARKED)
    _, splits, encoding = prepared(tmp_path, source=source, val_fraction=fraction)
    train, val = (encoding.decode(tokens.tolist()).split(EOT)[:-1] for tokens in splits.values())
    assert val == [STORIES[i] for i in held_out]
    assert train == [story for i, story in enumerate(STORIES) if i not in held_out]


def test_of_a_single_text_the_end_is_held_out(tmp_path):
    source = write(tmp_path / "a.txt", "0123456789" * 100)
    meta, splits, encoding = prepared(tmp_path, source=source, val_fraction=0.1)
    assert encoding.decode(splits["val"].tolist()) == "0123456789"[1:] + "0123456789" * 9 + EOT
    assert encoding.decode(splits["train"].tolist()) == "0123456789" * 90 + "0"
    assert meta["held_out"] == "the last 10.00% of the text" and meta["tokens"] == {"train": 901, "val": 100}
    assert meta["documents"] == 1 and not meta["opens_with_eot"]


def test_words_are_learned_from_the_training_part_alone(tmp_path):
    stories = [f"{'secret' if i % 10 == 9 else 'public'} words" for i in range(40)]
    source = write(tmp_path / "a.txt", EOT.join(stories))
    meta, _, encoding = prepared(tmp_path, source=source, tokenizer="words", val_fraction=0.1)
    assert meta["tokenizer"]["words"] == ["public", " words"] and meta["vocab_size"] == 259
    assert encoding.encode_ordinary("public words") == [256, 257]
    assert encoding.encode_ordinary("secret") == list(b"secret")


@pytest.mark.parametrize("max_tokens", [1, len(STORIES[0]) + 1, 500, 1000])
def test_max_tokens(tmp_path, max_tokens):
    """Ends with the document that reaches them; one that ends with them is the last."""
    path = write(tmp_path / "a.txt", MARKED)
    meta, splits, _ = prepared(tmp_path, source=path, val_source=path, max_tokens=max_tokens)
    ends = np.cumsum([len(story) + 1 for story in STORIES])
    assert meta["tokens"]["train"] == ends[ends >= max_tokens][0] and splits["train"][-1] == meta["eot_id"]
    assert meta["documents"] == (splits["train"] == meta["eot_id"]).sum()
    assert meta["tokens"]["val"] == len("".join(STORIES)) + 40


# ---- tokenizers


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_round_trip(text):
    assert ENCODINGS["bytes"].encode_ordinary(text) == list(text.encode())
    ids = ENCODINGS["words"].encode_ordinary(text)
    assert ENCODINGS["words"].decode_bytes(ids) == text.encode()
    assert all(i < SPECS["words"]["vocab_size"] - 1 for i in ids)


def test_public_data_sets():
    public = {name: PrepareConfig(name) for name in prepare_data.CORPORA}
    assert [name for name, cfg in public.items() if cfg.documents == "problems"] == ["arithmetic", "gsm8k"]
    for name in ("gsm8k", "wikitext2", "tinystories", "slimpajama"):
        cfg = public[name]
        assert "train" in cfg.source and "valid" in cfg.val_source and "train" not in cfg.val_source, name


def test_a_source_of_ones_own_has_no_public_validation_set(tmp_path):
    source = write(tmp_path / "p.txt", SUMS)
    assert prepared(tmp_path, "gsm8k", source=source)[0]["held_out"] == "1 of every 100 documents"
    assert prepared(tmp_path, "gsm8k", source=source, val_source=source)[0]["held_out"] == source


def test_words_are_the_commonest_pieces():
    spec = make_tokenizer("words", texts=["b b b c c a, 12 12 12 12"], vocab_size=260)
    assert spec["words"] == [" 12", " b", " c"] and spec["vocab_size"] == 260


def test_the_first_ranks_of_gpt2_are_a_bpe():
    if not gpt2_is_there():
        pytest.skip("GPT-2's vocabulary is not there")
    full, small = (load_tokenizer(make_tokenizer("gpt2", vocab_size=size)) for size in (None, 1000))
    assert (full.n_vocab, full.eot_token, small.n_vocab, small.eot_token) == (50257, 50256, 1000, 999)
    text = "Once upon a time there was a café. " + MARKED
    ids = small.encode_ordinary(text)
    assert small.decode(ids) == text and max(ids) < 999
    merges = [full.decode_single_token_bytes(i) for i in range(256, 999)]  # in the order they were learned
    for word in ("there", " upon", "caf\xe9"):  # byte pair encoding, merge by merge
        parts = [bytes([byte]) for byte in word.encode()]
        for merge in merges:
            i = 0
            while i + 1 < len(parts):
                if parts[i] + parts[i + 1] == merge:
                    parts[i : i + 2] = [merge]
                i += 1
        assert [small.decode_single_token_bytes(i) for i in small.encode_ordinary(word)] == parts


def test_wide_vocabulary_is_uint32(tmp_path, monkeypatch):
    spec = {"name": "words", "pattern": prepare_data.PATTERN, "vocab_size": 70001}
    spec["words"] = [f"<{i}>" for i in range(256, 70000)]
    monkeypatch.setattr(prepare_data, "make_tokenizer", Mock(return_value=spec))
    meta, splits, _ = prepared(tmp_path, source=write(tmp_path / "a.txt", MARKED))
    assert meta["dtype"] == "uint32" and splits["val"][-1] == 70000


@pytest.mark.parametrize("kind, tokens", [("problems", [" is", " ", *"123"]), ("marked", [" is", " 123"])])
def test_problems_have_a_token_for_each_digit(tmp_path, kind, tokens):
    path = write(tmp_path / "p.txt", "It is 123||123+123=246 #### 246\n" * 200)
    options = {"source": path, "val_source": path, "documents": kind, "tokenizer": "words"}
    encoding = prepared(tmp_path, **options)[2]
    assert [encoding.decode([i]) for i in encoding.encode(" is 123")] == tokens


def hub_tokenizer(tmp_path, kind):
    """tokenizer.json of a small byte-level BPE, as of GPT-2, Llama 3 and Qwen, or one like Llama 2's."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = {"Llama 2": ["<unk>", "<s>", "</s>"], "Llama 3": ["<|begin_of_text|>", "<|end_of_text|>"]}
    special |= {"GPT-2": [EOT], "two ends": [EOT, "</s>"], "none": []}
    options = {"special_tokens": special[kind], "vocab_size": 400, "show_progress": False}
    if kind == "Llama 2":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # only to learn
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
        options["special_tokens"] += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(STORIES, trainers.BpeTrainer(**options))
    if kind == "Llama 2":
        tokenizer.pre_tokenizer = None
    if kind == "Llama 3":  # it puts a token in front of each text
        start = special[kind][0]
        tokenizer.post_processor = processors.TemplateProcessing(f"{start} $A", None, [(start, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", ["GPT-2", "Llama 2", "Llama 3"])
def test_a_tokenizer_of_the_hub(tmp_path, kind):
    """Its tokens give the text back, in pieces too; what looks like a special token is text."""
    path = Path(hub_tokenizer(tmp_path, kind))
    data = json.loads(path.read_text())
    data["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(data))
    rows = [json.dumps({"text": f"{story} </s><|end_of_text|>{EOT}"}) for story in STORIES]
    source = write(tmp_path / "a.jsonl", "\n".join(rows))
    meta, splits, encoding = prepared(tmp_path, source=source, tokenizer=str(path), val_fraction=0.1)
    documents = np.split(splits["train"], np.flatnonzero(splits["train"] == meta["eot_id"]) + 1)
    assert len(documents) == 37 and encoding.decode(documents[0][:-1].tolist()) == json.loads(rows[0])["text"]
    assert max(splits["train"]) < meta["vocab_size"] == encoding.tokenizer.get_vocab_size()
    for text in ("Once there", " a cat.\n\n It", "é😀 </s><|end_of_text|><|endoftext|>", "\n\nxyz", ""):
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text and meta["eot_id"] not in ids
        assert encoding.encode_ordinary_batch([text, text], num_threads=2) == [ids, ids]
    whole, parts = "It was a cat.", ["It was", " a cat."]
    assert encoding.encode_ordinary(whole) == sum(map(encoding.encode_ordinary, parts), [])
    mark = encoding.decode([meta["eot_id"]])
    assert encoding.encode(f"a{mark}", allowed_special="all")[-1] == meta["eot_id"]


def test_a_model_of_the_hub_names_its_tokenizer(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    there = tokenizers.Tokenizer.from_file(hub_tokenizer(tmp_path, "GPT-2"))
    there.add_special_tokens(["</s>"])  # an end-of-text comes first
    hub = SimpleNamespace(from_pretrained=Mock(return_value=there), from_str=tokenizers.Tokenizer.from_str)
    monkeypatch.setattr(tokenizers, "Tokenizer", hub)
    spec = make_tokenizer("someone/model")
    hub.from_pretrained.assert_called_once_with("someone/model")
    assert spec["eot"] == EOT and spec["vocab_size"] == there.get_vocab_size()


@pytest.mark.parametrize("eos", [None, 0, 1, [7, 1]])
def test_a_config_chooses_among_ends_of_text(tmp_path, eos):
    path = hub_tokenizer(tmp_path, "two ends")
    write(tmp_path / "config.json", json.dumps({"eos_token_id": eos}))
    assert make_tokenizer(path)["eot"] == (EOT if eos in (None, 0) else "</s>")


def test_bad_tokenizers(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    source = write(tmp_path / "a.txt", MARKED)
    with pytest.raises(ValueError, match="lacks an end-of-text token"):
        prepared(tmp_path, source=source, tokenizer=hub_tokenizer(tmp_path, "none"))
    path = Path(hub_tokenizer(tmp_path, "GPT-2"))
    path.write_text(re.sub(r'("add_prefix_space": ?)false', r"\1true", path.read_text()))
    with pytest.raises(ValueError, match="the tokenizer loses text: '.t' comes back as ' .t'"):
        prepared(tmp_path, source=source, tokenizer=str(path))
    with pytest.raises(ValueError, match="tokenizer .*a.txt' cannot be loaded .*; wanted gpt2, bytes, words"):
        prepared(tmp_path, source=source, tokenizer=source)
    spec = make_tokenizer(hub_tokenizer(tmp_path, "GPT-2"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="run: pip install tokenizers"):
        load_tokenizer(spec)


# ---- arithmetic, problems and their parts


def test_arithmetic_is_right_and_disjoint(tmp_path):
    _, splits, encoding = prepared(tmp_path, "arithmetic", num_problems=3000, tokenizer="words")
    texts_of_split = {k: encoding.decode(tokens.tolist()).split(EOT)[:-1] for k, tokens in splits.items()}
    for name, key in {"train": "train", "valid": "val", "test": "test"}.items():
        lines = (tmp_path / "data" / "arithmetic" / f"{name}.txt").read_text().splitlines()
        texts = ["Question: " + line.replace("||", " Answer: ") for line in lines]
        assert texts_of_split.setdefault(key, texts) == texts
    assert [len(texts) for texts in texts_of_split.values()] == [3000, 1000, 1000]
    texts = sum(texts_of_split.values(), [])
    questions = {text.split(" Answer:")[0].removeprefix("Question: ") for text in texts}
    assert len(questions) == 5000 and {grammar.check(text) for text in texts} == {"right"}
    assert {grammar.check(text.replace("=", "=1")) for text in texts} == {"parses"}  # the oracle is awake
    for pattern, _ in grammar.PATTERNS:
        assert any(pattern.fullmatch(question) for question in questions)


def test_arithmetic_follows_from_the_seed(tmp_path, monkeypatch):
    """Byte for byte, on any number of threads, also in files that are longer than one piece of work."""
    monkeypatch.setattr(prepare_data, "PIECE", 1000)
    made = []
    for seed, cpus in ((0, 1), (0, 7), (1, 7)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        prepared(tmp_path, "arithmetic", num_problems=300, tokenizer="words", seed=seed)
        made.append(contents(tmp_path))
    assert made[0].keys() >= {"train.bin", "val.bin", "train_cuts.npy", "meta.json"}
    assert made[0] == made[1] and made[0]["test.txt"] != made[2]["test.txt"]


def test_arithmetic_is_shuffled(tmp_path, monkeypatch):
    """Neither the split nor the line of a problem says when it was drawn."""
    numbers = iter(range(3000))
    monkeypatch.setattr(prepare_data, "make_problem", lambda rng: f"q{next(numbers)}||<<1+1=2>> #### 2")
    prepared(tmp_path, "arithmetic", num_problems=1000)
    for name in ("train", "valid", "test"):
        text = contents(tmp_path)[f"{name}.txt"].decode()
        drawn = np.array([int(number) for number in re.findall(r"q(\d+)", text)])
        assert abs(drawn.mean() - 1499.5) < 100  # standard error 22; unshuffled, off by 1,000
        assert abs(np.corrcoef(drawn, np.arange(1000))[0, 1]) < 0.15  # standard error 0.03


def problem_parts(tmp_path, split, tokens, encoding):
    """The problems of a split, cut apart as sft_gsm8k.py does it."""
    cuts = np.load(tmp_path / "data" / "mine" / f"{split}_cuts.npy")
    return [[encoding.decode(tokens[a:b].tolist()) for a, b in zip(row, row[1:])] for row in cuts]


def test_cuts_of_held_out_problems(tmp_path):
    path = write(tmp_path / "p.txt", SUMS)
    _, splits, encoding = prepared(tmp_path, source=path, documents="problems", val_fraction=0.1)
    train = [parts for i, parts in enumerate(PARTS) if i % 10 != 9]
    assert problem_parts(tmp_path, "train", splits["train"], encoding) == train
    assert problem_parts(tmp_path, "val", splits["val"], encoding) == PARTS[9::10]


@pytest.mark.parametrize("max_tokens", [1e30, *range(1000, 1080, 13)])
def test_cuts_leave_out_a_problem_that_max_tokens_cuts(tmp_path, max_tokens):
    path = write(tmp_path / "p.txt", SUMS)
    options = {"source": path, "val_source": path, "documents": "problems", "max_tokens": max_tokens}
    meta, splits, encoding = prepared(tmp_path, **options)
    n = splits["train"].tolist().count(meta["eot_id"])
    assert problem_parts(tmp_path, "train", splits["train"], encoding) == PARTS[:n] and n == meta["documents"]
    assert problem_parts(tmp_path, "val", splits["val"], encoding) == PARTS


@settings(max_examples=200, deadline=None)
@given(texts=st.tuples(*[st.text(max_size=20)] * 3))
@pytest.mark.parametrize("name", ENCODINGS)
def test_the_parts_of_a_problem_have_the_tokens_of_the_whole(name, texts):
    """What makes it right to encode a question alone, and to go on with token ids, at evaluation."""
    row = {"question": texts[0], "answer": f"<<{texts[1]}>>#### {texts[2]}"}
    with contextlib.suppress(ValueError):
        parts = prepare_data.parse(row, "problems", None)
        tokens = [token for part in parts for token in ENCODINGS[name].encode_ordinary(part)]
        assert tokens == ENCODINGS[name].encode_ordinary("".join(parts))


DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.exists(), reason="the real files are not there")
def test_openai_test_set_is_whole():
    problems = read_problems(str(DATA / "gsm8k" / "test.jsonl"))
    assert len(problems) == 1319 and problems == read_problems(str(DATA / "gsm8k" / "test.txt"))


def test_a_folder_trains_on_its_training_part(tmp_path, capsys):
    """Files named test, dev or validation are left out, and said; not if they are given by name, or alone."""
    for name in "train-0 validation-0 sub/test sub/dev-1 contest latest".split():
        write(tmp_path / "clone" / f"{name}.txt", "a" * 50)
    clone = str(tmp_path / "clone")
    names = [f"{clone}/{name}.txt" for name in ("contest", "latest", "train-0")]
    assert find_files(clone, "", training=True) == names
    assert "files left out: 3 (of another kind, or held out by their names: " in capsys.readouterr().out
    assert find_files(f"{clone}/validation-0.txt", "", training=True) == [f"{clone}/validation-0.txt"]
    assert len(find_files(f"{clone}/sub", "", training=True)) == 2
    assert len(find_files(clone, "")) == 6  # to validate or to test
    assert prepared(tmp_path, source=clone, val_source=clone)[0]["tokens"] == {"train": 153, "val": 306}
