"""Corpora in, token files out: nothing lost, nothing invented, the same bytes every time.

python -m pytest tests/test_prepare_data.py
"""

import gzip
import json
import lzma
import random
import sys
from types import SimpleNamespace

import grammar
import numpy as np
import pytest
import tiktoken
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from prepare_data import (
    DIGIT_PATTERN,
    EOT,
    PATTERN,
    PrepareConfig,
    Source,
    load_tokenizer,
    make_tokenizer,
    prepare,
)

STORIES = [f"Story {i}.\nOnce there was a cat.\n\nIt was {i} years old, or 1{i}.\n" for i in range(40)]


def read(folder):
    meta = json.loads((folder / "meta.json").read_text())
    splits = {split: np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val")}
    return meta, splits, load_tokenizer(meta["tokenizer"])


def prepared(tmp_path, name="text", **kwargs):
    prepare(PrepareConfig(name=name, data_dir=str(tmp_path / "data"), **{"tokenizer": "bytes", **kwargs}))
    return read(tmp_path / "data" / name)


def as_document(line):
    return "Question: " + line.replace("||", " Answer: ")


def documents(tokens, tokenizer):
    return tokenizer.decode(tokens.tolist()).split(EOT)


@pytest.mark.parametrize("form", ["txt", "txt.gz", "txt.xz", "jsonl", "jsonl.gz", "folder"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_source_keeps_every_document(tmp_path, form, tokenizer):
    text = f"{EOT}\n".join(STORIES)
    rows = "".join(json.dumps({"text": story, "id": 1}) + "\n" for story in STORIES)
    path = tmp_path / f"corpus.{form}"
    if form == "folder":
        (path / "deep").mkdir(parents=True)
        (path / "a.txt").write_text(f"{EOT}\n".join(STORIES[:15]))
        (path / "deep" / "b.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in STORIES[15:]))
        (path / "readme.md").write_text("not data")
    else:
        opener = {"gz": gzip.open, "xz": lzma.open}.get(form.split(".")[-1], open)
        with opener(path, "wt") as file:
            file.write(rows if "jsonl" in form else text)
    meta, splits, encoding = prepared(
        tmp_path, source=str(path), tokenizer=tokenizer, vocab_size=300, val_fraction=0.2
    )
    found = documents(np.concatenate([splits["train"], splits["val"]]), encoding)
    assert found.pop() == "" and [d.strip("\n") for d in found] == [s.strip("\n") for s in STORIES]
    assert meta["documents"] == 40 and meta["dtype"] == "uint16" and meta["tokenizer"]["name"] == tokenizer
    assert {k: len(v) for k, v in splits.items()} == meta["tokens"]
    assert splits["train"][-1] == meta["eot_id"]  # validation starts with a document
    assert len(splits["val"]) / len(splits["train"]) == pytest.approx(0.25, abs=0.05)
    assert max(splits["train"]) < meta["vocab_size"]


def test_long_document_is_cut_where_no_token_is(tmp_path, monkeypatch):
    """Encoded in pieces, a document has the tokens it has as a whole: with GPT-2's pattern, blank lines and all."""
    rng = random.Random(0)
    text = "".join(
        rng.choice(["word ", "12", "\n", "\n\n", "  ", "a. ", "\t", "The end.\n", " x\n"])
        for _ in range(20000)
    )
    (tmp_path / "a.txt").write_text(text)
    whole = prepared(tmp_path, source=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=400)
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 300)
    pieces = list(Source(str(tmp_path / "a.txt"), "marked", ""))
    assert (
        len(pieces) > 100
        and "".join(p for p, _ in pieces) == text
        and [end for _, end in pieces].count(True) == 1
    )
    spec = whole[0]["tokenizer"]
    tokens, sizes = prepare_data.encode(pieces, load_tokenizer(spec), np.uint16)
    assert len(sizes) == len(pieces) and sum(sizes) == len(tokens)
    assert (tokens == spec["vocab_size"] - 1).sum() == 1 and tokens.tolist() == np.concatenate(
        [whole[1]["train"], whole[1]["val"]]
    ).tolist()
    assert tokens[:-1].tolist() == load_tokenizer(spec).encode_ordinary(text)


def test_a_line_longer_than_memory_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 1000)
    text = "abc " * 20000
    (tmp_path / "a.txt").write_text(text)
    pieces = list(Source(str(tmp_path / "a.txt"), "marked", ""))
    assert max(len(p) for p, _ in pieces) <= 18000 and "".join(p for p, _ in pieces) == text


def test_rerun_is_identical_and_atomic(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(EOT.join(STORIES))
    options = {"source": str(tmp_path / "a.txt"), "tokenizer": "bpe", "vocab_size": 300, "val_fraction": 0.2}
    prepared(tmp_path, **options)
    folder = tmp_path / "data" / "text"
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(first) == {"train.bin", "val.bin", "meta.json"}
    prepared(tmp_path, **options)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
    (tmp_path / "broken.txt").write_bytes(b"fine so far " * 1000 + b"\xff\xfe")
    with pytest.raises(ValueError, match=r"broken.txt cannot be read as UTF-8 text"):
        prepared(tmp_path, source=str(tmp_path / "broken.txt"))
    assert {
        p.name: p.read_bytes() for p in folder.iterdir()
    } == first  # nothing overwritten, nothing left behind


def test_meta_describes_the_files(tmp_path):
    import hashlib

    (tmp_path / "a.txt").write_text(EOT.join(STORIES))
    meta, splits, encoding = prepared(tmp_path, source=str(tmp_path / "a.txt"))
    folder = tmp_path / "data" / "text"
    for split in splits:
        assert meta["sha256"][split] == hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
    assert (meta["vocab_size"], meta["eot_id"], meta["source"]) == (257, 256, str(tmp_path / "a.txt"))


def test_wide_vocabulary_is_uint32(tmp_path, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {f"<{i}>".encode(): i for i in range(256, 70000)}
    encoding = tiktoken.Encoding("wide", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 70000})
    monkeypatch.setattr(
        prepare_data,
        "make_tokenizer",
        lambda *args: {"name": "wide", "pattern": PATTERN, "vocab_size": 70001},
    )
    monkeypatch.setattr(prepare_data, "load_tokenizer", lambda spec: encoding)
    (tmp_path / "a.txt").write_text(EOT.join(STORIES))
    prepare(PrepareConfig(name="text", data_dir=str(tmp_path / "data"), source=str(tmp_path / "a.txt")))
    meta = json.loads((tmp_path / "data" / "text" / "meta.json").read_text())
    assert meta["dtype"] == "uint32"
    assert np.fromfile(tmp_path / "data" / "text" / "val.bin", "uint32")[-1] == 70000


def test_max_tokens_and_val_source(tmp_path):
    (tmp_path / "a.txt").write_text(EOT.join(STORIES))
    (tmp_path / "v.txt").write_text("held out")
    paths = {"source": str(tmp_path / "a.txt"), "val_source": str(tmp_path / "v.txt")}
    meta, splits, encoding = prepared(tmp_path, **paths, max_tokens=100)
    assert meta["documents"] == splits["train"].tolist().count(256) == 1
    assert (
        meta["tokens"] == {"train": 100, "val": 9}
        and encoding.decode(splits["val"][:-1].tolist()) == "held out"
    )


def test_download_of_a_url(tmp_path):
    (tmp_path / "a.txt").write_text(EOT.join(STORIES))
    meta, splits, _ = prepared(tmp_path, source=(tmp_path / "a.txt").as_uri())
    assert meta["documents"] == 40
    (tmp_path / "a.txt").unlink()
    prepared(tmp_path, source=(tmp_path / "a.txt").as_uri())  # fetched once
    with pytest.raises(ValueError, match="cannot download file:.*give the path of a local copy"):
        prepared(tmp_path, source=(tmp_path / "b.txt").as_uri())


def test_downloads_of_one_name_are_kept_apart(tmp_path):
    for folder, text in {"a": "train " * 50, "b": "valid"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text(text)
    urls = {"source": (tmp_path / "a" / "t.txt").as_uri(), "val_source": (tmp_path / "b" / "t.txt").as_uri()}
    assert prepared(tmp_path, **urls)[0]["tokens"] == {"train": 301, "val": 6}


def test_validation_is_not_tiny_because_of_one_long_document(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 9000 + EOT + "end")
    assert prepared(tmp_path, source=str(tmp_path / "a.txt"), val_fraction=0.1)[0]["tokens"]["val"] == 900


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83db"}\n\n{"text": "c"}\n')
    meta, splits, encoding = prepared(tmp_path, source=str(tmp_path / "a.jsonl"))
    assert encoding.decode(splits["train"].tolist()).startswith("a?b") and meta["documents"] == 2


def test_hub_data_sets_stream(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ({"text": story} for story in STORIES)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    meta, _, _ = prepared(tmp_path, name="fineweb_edu", max_tokens=500)
    assert calls == [(("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "train", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        prepared(tmp_path, name="openwebtext")


def test_wikitext_articles_are_documents(tmp_path):
    text = " \n = First = \n \n Some text . \n = = Section = = \n \n More . \n \n = Second one = \n \n Text = here \n"
    (tmp_path / "w.txt").write_text(text * 20)
    meta, splits, encoding = prepared(tmp_path, name="wikitext2", source=str(tmp_path / "w.txt"))
    found = documents(np.concatenate([splits["train"], splits["val"]]), encoding)
    assert (
        meta["documents"] == 40
        and found[1].startswith(" = Second one = \n")
        and " = = Section = = \n" in found[0]
    )


# ---- tokenizers


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_round_trip(name, text):
    spec = make_tokenizer(name, split_digits=True, vocab_size=400, texts=STORIES)
    tokenizer = load_tokenizer(json.loads(json.dumps(spec)))
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode_bytes(ids) == text.encode() and all(i < spec["vocab_size"] - 1 for i in ids)
    if name == "bytes":
        assert ids == list(text.encode())


def test_digits_are_tokens():
    texts = ["There were 1234 cats in 1234 boxes. 1234+1234=2468\n"] * 50
    split = load_tokenizer(make_tokenizer("bpe", True, 400, texts))
    assert [split.decode([i]) for i in split.encode(" in 1234")] == [" in", " ", "1", "2", "3", "4"]
    joined = load_tokenizer(make_tokenizer("bpe", False, 400, texts))
    assert [joined.decode([i]) for i in joined.encode(" in 1234")] == [" in", " 1234"]


def brute_force_bpe(words, n):
    words, found = [[bytes([b]) for b in w.encode()] for w in words], []
    for _ in range(n):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair[0] + pair[1]] = counts.get(pair[0] + pair[1], 0) + 1
        best = min((p for p in counts if p not in found), key=lambda p: (-counts[p], p))
        found.append(best)
        for i, word in enumerate(words):
            merged = []
            for part in word:
                if merged and merged[-1] + part == best:
                    merged[-1] = best
                else:
                    merged.append(part)
            words[i] = merged
    return found


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text("abc", min_size=1, max_size=8), min_size=5, max_size=30), n=st.integers(1, 12))
def test_bpe_equals_counting_anew_after_every_merge(words, n):
    ours = list(prepare_data.train_bpe([" ".join(words)], r"\w+|\s", 256 + n))[256:]
    theirs = brute_force_bpe(words, len(ours)) if ours else []
    assert ours == theirs


# ---- arithmetic and problem lines


def test_arithmetic_is_right_disjoint_and_reproducible(tmp_path):
    for folder in ("one", "two"):
        prepare(PrepareConfig(data_dir=str(tmp_path / folder), num_problems=3000))
    one, two = (tmp_path / f / "arithmetic" for f in ("one", "two"))
    texts, arrays = (
        {"train.txt", "valid.txt", "test.txt"},
        {"train.bin", "val.bin", "train_cuts.npy", "val_cuts.npy"},
    )
    assert {p.name for p in one.iterdir()} == {*texts, *arrays, "meta.json"}
    assert all((one / p.name).read_bytes() == p.read_bytes() for p in two.iterdir())
    lines = {split: (one / f"{split}.txt").read_text().splitlines() for split in ("train", "valid", "test")}
    assert {k: len(v) for k, v in lines.items()} == {"train": 3000, "valid": 1000, "test": 1000}
    every = [line for part in lines.values() for line in part]
    assert len({line.split("||")[0] for line in every}) == len(every)
    assert all(grammar.check(as_document(line)) == "right" for line in every)
    used = {
        i
        for line in every
        for i, (pattern, _) in enumerate(grammar.PATTERNS)
        if pattern.fullmatch(line.split("||")[0])
    }
    assert used == set(range(len(prepare_data.TEMPLATES))) and len(used) >= 10
    operators = {line.count("<<") for line in every}
    assert operators == {1, 2} and all(any(o in line.split("||")[1] for line in every) for o in "+-*/")
    meta, splits, encoding = read(one)
    assert documents(splits["train"], encoding)[:-1] == [as_document(line) for line in lines["train"]]
    assert documents(splits["val"], encoding)[:-1] == [as_document(line) for line in lines["valid"]]
    prepare(PrepareConfig(data_dir=str(tmp_path / "two"), num_problems=3000, seed=1))
    assert lines["test"] != (two / "test.txt").read_text().splitlines()


def test_the_grammar_oracle_sees_mistakes():
    good = "Question: Tom has 3 apples and buys 4 more. How many now? Answer: <<3+4=7>> #### 7"
    assert grammar.check(good) == "right"
    for bad in (good.replace("=7", "=8"), good.replace("#### 7", "#### 8"), good.replace("<<3", "<<5")):
        assert grammar.check(bad) == "parses"
    for bad in (
        good.replace("Answer:", "Answer"),
        good.replace("buys", "eats"),
        good.replace("3+4", "3-4"),
        good + " x",
        "",
    ):
        assert grammar.check(bad) == "no"


def parts(folder, split):
    """The problems of a split, cut apart as sft_gsm8k.py does it."""
    meta, splits, encoding = read(folder)
    cuts = np.load(folder / f"{split}_cuts.npy")
    pieces = [[splits[split][a:b].tolist() for a, b in zip(cut, cut[1:])] for cut in cuts]
    assert all(answer.pop() == meta["eot_id"] for _, _, answer in pieces)
    return [tuple(encoding.decode(ids) for ids in problem) for problem in pieces]


def test_cuts_find_the_parts_of_every_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 100)  # pieces of work that end anywhere in a problem
    lines = [f"How many are {i}+{i}? #### Answer: ||<<{i}+{i}={2 * i}>> #### {2 * i}" for i in range(200)]
    wanted = [
        (f"Question: How many are {i}+{i}? #### Answer:", f" Answer: <<{i}+{i}={2 * i}>>", f" #### {2 * i}")
        for i in range(200)
    ]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    source = {"name": "gsm8k", "source": str(tmp_path / "p.txt")}
    folder = tmp_path / "data" / "gsm8k"
    for fraction, n in {0.1: 20, 1e-6: 1}.items():
        prepared(tmp_path, **source, val_fraction=fraction)
        train, val = parts(folder, "train"), parts(folder, "val")
        assert train + val == wanted and len(val) == n
    prepared(tmp_path, **source, val_source=str(tmp_path / "p.txt"))
    assert parts(folder, "train") == parts(folder, "val") == wanted
    for max_tokens in range(1000, 1080, 13):  # the last problem is cut off somewhere
        prepared(tmp_path, **source, val_source=str(tmp_path / "p.txt"), max_tokens=max_tokens)
        meta, splits, _ = read(folder)
        n = splits["train"].tolist().count(meta["eot_id"])
        assert (
            parts(folder, "train") == wanted[:n]
            and n == meta["documents"]
            and len(splits["train"]) == max_tokens
        )


@settings(max_examples=200, deadline=None)
@given(texts=st.tuples(*[st.text(max_size=20)] * 3))
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_the_parts_of_a_problem_have_the_tokens_of_the_whole(name, texts):
    """What makes it right to encode a question alone, and to go on with token ids, at evaluation."""
    tokenizer = load_tokenizer(make_tokenizer(name, split_digits=True, vocab_size=400, texts=STORIES))
    line = json.dumps({"question": texts[0], "answer": f"<<{texts[1]}>>#### {texts[2]}"})
    pieces = [
        text
        for text, _ in Source.split_problem(
            SimpleNamespace(malformed=0, first_malformed=None), line, True, ""
        )
    ]
    assert sum((tokenizer.encode_ordinary(piece) for piece in pieces), []) == tokenizer.encode_ordinary(
        "".join(pieces)
    )


def test_openai_files_become_the_same_documents(tmp_path):
    """An example of each form, as published; and where the real test files lie at hand, every problem of them."""
    rows = [
        {
            "question": "Two  more than 3? ",
            "answer": "He has 3+2=<<3+2=5>>5.\nThen\n5*2=$<<5*2=10>>10\n#### 10",
        }
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) * 30)
    (tmp_path / "a.txt").write_text("Two  more than 3?||<<3+2=5>> <<5*2=10>> #### 10\n" * 30)
    pairs = [(tmp_path / "a.jsonl", tmp_path / "a.txt", 30)]
    real = ROOT.parent / "shared" / "data" / "gsm8k"
    if real.exists():
        pairs.append((real / "test.jsonl", real / "test.txt", 1319))
    for json_file, text_file, n in pairs:
        ours, theirs = (
            [text for text, _ in Source(str(path), "problems", "")] for path in (json_file, text_file)
        )
        assert ours == theirs and len(ours) == 3 * n


def test_malformed_lines_are_reported(tmp_path, capsys):
    lines = ["How many?||<<1+1=2>> #### 2"] * 30
    (tmp_path / "p.txt").write_text(
        "\n".join([*lines, "no bars #### 3", "q||no answer", "||x #### 1", "", "q||#### ", *lines])
    )
    meta, splits, encoding = prepared(tmp_path, name="gsm8k", source=str(tmp_path / "p.txt"))
    out = capsys.readouterr().out
    assert (
        meta["documents"] == 60
        and "left out 4 lines that are neither 'question||" in out
        and "p.txt, line 31" in out
    )
    assert DIGIT_PATTERN == meta["tokenizer"]["pattern"]
    bad = [
        {"question": "q"},
        {"question": "q", "answer": "no hashes"},
        {"question": None, "answer": "#### 1"},
        [1],
    ]
    rows = [{"question": "q", "answer": "1 #### 1"}] * 30 + bad
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    assert prepared(tmp_path, name="gsm8k", source=str(tmp_path / "p.jsonl"))[0]["documents"] == 30
    out = capsys.readouterr().out
    assert "left out 5 lines" in out and "p.jsonl, line 31" in out
    for text, message in {
        "q||t #### 1": "has too few problems to train on some",
        "no problem": "is empty",
    }.items():
        (tmp_path / "p.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            prepared(tmp_path, name="gsm8k", source=str(tmp_path / "p.txt"))
    with pytest.raises(ValueError, match="hub:a/b: problems are read from files"):
        prepared(tmp_path, name="gsm8k", source="hub:a/b")


@pytest.mark.parametrize(
    "content, options, message",
    [
        ("", {}, "is empty"),
        ("\n \n", {}, "is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", {}, "Git LFS pointer"),
        ("text", {"tokenizer": "gpt5"}, "unknown tokenizer 'gpt5'; there are gpt2, bytes, bpe"),
        ("text", {"tokenizer": "bpe", "vocab_size": 100}, "bpe needs at least 258"),
        ("text", {"tokenizer": "bpe", "vocab_size": 0}, "bpe needs at least 258"),
        ("text", {"val_fraction": 1.5}, "val_fraction is 1.5"),
        ("text", {"name": "nonsense"}, "unknown data set 'nonsense'; there are arithmetic"),
        ("text", {"name": "arithmetic"}, "arithmetic is generated"),
        (
            "text",
            {"name": "arithmetic", "source": None, "num_problems": 10**6},
            "the grammar is good for 1 to 100,000",
        ),
    ],
)
def test_bad_sources(tmp_path, content, options, message):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **{"source": str(tmp_path / "a.txt"), **options})
    assert not list(tmp_path.glob("data/*/*"))


def test_a_json_line_may_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 100)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "long " * 1000}) + "\n") * 3)
    assert prepared(tmp_path, source=str(tmp_path / "a.jsonl"))[0]["documents"] == 3


def test_bad_json(tmp_path):
    for line, message in {
        "{": "line 2: no JSON",
        '{"a": 1}': "wanted an object with a 'text' field, got a",
    }.items():
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            prepared(tmp_path, source=str(tmp_path / "a.jsonl"))
