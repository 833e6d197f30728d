"""docs/results/adapt.py: what it measures of a model, and its tables."""

import functools
import json
import re
import string

import numpy as np
import pytest
import torch
from test_sinks import save

from docs.results import adapt
from sample import load_trained


@pytest.fixture
def call(call_main):
    return functools.partial(call_main, adapt)


def write(folder, *rows):
    folder.mkdir(exist_ok=True)
    rows = [{"table": "facts", "row": "", "config": {"block_size": 9, "n_sink": 1}}, *rows]
    (folder / "measured.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_is_measured(data_dir, tmp_path, call):
    """With the first token visible, only texts in which it was hidden change, and it no longer counts."""
    folder, items = save(tmp_path / "sink-0", data_dir, n_sink=1), tmp_path / "x.jsonl"
    item = {"context": "Question: Tom", "target": "has"}
    items.write_text(json.dumps(item) + "\n" + json.dumps(item | {"target": "buys 3"}) + "\n")
    options = ["--texts=16", "--limit=2", "--steps=4", "--prompt_length=6", f"--items={items}"]
    call("measure", folder, data_dir / "arithmetic", *options, "--parts=bound,attention,writing,items")
    rows = [json.loads(line) for line in (folder / "measured.jsonl").read_text().splitlines()]
    tables = ["facts"] + ["bound"] * 2 + ["attention"] * 2 + ["writing", "writing", "first text"] * 2
    assert [row["table"] for row in rows] == tables + ["items"]
    hidden, visible = rows[1:3]
    assert [hidden["row"], visible["row"]] == ["arithmetic", "arithmetic, first token visible"]
    assert set(hidden["tokens"]) == {24} and set(visible["tokens"]) == {23}
    for row in (hidden, visible):
        assert row["mean"] == pytest.approx(sum(row["nats"]) / sum(row["tokens"]), abs=1e-3)
    same = np.isclose(hidden["nats"], visible["nats"])
    assert 0 < same.sum() < 16  # the first token of about half of the texts is hidden
    model, tokenizer, _ = load_trained(folder, "cpu")
    cfg = adapt.EvalConfig(nll_type="chain_rule", dtype="float32")
    want = [adapt.score_item(model, tokenizer, one, cfg)["log_p"] for one in adapt.read_items(str(items))]
    assert rows[-1]["row"] == "x" and rows[-1]["log_p"] == pytest.approx(want)
    assert {row["given"] for row in rows if row["table"] == "writing"} == {0, 6}
    first = [row for row in rows if row["table"] == "first text"][1]
    assert first["steps"][:6] == [0] * 6 and min(first["steps"][6:]) > 0


def test_tables(tmp_path, call):
    """Differences of runs with the same seed; of items, means over seeds and errors over items."""
    pytest.importorskip("matplotlib")
    values = {("vanilla", 0): 4.0, ("vanilla", 1): 5.0, ("sink", 0): 3.8, ("sink", 1): 4.9, ("gate", 2): 4.0}
    for (name, seed), value in values.items():
        acc = [True, name == "sink", seed == 0]
        write(
            tmp_path / f"{name}-{seed}",
            {"table": "bound", "row": "stories", "mean": value, "nats": [value * 5] * 4, "tokens": [5] * 4},
            {"table": "items", "row": "x", "acc": acc, "log_p": [-1, -2, -value]},
            {"table": "attention", "row": "layer 0", "rate": [0, 0.5]},
            {"table": "writing", "row": "layer 0", "given": 6, "top": 1, "norm": 1},
            {"table": "writing", "row": "layer 1", "given": 6, "top": 9, "norm": 1},
        )
    lines = call("tables", tmp_path)
    assert lines[1] == "nats per token, stories seeds mean more than vanilla 95 % interval"
    assert lines[2] == "gate 1 4.0000 ± nan - -"  # it has no partner
    assert lines[3] == "sink 2 4.3500 ± 0.5500 -0.1500 ± 0.0500 -0.786 to 0.486"  # ± 12.71 errors
    assert lines[4] == "vanilla 2 4.5000 ± 0.5000 - -"
    assert lines[5] == "sink: -0.1500 ± 0.0000 more than vanilla, over 4 texts"
    assert any(line.startswith("sink 2 0.8333 ± 0.1667 0.3333 ± 0.0000") for line in lines)
    assert "sink: 0.3333 ± 0.3333 more than vanilla, over 3 texts" in lines
    assert "sink: 0.0500 ± 0.0500 more than vanilla, over 3 texts" in lines
    assert "vanilla 6 0.500 1.000 - - - -" in lines and "sink 6 0.500 1.000 - - - -" in lines


@pytest.mark.parametrize("chosen, shares", [("token", [1, 0, 0]), ("mark", [0, 1, 1])])
def test_which_token_the_sink_is(data_dir, tmp_path, call, monkeypatch, chosen, shares):
    """All attention goes to the leftmost visible token, or to the leftmost visible punctuation."""
    folder = save(tmp_path / "vanilla-0", data_dir, n_sink=0, n_layer=13)
    tokenizer = load_trained(folder, "cpu")[1]

    def attention_maps(model, xt):
        weights = torch.zeros(len(xt), 2, 24, 24)
        for text, tokens in enumerate(xt.tolist()):
            visible = [i for i, token in enumerate(tokens) if token != model.config.mask_id]
            words = {i: tokenizer.decode([tokens[i]]).strip() for i in visible}
            marks = [i for i, word in words.items() if word and all(c in string.punctuation for c in word)]
            weights[text, :, :, [*(visible if chosen == "token" else marks), 0][0]] = 1
        return [(weights, None)] * 13

    monkeypatch.setattr(adapt, "attention_maps", attention_maps)
    lines = call("sinks", folder, data_dir / "arithmetic")
    assert re.search(r"sink rate [01].\d+ in layers 3 to 10, [01].\d+ from layer 12 on$", lines[0])
    for line in lines[1:]:
        assert [float(share) for share in re.findall(r"[01]\.\d{3}", line)] == shares


def test_what_cannot_be_had_is_refused(data_dir, tmp_path, call):
    write(tmp_path / "sink-1")
    with pytest.raises(ValueError, match="has no run vanila-SEED with .*; set another --baseline"):
        call("tables", tmp_path, "--baseline=vanila")
    folder = save(tmp_path / "vanilla-0", data_dir, n_sink=0)
    with pytest.raises(ValueError, match="parts are bound, .* got bounds"):
        call("measure", folder, data_dir / "arithmetic", "--parts=attention,bounds")
    with pytest.raises(ValueError, match="wanted: measure RUN"):
        call("draw", folder)
