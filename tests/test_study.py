"""docs/results/study.py: what it measures, its tables and pictures."""

import functools
import json

import numpy as np
import pytest
import torch
from test_sinks import save

from docs.results import study
from extras.sinks import CHANGES, Run, SinksConfig, attention_maps
from prepare_data import load_tokenizer, make_tokenizer


@pytest.fixture
def call(call_main):
    return functools.partial(call_main, study)


def test_words_are_counted():
    """Of 11 words 10 are known; of 5 4-grams one is repeated within its text; of 9 pairs 3 are distinct."""
    tokenizer = load_tokenizer(make_tokenizer("bytes"))
    tokens = tokenizer.encode("It's<|endoftext|>'s a Cat. a", allowed_special="all")
    assert study.words_of(tokens, tokenizer) == ["it's", "s", "a", "cat", "a"]
    counts = study.count_words(["a b a b a b".split(), "a b a b c".split(), []], {"a", "b"})
    assert counts == {"words": 11, "known": 10 / 11, "repeated": pytest.approx(1 / 5), "distinct": 3 / 9}


def test_what_is_measured(data_dir, tmp_path, call):
    """The rows of the file, of two kept checkpoints in order of their steps."""
    folder = save(tmp_path / "sink", data_dir, n_sink=1)
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    for step in (1000, 20):
        torch.save(checkpoint, folder / f"{step}.pt")
    call("measure", folder, "--mc_num=1", "--limit=4", "--steps=3")
    rows = [json.loads(line) for line in (folder / "measured.jsonl").read_text().splitlines()]
    tables = ["facts"] + ["texts"] * 2 + ["denoising"] * 2 + ["changes"] * len(CHANGES) + ["attention"] * 4
    assert [row["table"] for row in rows] == tables
    facts = {"step": 3, "settings": rows[0]["settings"] | {"limit": 4}, "config": checkpoint["run_config"]}
    assert rows[0] == rows[0] | facts | {"data_sha256": checkpoint["meta"]["sha256"]}
    assert rows[2]["known"] == 1 and rows[2]["words"] > 30  # the held-out problems have no new words
    assert [row["step"] for row in rows[-4:]] == [20, 20, 1000, 1000]


def test_attention_by_kind(data_dir, tmp_path, monkeypatch):
    """By hand: what the keys of each kind get from all content queries, over the share of such keys."""
    cfg, seen = SinksConfig(limit=4, head_threshold=0.1), []
    run = Run(str(save(tmp_path / "sink", data_dir, n_sink=1)), cfg, "cpu")
    spy = lambda model, xt: seen.append(xt) or attention_maps(model, xt)  # noqa: E731
    monkeypatch.setattr(study, "attention_maps", spy)
    rows = list(study.attention_by_kind(run, [(1, run.model), (2, run.model)], cfg, "cpu"))
    assert len(rows) == 4 and torch.equal(*seen)
    xt, mask_id = seen[0], run.model.config.mask_id
    assert torch.equal(torch.where(xt == mask_id, run.x0, xt), run.x0)
    shares = (xt == mask_id).float().mean(dim=1)
    assert shares[0] < 0.4 and shares[-1] > 0.6  # from little to much noise

    def kind_of(token):
        if token in (mask_id, run.tokenizer.eot_token):
            return "hidden" if token == mask_id else "end-of-text"
        word = run.tokenizer.decode([token]).strip()
        return "punctuation" if word and all(c in "!?.,:;+-*=<>#'()/" for c in word) else "other"

    kinds = np.array([["sink", *map(kind_of, text)] for text in xt.tolist()])  # (4, 25)
    for row, (weights, _) in zip(rows, attention_maps(run.model, xt)):
        by_head = weights[:, :, 1:].mean(dim=2).numpy()  # (4, 2, 25)
        for kind in study.KINDS:
            gets = (by_head * (kinds == kind)[:, None]).sum(axis=(0, 2)) / 4
            assert row[kind] == pytest.approx(gets / (kinds == kind).mean(), abs=1e-3)
        assert row["rate"] == (by_head.max(axis=2) > 0.1).mean(axis=0).tolist()


