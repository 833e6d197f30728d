"""Corpora in, token files out: nothing lost, nothing invented, the same bytes every time."""

import base64
import collections
import gzip
import hashlib
import json
import lzma
import random
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import grammar
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from prepare_data import EOT, PrepareConfig, Source, load_tokenizer, make_tokenizer, prepare

STORIES = [f"Story {i}.\nOnce there was a cat.\n\nIt was {i} years old, or 1{i}." for i in range(40)]
MARKED, ROWS = f"\n{EOT}\n".join(STORIES), [json.dumps({"text": story, "id": 1}) + "\n" for story in STORIES]
ARTICLES = [" = A = \n \n Text . \n = = Part = = \n \n More . \n \n", " = Next one = \n \n B = c . \n"] * 9
PROBLEM = "Question: Two  more? Answer: <<3+2=5>> <<5*2=10>> #### 10"
ROW = json.dumps({"question": "Two  more? ", "answer": "#### <<3+2=5>>5, then $<<5*2=10>>10\n#### 10"})
SUMS = "".join(f"{i}+1? ####||<<{i}+1={i + 1}>> #### {i + 1}\n" for i in range(200))
PARTS = [[f"Question: {i}+1? ####", f" Answer: <<{i}+1={i + 1}>>", f" #### {i + 1}{EOT}"] for i in range(200)]
SPECS = {name: make_tokenizer(name, True, 400, STORIES) for name in ("bytes", "bpe")}
ENCODINGS = {name: load_tokenizer(json.loads(json.dumps(spec))) for name, spec in SPECS.items()}


def write(path, text):
    """'\\udcff' in text becomes the byte 0xff."""
    path.parent.mkdir(exist_ok=True)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", errors="surrogateescape") as file:
        file.write(text)
    return str(path)


def prepared(tmp_path, name="text", **kwargs):
    """meta, {split: tokens} and the tokenizer."""
    prepare(PrepareConfig(name=name, data_dir=str(tmp_path / "data"), **{"tokenizer": "bytes", **kwargs}))
    folder = tmp_path / "data" / name
    meta = json.loads((folder / "meta.json").read_text())
    splits = {split: np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val")}
    return meta, splits, load_tokenizer(meta["tokenizer"])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("data/*/*")}


SOURCES = [
    *[("text", f"a.txt{packed}", MARKED, STORIES) for packed in ("", ".gz", ".xz")],
    *[("text", f"a.jsonl{packed}", "".join(ROWS), STORIES) for packed in ("", ".gz")],
    ("text", "long.jsonl", json.dumps({"text": "long" * 999}) + "\n" + ROWS[0], ["long" * 999, STORIES[0]]),
    ("text", "half_a_pair.jsonl", '{"text": "a\\ud83db"}\n\n{"text": "c"}\n', ["a?b", "c"]),
    ("wikitext2", "w.txt", " \n" + "".join(ARTICLES), ARTICLES),
    ("gsm8k", "p.txt", "Two  more?||<<3+2=5>> <<5*2=10>> #### 10\n" * 3, [PROBLEM] * 3),
    ("gsm8k", "p.jsonl", f"{ROW}\n" * 3, [PROBLEM] * 3),
]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("name, file, text, wanted", SOURCES)
def test_every_source_keeps_every_document(tmp_path, monkeypatch, tokenizer, name, file, text, wanted):
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 100)
    options = {"source": write(tmp_path / file, text), "tokenizer": tokenizer, "vocab_size": 300}
    meta, splits, encoding = prepared(tmp_path, name, **options, val_fraction=0.2)
    texts = encoding.decode([*splits["train"].tolist(), *splits["val"].tolist()]).split(EOT)
    assert texts == [*wanted, ""]
    assert meta["documents"] == len(wanted) and meta["source"] == options["source"]
    assert meta["dtype"] == "uint16" and max(splits["train"]) < meta["vocab_size"] == meta["eot_id"] + 1
    assert meta["sha256"]["val"] == hashlib.sha256(splits["val"].tobytes()).hexdigest()
    assert meta["tokens"] == {split: len(tokens) for split, tokens in splits.items()}


