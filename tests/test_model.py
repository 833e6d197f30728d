"""The network against explicit formulas, and what makes a sink a sink.

python -m pytest tests/test_model.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from model import MDM, MDMConfig, weighted_nll


def states(model, xt):
    """The residual stream after every block, sinks included."""
    out = []
    hooks = [block.register_forward_hook(lambda module, args, y: out.append(y)) for block in model.blocks]
    model(xt)
    for hook in hooks:
        hook.remove()
    return out


def oracle(model, xt):
    """The whole model in float64, without SDPA: explicit softmax with the bias of Eq. 5-6, complex rotary embedding, loops."""
    c, w = model.config, {name: p.double() for name, p in model.named_parameters()}
    B, T = xt.shape
    d = c.n_embd // c.n_head
    x = w["wte.weight"][xt]
    sinks = list(range(c.n_sink)) if c.sink_position == "front" else list(range(T, T + c.n_sink))
    if c.n_sink:
        s = w["sink"].expand(B, -1, -1)
        x = torch.cat((s, x) if c.sink_position == "front" else (x, s), 1)
    S = x.size(1)
    bias = torch.zeros(S, S, dtype=torch.float64)
    for i in sinks:
        bias[i] = -math.inf
        bias[i, i] = 0.0

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    turn = torch.polar(
        torch.ones(S, d // 2, dtype=torch.float64),
        torch.arange(S, dtype=torch.float64)[:, None]
        * 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d),
    )

    def rotate(x):
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
        return torch.cat((z.real, z.imag), -1)

    for layer in range(c.n_layer):
        p = f"blocks.{layer}."
        n = norm(x, w[p + "norm_1.weight"])
        q, k, v = (n @ w[p + "attn.qkv.weight"].T).split(c.n_embd, dim=-1)
        if c.sink_zero_value:
            v = v.clone()
            v[:, sinks] = 0.0
        heads = []
        for h in range(c.n_head):
            cut = slice(h * d, (h + 1) * d)
            scores = rotate(q[..., cut]) @ rotate(k[..., cut]).transpose(1, 2) / math.sqrt(d) + bias
            heads.append(scores.softmax(-1) @ v[..., cut])
        y = torch.cat(heads, -1)
        if c.gated_attention:
            y = y / (1 + (-(n @ w[p + "attn.gate.weight"].T)).exp())
        x = x + y @ w[p + "attn.proj.weight"].T
        n = norm(x, w[p + "norm_2.weight"])
        x = (
            x
            + (F.silu(n @ w[p + "mlp.w1.weight"].T) * (n @ w[p + "mlp.w2.weight"].T))
            @ w[p + "mlp.w3.weight"].T
        )
    content = [i for i in range(S) if i not in sinks]
    return norm(x[:, content], w["ln_f.weight"]) @ w["lm_head.weight"].T


def test_forward_equals_explicit_formula(variant):
    model = make_model(**variant)
    xt = torch.randint(0, 12, (3, 9))
    logits = model(xt)
    assert logits.shape == (3, 9, 11)
    torch.testing.assert_close(logits.double(), oracle(model, xt), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "flags", [{"n_sink": 1}, {"n_sink": 4}, {"n_sink": 2, "sink_position": "end"}, {"sink_zero_value": True}]
)
def test_sink_state_is_a_constant(flags):
    model = make_model(**flags)
    one, other = torch.randint(0, 12, (2, 9)), torch.randint(0, 12, (2, 9))
    for a, b in zip(states(model, one), states(model, other)):
        a_sinks, b_sinks = (
            state[:, : model.config.n_sink] for state in (a, b)
        )  # the first rows, also with positions at the end
        torch.testing.assert_close(a_sinks, b_sinks, atol=1e-6, rtol=0)
        torch.testing.assert_close(a_sinks[0], a_sinks[1], atol=1e-6, rtol=0)
        assert not torch.allclose(a, b)  # the content's states do differ


def test_sinks_do_not_see_each_other():
    model = make_model(n_sink=2)
    xt = torch.randint(0, 12, (1, 9))
    before = [s[:, 0].clone() for s in states(model, xt)]
    with torch.no_grad():
        model.sink[1] += 1.0
    for a, b in zip(before, states(model, xt)):
        torch.testing.assert_close(a, b[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("flags", [{"n_sink": 1}, {"n_sink": 4}, {"n_sink": 1, "sink_position": "end"}])
def test_every_sink_changes_the_logits(flags):
    model = make_model(**flags)
    xt = torch.randint(0, 12, (1, 9))
    for i in range(model.config.n_sink):
        before = model(xt)
        with torch.no_grad():
            model.sink[i] += 1.0
        assert ((model(xt) - before).abs().amax(-1) > 1e-4).all()  # at every position


@pytest.mark.parametrize(
    "flags",
    [
        {"n_sink": 0},
        {"n_sink": 2},
        {"sink_position": "end"},
        {"sink_zero_value": True},
        {"gated_attention": True},
    ],
)
def test_every_flag_changes_the_logits(flags):
    plain, flagged = make_model(), make_model(**flags)
    own = flagged.state_dict()
    shared = {k: v for k, v in plain.state_dict().items() if k in own and own[k].shape == v.shape}
    flagged.load_state_dict(shared, strict=False)
    xt = torch.randint(0, 12, (1, 9))
    assert (plain(xt) - flagged(xt)).abs().max() > 1e-3


def test_attention_reads_both_directions(variant):
    model = make_model(**variant)
    xt = torch.randint(0, 11, (1, 9))
    changed = xt.clone()
    changed[0, -1] = (xt[0, -1] + 1) % 11
    assert (model(xt) - model(changed))[0, 0].abs().max() > 1e-4
    changed = xt.clone()
    changed[0, 0] = (xt[0, 0] + 1) % 11
    assert (model(xt) - model(changed))[0, -1].abs().max() > 1e-4


def both_ways(**flags):
    return make_model(**flags), make_model(**flags, sink_attention="split")


def test_split_equals_mask(variant):
    """Logits, loss and the gradient of every parameter, with rows of equal and of different lengths."""
    mask, split = both_ways(**variant)
    xt, targets = torch.randint(0, 12, (3, 9)), torch.randint(0, 11, (3, 9))
    for lengths in (None, torch.tensor([9, 4, 6])):
        real = torch.ones(3, 9, dtype=torch.bool) if lengths is None else torch.arange(9) < lengths[:, None]
        for model in (mask, split):
            model.zero_grad()
            model.logits = model(xt, lengths=lengths)[real]
            F.cross_entropy(model.logits, targets[real]).backward()
        torch.testing.assert_close(split.logits, mask.logits, atol=1e-5, rtol=1e-5)
        for (name, p), (_, q) in zip(mask.named_parameters(), split.named_parameters()):
            assert p.grad.norm() > 0 and (p.grad - q.grad).norm() < 1e-4 * p.grad.norm(), (name, lengths)


def test_split_equals_mask_in_bfloat16(variant):
    """They differ by no more than either does from float32."""
    mask, split = both_ways(**variant)
    xt = torch.randint(0, 12, (8, 16))
    exact = mask(xt)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = mask(xt), split(xt)
    rounding = (a.float() - exact).square().mean().sqrt()
    assert a.dtype == torch.bfloat16 and 0 < rounding < 0.1
    assert (a.float() - b.float()).square().mean().sqrt() < 1.5 * rounding


@pytest.mark.parametrize(
    "flags", [{"n_sink": 1}, {"n_sink": 2, "sink_position": "end"}, {"sink_zero_value": True}]
)
def test_sinks_may_be_computed_once(flags):
    model = make_model(**flags, sink_attention="split")
    sinks = model.sink_keys_values()
    for T in (3, 16):
        xt = torch.randint(0, 12, (2, T))
        torch.testing.assert_close(model(xt, sinks=sinks), model(xt), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.sink += 1.0
    assert (model(xt, sinks=sinks) - model(xt)).abs().max() > 1e-3  # they are what is used
    assert make_model(n_sink=0, sink_attention="split").sink_keys_values() is None


@pytest.mark.parametrize("way", ["mask", "split"])
def test_a_pass_over_the_rest_of_a_text(variant, way):
    """With keys and values of sinks and beginning given, the rest has the states that it has in the whole text."""
    model = make_model(**variant, sink_attention=way)
    n_sink, xt = model.config.n_sink, torch.randint(0, 12, (3, 12))
    for lengths in (None, torch.tensor([12, 7, 9])):
        real = torch.ones(3, 12, dtype=torch.bool) if lengths is None else torch.arange(12) < lengths[:, None]
        whole = model.hidden_states(xt, lengths, store=(store := []))
        for start in (0, 1, 5):
            before = [(k[:, :, : n_sink + start], v[:, :, : n_sink + start]) for k, v in store]
            rest = model.hidden_states(xt[:, start:], lengths, before=before)
            torch.testing.assert_close(
                rest[real[:, start:]], whole[:, start:][real[:, start:]], atol=1e-5, rtol=1e-5
            )


def test_no_mask_reaches_attention_in_split(monkeypatch):
    """So that flash kernels may run; and the sinks' stream needs no attention at all."""
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask: calls.append((q.shape, k.shape, attn_mask)) or real(q, k, v, attn_mask),
    )
    make_model(n_sink=2, sink_attention="split")(torch.randint(0, 12, (3, 9)))
    assert calls == [((3, 2, 9, 8), (3, 2, 11, 8), None)] * 2


