"""extras/bench.py: what it times does the same work, and what it prints."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_sinks import save

from eval import read_problems
from extras import bench
from model import MDM, MDMConfig

TINY = {"vocab_size": 50, "block_size": 16, "batch_size": 4, "rounds": 1, "device": "cpu", "dtype": "float32"}


def run(monkeypatch, capsys, part, end=28, **settings):
    """The rows of the script's table, {name, up to column end: words}, and its models."""
    models = []
    monkeypatch.setattr(bench, "MDM", lambda config: models.append(MDM(config)) or models[-1])
    flags = [f"--{key}={value}" for key, value in {**TINY, **settings}.items()]
    monkeypatch.setattr(sys, "argv", ["bench.py", part, *flags])
    bench.main()
    lines = capsys.readouterr().out.split("\n" + " " * end)[1].splitlines()[1:]
    return {line[:end].rstrip(): line[end:].split() for line in lines}, models


def written_out(model):
    """The number of hidden tokens, and the loss: their -log p / p_mask over all tokens."""
    x0, xt, masked, p_mask = bench.make_batch(bench.BenchConfig(**TINY), everywhere=False)
    assert p_mask.flatten().tolist() == [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    log_p, hidden = model(xt).log_softmax(dim=-1), masked.nonzero().tolist()
    return len(hidden), sum(-log_p[b, i, x0[b, i]] / p_mask[b, 0] for b, i in hidden) / 64


def test_ways_of_sink(monkeypatch, capsys):
    """Each has the parameters and the attention of its name; the mask and the split give the same loss."""
    has_mask, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        has_mask.append(attn_mask is not None)
        return attention(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    rows, models = run(monkeypatch, capsys, "sink")
    assert list(rows) == ["vanilla", "sink, mask", "sink, split", "gate"]
    assert has_mask == 2 * (6 * [False] + 6 * [True] + 12 * [False])  # 6 layers; to warm up, and one round
    assert [model.sink is not None for model in models] == [False, True, True, False]
    assert [model.blocks[0].attn.gate is not None for model in models] == [False, False, False, True]
    losses = [float(words[-1]) for words in rows.values()]
    assert losses == pytest.approx([written_out(model)[1].item() for model in models], abs=2e-5)
    assert losses[1] == losses[2] and len(set(losses)) == 3


def test_ways_of_train(monkeypatch, capsys):
    """The same loss and gradients with logits at all 64 positions or at the hidden ones, compiled or not."""
    sizes, gradients, compiled, head = [], [], [], MDM.head
    monkeypatch.setattr(MDM, "head", lambda self, x: sizes.append(x.shape[:-1].numel()) or head(self, x))
    monkeypatch.setattr(MDM, "zero_grad", lambda m, set_to_none: gradients.append(m.wte.weight.grad.clone()))
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append((f.__self__, f.__name__)) or f)
    rows, models = run(monkeypatch, capsys, "train", compile=True)
    names = ["head everywhere", "head where hidden"]
    assert list(rows) == [*names, *(f"{name}, compiled" for name in names)]
    assert compiled == [(model, "trunk") for model in models[2:]]
    model = MDM(MDMConfig.preset("6M", vocab_size=50, block_size=16))
    n_hidden, loss = written_out(model)
    loss.backward()
    assert sizes[:8] == 4 * [64, n_hidden]
    assert [float(words[-1]) for words in rows.values()] == pytest.approx(4 * [loss.item()], abs=2e-5)
    for gradient in gradients[:4]:
        torch.testing.assert_close(gradient, model.wte.weight.grad)


def test_the_numbers_of_a_step(monkeypatch, capsys):
    """The ratios are 1.9, 2.1, 2.5: of their deviations from the median, 0.2, 0, 0.4, the median is 0.2."""
    names = ["head everywhere", "head where hidden"]
    numbers = ([4.0], [4.5]), ([0.01, 0.02, 0.02], [0.019, 0.042, 0.05]), ([], [1e6, 3e6])
    turns = [dict(zip(names, pair)) for pair in numbers]  # results, seconds, bytes
    monkeypatch.setattr(bench, "take_turns", lambda steps, rounds, device: turns)
    monkeypatch.setattr(bench, "flops_utilization", lambda model, T, speed: T * speed / 1e5)
    rows, _ = run(monkeypatch, capsys, "train")
    error = 1.25 * 1.48 * 0.2 / 3**0.5
    assert rows[names[1]] == f"42.0 2.100 ± {error:.3f}x 1,524 24.4% 3 4.50000".split()
    assert rows[names[0]] == "20.0 1.000 ± 0.000x 3,200 51.2% - 4.00000".split()


def test_turns():
    """All ways warm up, then take turns."""
    calls = []
    ways = {name: lambda i, name=name: calls.append(f"{name}{i}") for name in "ab"}
    results, seconds, _ = bench.take_turns(ways, 2, torch.device("cpu"))
    assert calls == "a0 b0 a0 b0 a1 b1".split()
    assert results == {"a": [None] * 2, "b": [None] * 2} and len(seconds["a"]) == len(seconds["b"]) == 2


def test_decoding_rules(data_dir, tmp_path, monkeypatch, capsys):
    """Every rule answers the same two batches of two test problems, with the decoding of its name."""
    out_dir = save(tmp_path / "run", data_dir, block_size=40)
    calls, answer_problems = [], bench.answer_problems

    def spy(model, tokenizer, indices, problems, cfg):
        calls.append((list(indices), problems, cfg.steps, cfg.threshold))
        records = answer_problems(model, tokenizer, indices, problems, cfg)
        return [{**record, "acc": i != 2, "forward_passes": i} for i, record in zip(indices, records)]

    monkeypatch.setattr(bench, "answer_problems", spy)
    rows, _ = run(monkeypatch, capsys, "sample", end=20, batch_size=2, rounds=2, out_dir=out_dir)
    rules = [(40, None), (8, None), (4, None), (2, None), (1, None), (40, 0.5), (40, 0.9), (40, 0.99)]
    problems = read_problems(f"{data_dir}/arithmetic/test.txt", None)
    batches = 2 * [([0, 1], problems[:2])] + [([2, 3], problems[2:4])]  # the first one also warms up
    assert calls == [(*batch, *rule) for batch in batches for rule in rules]
    assert list(rows)[::4] == ["one token a pass", "1 steps"] and len(rows) == 8
    for words in rows.values():
        assert words[0] == "1.5" and words[-3:] == "75.0% ± 21.7%".split()  # sqrt(0.75 * 0.25 / 4)


def test_an_unknown_part():
    with pytest.raises(ValueError, match="cannot measure 'speed'; wanted sink, train or sample"):
        bench.BenchConfig("speed")