def test_a_folder_is_read_whole(tmp_path):
    files = {"b.txt": EOT.join(STORIES[15:]), "a/a.jsonl": "".join(ROWS[:15]), "readme.md": "not data"}
    for file, text in files.items():
        write(tmp_path / file, text)
    assert [text for text, _ in Source(str(tmp_path), "marked", "")] == STORIES


def test_long_document_is_cut_between_tokens(tmp_path, monkeypatch):
    """Encoded in pieces, a document has the tokens it has as a whole, blank lines and all."""
    rng = random.Random(0)
    words = ["word ", "12", "\n", "\n\n", "  ", "a. ", "\t", "The end.\n", " x\n"]
    text = "".join(rng.choice(words) for _ in range(20000))
    path = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 300)
    assert len(list(Source(path, "marked", ""))) > 100
    _, splits, encoding = prepared(tmp_path, source=path, tokenizer="bpe", vocab_size=400)
    tokens = [*splits["train"].tolist(), *splits["val"].tolist()]
    assert tokens == [*encoding.encode_ordinary(text), encoding.eot_token]


def test_a_line_longer_than_memory_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 1000)
    path = write(tmp_path / "a.txt", "a" + " " * 80000 + "b")
    assert max(len(text) for text, _ in Source(path, "marked", "")) <= 18000
    _, splits, encoding = prepared(tmp_path, source=path)
    assert (
        encoding.decode([*splits["train"].tolist(), *splits["val"].tolist()]) == "a" + " " * 80000 + "b" + EOT
    )


def test_hub_data_sets_stream(tmp_path, monkeypatch):
    load = Mock(return_value=[{"text": story} for story in STORIES])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    assert prepared(tmp_path, "fineweb_edu")[0]["documents"] == 40
    load.assert_called_once_with("HuggingFaceFW/fineweb-edu", "sample-10BT", split="train", streaming=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        prepared(tmp_path, "openwebtext")


def test_urls_are_fetched_once_and_kept_apart(tmp_path):
    urls = {}
    for key, text in {"source": "train " * 50, "val_source": "valid"}.items():
        urls[key] = "file://" + write(tmp_path / key / "t.txt", text)
    for _ in range(2):
        assert prepared(tmp_path, **urls)[0]["tokens"] == {"train": 301, "val": 6}
        (tmp_path / "source" / "t.txt").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="cannot download file:.*give the path of a local copy"):
        prepared(tmp_path, source=urls["source"] + "x")


BAD_SOURCES = [
    ("a.txt", "\n \n", {}, "is empty"),
    ("a.txt", "text", {"max_tokens": 1}, "max_tokens too small"),
    ("a.txt", "fine so far " * 1000 + "\udcff", {}, "a.txt cannot be read as UTF-8 text"),
    ("a.txt", "version https://git-lfs.github.com/spec/v1\nsize 1\n", {}, "Git LFS pointer"),
    ("a.jsonl", ROWS[0] + "{\n", {}, "a.jsonl, line 2: wanted JSON with a 'text' field"),
    ("a.jsonl", '{"a": 1}\n', {}, "a.jsonl, line 1: wanted JSON with a 'text' field"),
    ("a.txt", "text", {"tokenizer": "gpt5"}, "unknown tokenizer 'gpt5'; there are gpt2, bytes, bpe"),
    ("a.txt", "text", {"tokenizer": "bpe", "vocab_size": 0}, "bpe needs at least 258"),
    ("a.txt", "text", {"val_fraction": 1.5}, "val_fraction is 1.5"),
    ("a.txt", "text", {"name": "nonsense"}, "unknown data set 'nonsense'; there are arithmetic"),
    ("a.txt", "text", {"name": "arithmetic"}, "arithmetic is generated"),
    ("a.txt", "", {"name": "arithmetic", "source": None, "num_problems": 10**6}, "good for 1 to 100,000"),
    ("a.txt", "q||t #### 1", {"name": "gsm8k"}, "has too few problems"),
    ("a.txt", "no problem", {"name": "gsm8k"}, "is empty"),
    ("a.txt", "", {"name": "gsm8k", "source": "hub:a/b"}, "hub:a/b: problems are read from files"),
]