def write_measured(folder, *rows):
    keys = "table", "step", "row"
    lines = [json.dumps({k: v for k, v in zip(keys, row) if v is not None} | row[3]) for row in rows]
    folder.mkdir()
    (folder / "measured.jsonl").write_text("".join(line + "\n" for line in lines))


def test_tables_of_what_was_measured(tmp_path, call):
    """At the last step; a list is of heads. A run may lack a column."""
    pytest.importorskip("matplotlib")
    for seed, known, sink in ((0, 0.9, [3, 5]), (1, 0.8, [1, 1])):
        folder = tmp_path / f"a-x-{seed}"
        texts, early = ("texts", None, "written", {"known": known}), {"sink": [0, 99], "rate": [0, 0]}
        attention = ("attention", 2, "layer 0", early), ("attention", 10, "layer 0", early | {"sink": sink})
        write_measured(folder, texts, *attention)
    write_measured(tmp_path / "b-0", ("texts", None, "written", {"repeated": 0.1234}))
    assert call("tables", tmp_path) == [
        "",
        "texts known repeated",
        "a-x written 0.850 ± 0.050 -",
        "b written - 0.123 ± nan",
        "",
        "attention sink rate",
        "a-x layer 0 2.500 ± 1.500 0.000 ± 0.000",
        f"wrote {tmp_path}/attention.png",
        f"wrote {tmp_path}/rates.png",
    ]


def test_the_last_step_that_all_seeds_have(tmp_path, call):
    for seed, steps in ((0, (0, 10, 20)), (1, (10,))):
        rows = [("attention", step, "layer 0", {"sink": [step, seed], "rate": [0, 0]}) for step in steps]
        write_measured(tmp_path / f"a-{seed}", *rows)
    assert call("tables", tmp_path)[-3] == "a layer 0 5.250 ± 0.250 0.000 ± 0.000"
    rows = {0: {0: {"sink": [1, 2]}}, 10: {0: {"sink": [3, 4]}, 1: {"sink": [5, 6]}}}
    steps, heads = study.of_heads(rows, "sink")  # for the pictures
    assert steps == [10] and heads[0].tolist() == [3, 4, 5, 6] and len(heads) == 1


def test_pictures(tmp_path, call, monkeypatch):
    """Means over heads and seeds, and the highest head."""
    figures = {}
    monkeypatch.setattr(study, "write_file", lambda path, write: figures.update({path: write.__self__}))
    for seed in (0, 1):
        values = {"sink": [1 + seed, 2], "hidden": [3, 5], "rate": [0, 1]}
        rows = [("attention", step, f"layer {layer}", values) for layer in (0, 1) for step in (0, 10)]
        write_measured(tmp_path / f"a-{seed}", *rows)
    call("tables", tmp_path)
    (panel,) = figures[f"{tmp_path}/rates.png"].axes
    assert [line.get_ydata().tolist() for line in panel.lines[:2]] == [[0.5, 0.5], [1, 1]]  # of 0, 1
    panels = figures[f"{tmp_path}/attention.png"].axes
    assert [panel.get_title() for panel in panels] == ["a, layer 0", "a, layer 1"]
    means_and_highest = [line.get_ydata().tolist() for line in panels[1].lines]  # of 1, 2, 2, 2 and 3, 5
    assert means_and_highest == [[1.75, 1.75], [2, 2], [4, 4], [5, 5]]
    assert panels[1].lines[0].get_xdata().tolist() == [0, 10]


def test_errors(tmp_path, call):
    for argv in ([], ["measure"], ["tables", tmp_path / "nowhere"], ["draw", tmp_path]):
        with pytest.raises(ValueError, match="wanted: measure RUN .*, or tables FOLDER, both folders"):
            call(*argv)