def test_head_where_it_counts(variant):
    """-log p at chosen places equals that of all logits, with its gradients, in one part and in many."""
    model = make_model(**variant)
    xt, places = torch.randint(0, 12, (3, 9)), torch.tensor([0, 3, 4, 8, 9, 20, 26])
    targets = torch.randint(0, 11, (7,))
    wanted = F.cross_entropy(model(xt).flatten(0, 1)[places], targets, reduction="none")
    weights = torch.rand(7)
    (wanted * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(model(xt, only=places), model(xt).flatten(0, 1)[places])
    for at_once in (model_module.LOGITS_AT_ONCE, 3 * 11, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_module, "LOGITS_AT_ONCE", at_once)
            model.zero_grad()
            nll = model(xt, only=places, targets=targets)
            (nll * weights).sum().backward()
        torch.testing.assert_close(nll, wanted, atol=1e-6, rtol=1e-6)
        for name, p in model.named_parameters():
            assert (p.grad - gradients[name]).norm() < 1e-5 * gradients[name].norm(), (name, at_once)
    nothing = model(xt, only=places[:0], targets=targets[:0])
    nothing.sum().backward()  # a batch in which nothing is hidden
    assert nothing.shape == (0,)


def test_loss_holds_few_logits_at_once(monkeypatch):
    """No tensor with a row of V for each hidden token is ever made, neither forward nor backward, and none of V is kept between."""
    model = make_model(vocab_size=4096, n_sink=0)
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 5 * 4096)
    x0 = torch.randint(0, 4096, (8, 16))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if (
                torch.is_tensor(out) and out.shape[1:] == (4096,) and len(out) != 16
            ):  # 16: the head's own weight, C x V
                largest = max(largest, out.size(0))
            return out

    kept = []
    everything = torch.ones_like(x0, dtype=torch.bool)
    with Watch():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
        ):
            loss = weighted_nll(model, x0, torch.full_like(x0, 4096), everything, torch.ones(8, 1)).sum()
        loss.backward()
    assert largest == 5 and len(kept) > 9 and not any(shape[1:] == (4096,) for shape in kept)


