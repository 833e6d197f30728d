"""The network against explicit formulas, and what makes a sink a sink."""

import math
import os
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, VARIANTS, make_model

from model import MDM, MDMConfig, load_checkpoint, weighted_nll

SINKS = [{"n_sink": 1}, {"n_sink": 4}, {"n_sink": 2, "sink_position": "end"}, {"sink_zero_value": True}]


def oracle(model, xt):
    """The model in float64: explicit softmax with the bias of Eq. 5-6, complex rotary embedding."""
    c, w = model.config, {name: p.double() for name, p in model.named_parameters()}
    (B, T), d = xt.shape, c.n_embd // c.n_head
    S, first_sink = T + c.n_sink, 0 if c.sink_position == "front" else T
    is_sink = (torch.arange(S) >= first_sink) & (torch.arange(S) < first_sink + c.n_sink)
    x = torch.zeros(B, S, c.n_embd, dtype=torch.float64)
    x[:, ~is_sink] = w["wte.weight"][xt]
    if c.n_sink:
        x[:, is_sink] = w["sink"]
    bias = torch.zeros(S, S, dtype=torch.float64)
    if not c.sink_attends_all:
        bias[is_sink[:, None] & ~torch.eye(S, dtype=torch.bool)] = -math.inf
    frequency = 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    turn = torch.exp(1j * torch.arange(S)[:, None] * frequency)

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotate(x):
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
        return torch.cat((z.real, z.imag), -1)

    for layer in range(c.n_layer):
        p = f"blocks.{layer}."
        n = norm(x, w[p + "norm_1.weight"])
        q, k, v = (n @ w[p + "attn.qkv.weight"].T).view(B, S, 3, c.n_head, d).permute(2, 0, 3, 1, 4)
        if c.sink_zero_value:
            v = v * ~is_sink[:, None]
        attention = (rotate(q) @ rotate(k).transpose(2, 3) / math.sqrt(d) + bias).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(B, S, c.n_embd)
        if c.gated_attention:
            y = y / (1 + (-(n @ w[p + "attn.gate.weight"].T)).exp())
        x = x + y @ w[p + "attn.proj.weight"].T
        n = norm(x, w[p + "norm_2.weight"])
        gate, up = n @ w[p + "mlp.w1.weight"].T, n @ w[p + "mlp.w2.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[p + "mlp.w3.weight"].T
    return norm(x[:, ~is_sink], w["ln_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("sink_attention", ["mask", "split"])
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_forward_equals_explicit_formula(flags, sink_attention):
    model = make_model(**flags, sink_attention=sink_attention)
    for T in (1, 9, 16):
        xt = torch.randint(0, 12, (3, T))
        torch.testing.assert_close(model(xt).double(), oracle(model, xt), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("flags", SINKS)
def test_sink_state_is_a_constant(flags):
    """After every block, whatever the text and the other sinks."""
    model, after = make_model(**flags), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, x: after.append(x))
    model(torch.randint(0, 12, (1, 9)))
    model(torch.randint(0, 12, (1, 9)))
    model.sink.data[1:] += 1.0
    model(torch.randint(0, 12, (1, 9)))
    n_sink = model.config.n_sink
    for x, other_text, other_sinks in zip(after[:2], after[2:4], after[4:]):
        torch.testing.assert_close(x[:, :n_sink], other_text[:, :n_sink], atol=1e-6, rtol=0)
        torch.testing.assert_close(x[:, 0], other_sinks[:, 0], atol=1e-6, rtol=0)
        assert not torch.allclose(x[:, n_sink:], other_text[:, n_sink:])


def test_split_equals_mask(variant):
    """Logits, loss (which is what a sum by hand gives) and the gradient of every parameter."""
    results = []
    for sink_attention in ("mask", "split"):
        model = make_model(**variant, sink_attention=sink_attention)  # it seeds: the draws below are the same
        x0, masked, p_mask = torch.randint(0, 11, (3, 9)), torch.rand(3, 9) < 0.5, torch.rand(3, 1) + 0.1
        xt = torch.where(masked, 11, x0)
        loss = weighted_nll(model, x0, xt, masked, p_mask)
        results.append((model(xt), loss, torch.autograd.grad(loss.sum(), list(model.parameters()))))
    (logits, loss, gradients), (split_logits, split_loss, split_gradients) = results
    torch.testing.assert_close((split_logits, split_loss), (logits, loss), atol=1e-5, rtol=1e-5)
    nll = -logits.log_softmax(-1).gather(2, x0[..., None])[..., 0]
    torch.testing.assert_close(loss, (nll * masked / p_mask).sum(dim=1), atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients, split_gradients):
        assert (a - b).norm() < 1e-4 * a.norm()


def test_no_mask_reaches_attention_in_split():
    """So that the fastest kernels may run; and no sink is a query."""
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as sdpa:
        make_model(n_sink=2, sink_attention="split")(torch.randint(0, 12, (3, 9)))
    assert sdpa.call_count == 2
    for (q, k, v), options in sdpa.call_args_list:
        assert options.get("attn_mask") is None and (q.size(2), k.size(2), v.size(2)) == (9, 11, 11)


def test_variants_of_a_seed_differ_by_their_flags_alone(variant):
    """They share the vanilla model's tensors; on top come the sinks and the gates, and nothing else."""
    vanilla = MDM(MDMConfig(**{**TINY, "n_sink": 0}), 5).state_dict()
    model = MDM(MDMConfig(**{**TINY, **variant}), 5).state_dict()
    extra = ["sink"] * bool(variant["n_sink"])
    extra += [f"blocks.{i}.attn.gate.weight" for i in (0, 1) if "gated_attention" in variant]
    assert set(model) == set(vanilla) | set(extra)
    assert all(torch.equal(tensor, model[name]) for name, tensor in vanilla.items())


def test_weights_follow_from_the_seed_alone():
    """Building a model neither uses nor changes torch's random state. Two tensors, or two seeds, differ."""
    starts = []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = MDM(MDMConfig(**TINY), seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(torch.stack([p.flatten()[:16] for p in model.parameters() if p.ndim > 1]))
    assert torch.equal(starts[0], starts[1])
    assert len(torch.cat(starts).unique(dim=0)) == 2 * len(starts[0])


def test_initialisation():
    """SMDM's: std 1 / (sqrt(C) n_layer) of what writes into the residual stream, sqrt(2 / 5C) of the rest."""
    flags = {"n_sink": 40, "gated_attention": True, "qkv_bias": True}
    model = MDM(MDMConfig(vocab_size=500, n_layer=3, n_embd=128, **flags))
    for name, p in model.named_parameters():
        residual = name.endswith(("attn.proj.weight", "mlp.w3.weight"))
        std = 1 / (math.sqrt(128) * 3) if residual else math.sqrt(2 / (5 * 128))
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all()
        else:
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    own = model.blocks[0].attn.own = torch.nn.Parameter(torch.full((3, 5), 7.0))
    model.init_weights(0)
    assert (own == 7).all()  # what a change adds keeps its values


def test_bad_input():
    bad = {"n_layer": 0, "n_sink": -1, "n_head": 3, "sink_position": "middle", "sink_attention": "flash"}
    for key, value in (*bad.items(), ("n_head", 16), ("n_kv_head", -1), ("n_kv_head", 3)):
        with pytest.raises(ValueError, match=f"got .*{key}='?{value}"):
            MDMConfig(**{**TINY, key: value})
    with pytest.raises(ValueError, match="no preset '7B'; there are 6M, 19M"):
        MDMConfig.preset("7B")
    with pytest.raises(ValueError, match="17 tokens exceeds block_size 16"):
        make_model()(torch.zeros(1, 17, dtype=torch.long))


def test_checkpoint_by_file_folder_or_dict(tmp_path):
    model, path = make_model(n_sink=2), tmp_path / "ckpt.pt"
    torch.save({"model_config": vars(model.config), "model": model.state_dict()}, path)
    for source in (path, str(tmp_path), load_checkpoint(path)):
        loaded = MDM.from_checkpoint(source)
        assert loaded.config == model.config
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters()))


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(ValueError, match="no checkpoint at .*ckpt.pt; train a model first"):
        MDM.from_checkpoint(tmp_path)
    torch.save(make_model().state_dict(), path)
    with pytest.raises(ValueError, match="is no checkpoint of train.py"):
        MDM.from_checkpoint(path)
    for size in (len(path.read_bytes()) - 1, 999, 0):
        os.truncate(path, size)
        with pytest.raises(ValueError, match="ckpt.pt is damaged or no checkpoint"):
            MDM.from_checkpoint(path)
