"""What bench.py times does the same work, and prints what it measured.

python -m pytest tests/test_bench.py
"""

import os
import sys

import pytest
import torch

import bench
from bench import BenchConfig, make_step, ratio, take_turns

TINY = {"vocab_size": 50, "block_size": 16, "batch_size": 4, "rounds": 2, "device": "cpu"}
SPLIT = {"n_sink": 2, "sink_attention": "split"}


def test_the_ways_compute_the_same(monkeypatch):
    """Loss and gradients of a step, whichever way it is computed; the loss alone, all at once or in parts."""
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 7 * 50)
    steps = [
        ({"n_sink": 2}, "everywhere"),
        ({"n_sink": 2}, "where hidden"),
        (SPLIT, "everywhere"),
        (SPLIT, "where hidden"),
    ]
    for ways in (
        steps,
        [({"n_sink": 0}, head) for head in ("at all places", "at hidden places", "in parts")],
    ):
        losses, gradients = [], []
        for way in ways:
            step, model = make_step(BenchConfig(**TINY), torch.device("cpu"), *way)
            monkeypatch.setattr(model, "zero_grad", lambda set_to_none: None)
            losses.append(step())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-6)
        for gradient in gradients[1:]:
            assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize(
    "what, first, second",
    [("sink", "vanilla", "sink, split"), ("train", "head everywhere", "head where hidden")],
)
def test_the_table(what, first, second, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 7.4e7)
    monkeypatch.setattr(sys, "argv", ["bench.py", what, *(f"--{key}={value}" for key, value in TINY.items())])
    bench.main()
    lines = {
        line[:28].rstrip(): line[28:].split()
        for line in capsys.readouterr().out.splitlines()
        if "x" in line[37:54]
    }
    assert lines[first][1] == "1.000" and float(lines[second][0]) > 0 and float(lines[second][1]) > 0
    tokens_per_s, mfu, megabytes, _, kernel = lines[second][4:]
    assert float(tokens_per_s.replace(",", "")) == pytest.approx(64 / float(lines[second][0]) * 1e3, rel=0.2)
    assert (mfu, megabytes, kernel) == ("-", "74", "flash_attention_for_cpu")


def test_memory_of_a_step():
    """Of the loss of 3,000 places, half of them hidden, and 20,000 tokens: float32 logits, their log-softmax and its gradient."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("no /proc/self/clear_refs: Linux only")
    cfg = BenchConfig(**{**TINY, "vocab_size": 20000, "block_size": 750})
    found = {
        head: bench.peak_memory(cfg, torch.device("cpu"), None, ({"n_sink": 0}, head))
        for head in ("at all places", "in parts")
    }
    logits = 4 * 750 * 20000 * 4
    assert (
        2 * logits < found["at all places"] < 4 * logits and found["in parts"] < 0.6 * found["at all places"]
    )


def test_texts_and_masks_are_the_same_for_every_way(monkeypatch):
    seen = []
    monkeypatch.setattr(
        bench, "weighted_nll", lambda model, *batch: seen.append(batch) or model.lm_head.weight.sum()
    )
    for flags in ({"n_sink": 0}, SPLIT, {"n_sink": 0, "gated_attention": True}):
        make_step(BenchConfig(**TINY), torch.device("cpu"), flags)[0]()
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


def test_ratios():
    """Medians over rounds of what one way takes to what the first takes in the same round."""
    seconds = {"a": [1.0, 2.0, 4.0], "b": [2.0, 4.4, 7.0]}
    middle, error = ratio(seconds, "b", "a")
    assert middle == pytest.approx(2.0) and 0 < error < 0.3 and ratio(seconds, "a", "a") == (1.0, 0.0)
    calls = []
    seconds = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4 and [len(found) for found in seconds.values()] == [
        3,
        3,
    ]  # once to warm up, then in turns


def test_bad_settings():
    for key, value, message in (
        ("what", "speed", "cannot measure 'speed'; there is sink, train, loss"),
        ("rounds", 0, "rounds is 0"),
        ("n_seeds", 1, "n_seeds is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchConfig(**{key: value})
    with pytest.raises(ValueError, match="sample needs a model that answers problems"):
        bench.bench_sample(BenchConfig(what="sample"), torch.device("cpu"))