@pytest.mark.parametrize("file, text, options, message", BAD_SOURCES)
def test_bad_sources_overwrite_nothing(tmp_path, file, text, options, message):
    prepared(tmp_path, source=write(tmp_path / "good.txt", MARKED))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **{"source": write(tmp_path / file, text), **options})
    assert before.keys() == {"train.bin", "val.bin", "meta.json"} and contents(tmp_path) == before


def test_wide_vocabulary_is_uint32(tmp_path, monkeypatch):
    ranks = [bytes([b]) for b in range(256)] + [f"<{i}>".encode() for i in range(256, 70000)]
    spec = {"name": "wide", "pattern": prepare_data.PATTERN, "vocab_size": 70001}
    spec["ranks"] = [base64.b64encode(token).decode() for token in ranks]
    monkeypatch.setattr(prepare_data, "make_tokenizer", Mock(return_value=spec))
    meta, splits, _ = prepared(tmp_path, source=write(tmp_path / "a.txt", MARKED))
    assert meta["dtype"] == "uint32" and splits["val"][-1] == 70000


@pytest.mark.parametrize("lengths, fraction, n", [([99] * 10, 0.25, 200), ([8999, 3], 0.1, 900)])
def test_validation_starts_with_a_document_if_one_is_near(tmp_path, lengths, fraction, n):
    source = write(tmp_path / "a.txt", EOT.join("x" * length for length in lengths))
    assert prepared(tmp_path, source=source, val_fraction=fraction)[0]["tokens"]["val"] == n


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_round_trip(text):
    assert ENCODINGS["bytes"].encode_ordinary(text) == list(text.encode())
    ids = ENCODINGS["bpe"].encode_ordinary(text)
    assert ENCODINGS["bpe"].decode_bytes(ids) == text.encode()
    assert all(i < SPECS["bpe"]["vocab_size"] - 1 for i in ids)


@pytest.mark.parametrize("name, tokens", [("gsm8k", [" is", " ", "1", "2", "3"]), ("text", [" is", " 123"])])
def test_problems_have_a_token_for_each_digit(tmp_path, name, tokens):
    path = write(tmp_path / "p.txt", "It is 123||123+123=246 #### 246\n" * 50)
    encoding = prepared(tmp_path, name, source=path, tokenizer="bpe", vocab_size=400)[2]
    assert [encoding.decode([i]) for i in encoding.encode(" is 123")] == tokens


def brute_force_bpe(words, n):
    words, merges = [[bytes([b]) for b in word.encode()] for word in words], []
    for _ in range(n):
        counts = collections.Counter(a + b for word in words for a, b in zip(word, word[1:]))
        best = min(counts.keys() - merges, key=lambda pair: (-counts[pair], pair), default=b"")
        if counts[best] < 2:
            break
        merges.append(best)
        for word in words:
            for i in range(len(word)):
                if b"".join(word[i : i + 2]) == best:
                    word[i : i + 2] = [best]
    return merges


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text("abc", min_size=1, max_size=8), min_size=5, max_size=30), n=st.integers(1, 40))
def test_bpe_equals_counting_anew_after_every_merge(words, n):
    tokens = list(prepare_data.train_bpe([" ".join(words)], r"\w+|\s", 256 + n))
    assert tokens[256:] == brute_force_bpe(words, n)


def test_arithmetic_is_right_and_disjoint(tmp_path):
    _, splits, encoding = prepared(tmp_path, "arithmetic", num_problems=3000, tokenizer="bpe")
    documents = {split: encoding.decode(tokens.tolist()).split(EOT)[:-1] for split, tokens in splits.items()}
    for name, key in {"train": "train", "valid": "val", "test": "test"}.items():
        lines = (tmp_path / "data" / "arithmetic" / f"{name}.txt").read_text().splitlines()
        texts = ["Question: " + line.replace("||", " Answer: ") for line in lines]
        assert documents.setdefault(key, texts) == texts
    assert {key: len(texts) for key, texts in documents.items()} == {"train": 3000, "val": 1000, "test": 1000}
    texts = sum(documents.values(), [])
    questions = {text.split(" Answer:")[0].removeprefix("Question: ") for text in texts}
    assert len(questions) == 5000 and {grammar.check(text) for text in texts} == {"right"}
    assert {grammar.check(text.replace("=", "=1")) for text in texts} == {"parses"}  # the oracle is awake
    for pattern, _ in grammar.PATTERNS:
        assert any(pattern.fullmatch(question) for question in questions)