def test_vanilla_has_nothing_extra():
    names = set(make_model(n_sink=0).state_dict())
    assert not any("sink" in name or "gate" in name for name in names)
    assert set(make_model(n_sink=1).state_dict()) - names == {"sink"}
    assert make_model(n_sink=3).sink.shape == (3, 16)


def test_variants_of_one_seed_share_their_weights():
    models = []
    for flags in (
        {"n_sink": 0},
        {"n_sink": 2},
        {"gated_attention": True},
        {"sink_position": "end", "gated_attention": True},
    ):
        torch.manual_seed(5)
        models.append(
            MDM(MDMConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, **flags)).state_dict()
        )
    for other in models[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in models[0].items())
    assert not torch.equal(models[1]["wte.weight"][0], models[1]["wte.weight"][1])


def test_initialisation():
    torch.manual_seed(0)
    model = MDM(
        MDMConfig(
            block_size=8, vocab_size=500, n_layer=3, n_head=4, n_embd=128, n_sink=4, gated_attention=True
        )
    )
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
            continue
        residual = name.endswith(("attn.proj.weight", "mlp.w3.weight"))
        wanted = 1 / (math.sqrt(128) * 3) if residual else math.sqrt(2 / (5 * 128))
        assert p.std().item() == pytest.approx(wanted, rel=0.1 if name == "sink" else 0.02), name
        assert abs(p.mean().item()) < 4 * wanted / math.sqrt(p.numel()), name


@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 16), n_sink=st.integers(0, 3), position=st.sampled_from(["front", "end"]))
def test_any_length_up_to_block_size(T, n_sink, position):
    model = make_model(n_sink=n_sink, sink_position=position)
    xt = torch.randint(0, 12, (2, T))
    torch.testing.assert_close(model(xt).double(), oracle(model, xt), atol=2e-5, rtol=1e-4)


def test_counts():
    model = make_model(n_sink=3, gated_attention=True)
    c = model.config
    by_hand = c.n_layer * (4 * 16 * 16 + 3 * 16 * 64 + 2 * 16 + 16 * 16) + 16
    assert model.num_params() == by_hand
    assert model.num_params(non_embedding=False) == by_hand + 12 * 16 + 11 * 16 + 3 * 16
    assert c.table_params() == by_hand - c.n_layer * 16 * 16  # the table does not count the gate
    # 2 FLOPs a weight forward, 4 backward; attention: q k^T and weights v, each 2 T C FLOPs a token, three times in all
    assert (
        model.flops_per_token(10) == 6 * (by_hand + 11 * 16 / 2) + 3 * c.n_layer * 2 * 2 * 10 * 16
    )  # the head: half the tokens


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"n_embd": 18, "n_head": 4}, "n_embd 18 is not divisible by n_head 4"),
        ({"n_embd": 12, "n_head": 4}, "heads of even width"),
        ({"n_sink": -1}, "n_sink is -1"),
        ({"sink_position": "middle"}, "'front' or 'end'"),
        ({"sink_attention": "flash"}, "'mask' or 'split'"),
        ({"n_layer": 0}, "n_layer is 0"),
    ],
)
def test_bad_config(flags, message):
    with pytest.raises(ValueError, match=message):
        MDMConfig(**{"block_size": 8, "vocab_size": 11, **flags})


def test_bad_input():
    with pytest.raises(ValueError, match="sequence of 17 tokens exceeds block_size 16"):
        make_model()(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="no preset '7B'; there are 6M, 19M"):
        MDMConfig.preset("7B")
    with pytest.raises(ValueError, match="not an SMDM state dict"):
        MDM.from_smdm({"a": torch.zeros(2)}, n_head=2)
