"""What the benchmark times does the same work, and what it prints: python -m pytest tests/test_bench.py"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from extras import bench
from model import MDM, MDMConfig

TINY = ["--vocab_size=50", "--block_size=16", "--batch_size=4", "--rounds=1", "--device=cpu", "--dtype=float32"]


def run(monkeypatch, capsys, *flags):
    """Runs the script; returns the rows of its table, {name: words}, and its models in this order."""
    models = []
    monkeypatch.setattr(bench, "MDM", lambda config: models.append(MDM(config)) or models[-1])
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    bench.main()
    lines = capsys.readouterr().out.split("accuracy\n" if flags[0] == "sample" else "loss\n")[1].splitlines()
    width = 20 if flags[0] == "sample" else 28
    return {line[:width].rstrip(): line[width:].split() for line in lines}, models


def written_out(model):
    """The loss of model: -log p / p_mask at the hidden positions, over all positions."""
    x0, xt, masked, p_mask = bench.make_batch(bench.BenchConfig(vocab_size=50, block_size=16, batch_size=4), False)
    log_p = model(xt).double().log_softmax(dim=-1)
    return sum(-log_p[b, i, x0[b, i]] / p_mask[b, 0] for b, i in masked.nonzero().tolist()).item() / 64


def test_ways_of_sink(monkeypatch, capsys):
    """Each has the parameters and the attention of its name. The mask and the split give the same loss."""
    masks, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        masks.append(attn_mask is not None)
        return attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    rows, models = run(monkeypatch, capsys, "sink", *TINY)
    assert list(rows) == ["vanilla", "sink, mask", "sink, split", "gate"]
    losses = [float(words[-1]) for words in rows.values()]
    assert losses == pytest.approx([written_out(model) for model in models], abs=2e-5)
    assert losses[1] == losses[2] and len(set(losses)) == 3
    assert [model.sink is not None for model in models] == [False, True, True, False]
    assert [model.blocks[0].attn.gate is not None for model in models] == [False, False, False, True]
    for model, has_mask in zip(models, (False, True, False, False)):
        masks.clear()
        model(torch.zeros(1, 4, dtype=torch.long))
        assert masks == [has_mask] * 6


def test_ways_of_train(monkeypatch, capsys):
    """The same loss and gradients, with logits at all 64 positions or at the hidden ones."""
    sizes, gradients, head = [], [], MDM.head
    monkeypatch.setattr(MDM, "head", lambda self, x: sizes.append(x.shape[:-1].numel()) or head(self, x))
    
    rows, models = run(monkeypatch, capsys, "train", *TINY)
    ...
