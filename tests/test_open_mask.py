"""docs/results/open_mask.py: the loss under masks that are open in part."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from test_convert import causal

from docs.results.open_mask import T, losses


@torch.no_grad()
def test_losses_of_open_masks():
    """With nothing open, those of the causal model. Self-only: the front does not depend on the text."""
    model, texts = make_model(n_sink=0, block_size=T + 1), torch.randint(11, (2, T))
    nothing, front = model.wte.weight[:0], model.wte.weight[:1]
    for vector in (nothing, front):
        with causal():
            x = F.pad(texts, (len(vector), 0))  # the front is token 0
            log_p = model(x)[:, len(vector) :].log_softmax(dim=-1)
        wanted = [-log_p[i, range(T - 1), texts[i, 1:]].mean().item() for i in (0, 1)]
        for row in ("as it is", "self-only", "second row causal"):
            assert losses(model, texts, vector, 0, row, seed=0) == pytest.approx(wanted, rel=1e-4)
    opened = {row: losses(model, texts, nothing, 0.5, row, seed=0) for row in ("as it is", "self-only")}
    assert opened["as it is"] != pytest.approx(opened["self-only"], rel=1e-6)
    states = []
    with model.blocks[0].register_forward_hook(lambda module, args, x: states.append(x[0])):
        losses(model, texts, front, 0.5, "self-only", seed=0)
        losses(model, texts, front, 0.5, "as it is", seed=0)
    assert torch.allclose(states[0][0], states[1][0], atol=1e-6)
    assert not torch.allclose(states[2][0], states[3][0], atol=1e-3)