def test_arithmetic_follows_from_the_seed(tmp_path):
    made = []
    for seed in (0, 0, 1):
        prepared(tmp_path, "arithmetic", num_problems=300, tokenizer="bpe", seed=seed)
        made.append(contents(tmp_path))
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
    cuts = np.load(tmp_path / "data" / "gsm8k" / f"{split}_cuts.npy")
    return [[encoding.decode(tokens[a:b].tolist()) for a, b in zip(row, row[1:])] for row in cuts]


@pytest.mark.parametrize("fraction, n", [(0.1, 20), (1e-6, 1)])
def test_cuts_of_held_out_problems(tmp_path, monkeypatch, fraction, n):
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 100)  # pieces of work that end anywhere in a problem
    path = write(tmp_path / "p.txt", SUMS)
    _, splits, encoding = prepared(tmp_path, "gsm8k", source=path, val_fraction=fraction)
    assert problem_parts(tmp_path, "train", splits["train"], encoding) == PARTS[:-n]
    assert problem_parts(tmp_path, "val", splits["val"], encoding) == PARTS[-n:]


@pytest.mark.parametrize("max_tokens", [None, *range(1000, 1080, 13)])
def test_cuts_leave_out_a_problem_that_max_tokens_cuts(tmp_path, max_tokens):
    path = write(tmp_path / "p.txt", SUMS)
    options = {"source": path, "val_source": path, "max_tokens": max_tokens}
    meta, splits, encoding = prepared(tmp_path, "gsm8k", **options)
    n = splits["train"].tolist().count(meta["eot_id"])
    assert problem_parts(tmp_path, "train", splits["train"], encoding) == PARTS[:n] and n == meta["documents"]
    assert problem_parts(tmp_path, "val", splits["val"], encoding) == PARTS
    assert len(splits["train"]) == (max_tokens or len(splits["val"]))


@settings(max_examples=200, deadline=None)
@given(texts=st.tuples(*[st.text(max_size=20)] * 3))
@pytest.mark.parametrize("name", ENCODINGS)
def test_the_parts_of_a_problem_have_the_tokens_of_the_whole(name, texts):
    """What makes it right to encode a question alone, and to go on with token ids, at evaluation."""
    line = json.dumps({"question": texts[0], "answer": f"<<{texts[1]}>>#### {texts[2]}"})
    counts = SimpleNamespace(malformed=0, first_malformed=None)
    pieces = [text for text, _ in Source.split_problem(counts, line, True, "")]
    tokens = [token for piece in pieces for token in ENCODINGS[name].encode_ordinary(piece)]
    assert tokens == ENCODINGS[name].encode_ordinary("".join(pieces))


LINES = {  # a good one, then bad ones
    "p.txt": ["q||<<1+1=2>> #### 2", "no bars #### 3", "q||no answer", "||x #### 1", "q||#### "],
    "p.jsonl": [ROW, '{"question": "q"}', '{"question": 1, "answer": "#### 1"}', "[1]", "{broken"],
}


@pytest.mark.parametrize("file", LINES)
def test_malformed_lines_are_counted(tmp_path, capsys, file):
    good, *bad = LINES[file]
    path = write(tmp_path / file, "\n".join([good] * 30 + bad + [""] + [good] * 30))
    meta, _, _ = prepared(tmp_path, "gsm8k", source=path, tokenizer="bpe", vocab_size=300)  # is read twice
    printed = capsys.readouterr().out
    assert meta["documents"] == 60 and f"left out {len(bad)} lines that are not question||" in printed
    assert f"{file}, line 31" in printed
