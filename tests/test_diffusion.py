"""Forward process, loss and sampler against what can be worked out by hand.

python -m pytest tests/test_diffusion.py
"""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

from model import (
    diffusion_loss,
    generate,
    guided_logits,
    mask_tokens,
    noise_levels,
    sample_tokens,
    surest,
    weighted_nll,
)


class Stub(torch.nn.Module):
    """A model whose nll at every position of a row is given by a function of the row's share of [MASK]."""

    def __init__(self, nll_of_share, vocab_size=3):
        super().__init__()
        self.config, self.nll_of_share = (
            SimpleNamespace(mask_id=vocab_size, vocab_size=vocab_size),
            nll_of_share,
        )
        self.device = torch.device("cpu")

    def forward(self, xt, only, targets):
        share = (xt == self.config.mask_id).double().mean(1)
        p = (-self.nll_of_share(share)).exp()  # of token 0, the only one in x0
        log_p = torch.stack((p.log(), ((1 - p) / 2).log(), ((1 - p) / 2).log()), -1)
        return -log_p[only // xt.size(1), targets]


def everything(B, T):
    return torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)


@pytest.mark.parametrize("stratified", [False, True])
def test_loss_of_the_stub(stratified):
    """nll = 1 + 5 * masked share: its integral over t is 1 + 5/2. Without the weight 1 / p_mask the fully hidden texts count
    most, and the mean over hidden tokens is 1 + 5 * 2/3 = 4.33."""
    torch.manual_seed(0)
    x0, maskable = everything(4000, 400)
    loss = diffusion_loss(Stub(lambda share: 1 + 5 * share), x0, maskable, stratified=stratified)
    assert loss.item() == pytest.approx(3.5, abs=0.06)


def test_stratified_levels_lower_the_variance():
    x0, maskable = everything(16, 800)
    stub = Stub(lambda share: 1 + 5 * share)
    torch.manual_seed(0)
    draws = torch.tensor(
        [[diffusion_loss(stub, x0, maskable, stratified=s) for s in (False, True)] for _ in range(100)]
    )
    assert draws.mean(0).tolist() == pytest.approx([3.5, 3.5], abs=0.1)
    assert draws[:, 1].std() < draws[:, 0].std() / 2


def test_share_of_masked_tokens_is_p_mask():
    torch.manual_seed(0)
    p_mask = torch.tensor([[0.001], [0.1], [0.5], [0.9], [1.0]])
    x0 = torch.randint(0, 7, (5, 20000))
    maskable = torch.rand(5, 20000) < 0.5
    xt, masked = mask_tokens(x0, p_mask, maskable, mask_id=7)
    share = (masked.sum(1) / maskable.sum(1)).tolist()
    for got, wanted in zip(share, p_mask[:, 0].tolist()):
        assert got == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 10000) + 1e-9)
    assert not (masked & ~maskable).any()
    assert torch.equal(xt == 7, masked) and torch.equal(xt[~masked], x0[~masked])


def test_noise_levels():
    torch.testing.assert_close(
        noise_levels(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.001, 0.5005, 1.0])
    )


def test_loss_counts_maskable_tokens_only():
    """Fine-tuning: the prompt is never hidden, and the loss is per maskable token, whatever the length of the prompt."""
    torch.manual_seed(0)
    x0, maskable = everything(4000, 100)
    maskable[:, :60] = False
    seen = []

    def nll(share):
        seen.append(share)
        return 2 + 0 * share

    assert diffusion_loss(Stub(nll), x0, maskable).item() == pytest.approx(2.0, abs=0.06)
    assert seen[0].max() <= 0.4


def test_random_length_share():
    torch.manual_seed(0)
    lengths = []

    class Recorder(Stub):
        def forward(self, xt, only, targets):
            lengths.append(xt.size(1))
            return super().forward(xt, only, targets)

    x0, maskable = everything(2, 64)
    for _ in range(600):
        diffusion_loss(Recorder(lambda share: 1 + share), x0, maskable, random_length=0.25)
    short = [n for n in lengths if n < 64]
    assert 0.25 * 63 / 64 == pytest.approx(len(short) / 600, abs=0.08)
    assert min(short) <= 4 and max(short) >= 60 and min(lengths) >= 1
    lengths.clear()
    for _ in range(50):
        diffusion_loss(Recorder(lambda share: 1 + share), x0, maskable)
    assert set(lengths) == {64}


def test_loss_is_an_upper_bound_and_exact_in_the_limit():
    """For one token the bound is the integral of -log p(x0 | [MASK]), which is exact: the model's own likelihood."""
    model = make_model()
    x0 = torch.tensor([[4]])
    nll = -model(torch.tensor([[11]])).log_softmax(-1)[0, 0, 4]
    t = (torch.arange(2000) + 0.5)[:, None] / 2000
    p_mask = noise_levels(t)
    torch.manual_seed(0)
    xt, masked = mask_tokens(x0.expand(2000, 1), p_mask, torch.ones(2000, 1, dtype=torch.bool), 11)
    estimate = weighted_nll(model, x0.expand(2000, 1), xt, masked, p_mask)
    assert estimate.mean().item() == pytest.approx(
        nll.item(), abs=4 * estimate.std().item() / math.sqrt(2000)
    )


@pytest.mark.parametrize("way", ["mask", "split"])
def test_a_step_asks_the_device_for_nothing(way):
    """A model on a device without values ("meta"): whatever reads one back (.item(), the places where a condition holds) raises.
    So on a GPU the host never waits for the result of a micro-batch."""
    model = make_model(sink_attention=way).to("meta")
    x0, maskable = torch.randint(0, 11, (4, 16)), torch.ones(4, 16, dtype=torch.bool)
    loss = diffusion_loss(model, x0, maskable, stratified=True, random_length=0.5)
    loss.backward()
    assert loss.is_meta and all(p.grad.is_meta for p in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


# ---- sampler

PROMPT = torch.tensor([[11, 3, 11, 11, 5, 11, 11, 11, 2, 11], [1, 11, 11, 2, 11, 11, 11, 11, 11, 4]])


@pytest.mark.parametrize("remasking", ["confidence", "random"])
@pytest.mark.parametrize("temperature, cfg_scale", [(0.0, 0.0), (0.7, 0.0), (1.0, 0.5)])
def test_fills_every_gap_and_nothing_else(variant, remasking, temperature, cfg_scale):
    model = make_model(**variant)
    before = PROMPT.clone()
    filled, n_forward = generate(model, PROMPT, 4, temperature, remasking, cfg_scale)
    assert torch.equal(PROMPT, before)
    assert (filled < 11).all() and torch.equal(filled[PROMPT != 11], PROMPT[PROMPT != 11])
    passes = 4 * (2 if cfg_scale else 1)
    assert (
        n_forward == passes if remasking == "confidence" else 1 <= n_forward <= passes
    )  # by chance all may be revealed early


@pytest.mark.parametrize("remasking", ["confidence", "random"])
def test_a_row_does_not_depend_on_its_neighbours(remasking):
    model = make_model()
    options = {"steps": 5, "temperature": 0.8, "remasking": remasking, "cfg_scale": 0.3}
    together, _ = generate(model, PROMPT, seeds=[7, 8], **options)
    for row, seed in enumerate([7, 8]):
        alone, _ = generate(model, PROMPT[row : row + 1], seeds=[seed], **options)
        assert torch.equal(together[row], alone[0])
    other, _ = generate(model, PROMPT, seeds=[9, 8], **options)
    assert not torch.equal(together[0], other[0]) and torch.equal(together[1], other[1])


def test_reveals_evenly_and_per_row():
    """ceil(hidden / steps left) a step, counted in each row for itself."""
    x = torch.full((2, 10), 11)
    x[1, :7] = 3
    left = []
    generate(make_model(), x, steps=4, on_step=lambda x: left.append((x == 11).sum(1).tolist()))
    assert left == [[7, 2], [4, 1], [2, 0], [0, 0]]


def test_stops_when_all_is_filled():
    _, n_forward = generate(make_model(), PROMPT[:1, :4], steps=50)
    assert n_forward == 3


def test_confidence_reveals_the_surest_first():
    model = make_model()
    order = []
    generate(model, PROMPT[:1], steps=7, on_step=lambda x: order.append((x != 11)[0]))
    p = model(PROMPT[:1]).softmax(-1).amax(-1)[0].masked_fill(PROMPT[0] != 11, -1)
    assert order[0][p.argmax()]


def trace(model, x, **options):
    """x before and after every step of generate."""
    states = [x]
    filled, n_forward = generate(model, x, seeds=range(len(x)), on_step=states.append, **options)
    assert len(states) == n_forward + 1
    return states


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.25, 1.0])
def test_threshold_reveals_all_that_is_sure_enough(threshold):
    """By hand: every hidden place whose likeliest token has more than that probability; where there is none, the surest."""
    model = make_model()
    states = trace(model, PROMPT, steps=10, threshold=threshold)
    for before, after in zip(states, states[1:]):
        p, tokens = model(before).double().softmax(dim=-1).max(dim=-1)
        p = p.masked_fill(before != 11, -1)
        wanted = (p > threshold) | (p == p.amax(dim=1, keepdim=True)) & (p > 0)
        assert torch.equal(after, torch.where(wanted, tokens, before))
    assert len(states) - 1 == {0.0: 1, 1.0: 7}.get(threshold, len(states) - 1)
    assert (
        len(trace(model, PROMPT, steps=2, threshold=1.0)) == 3
    )  # steps are a limit: half of what is left, then the rest


@pytest.mark.parametrize("block_length", [1, 4, 10, 99])
@pytest.mark.parametrize("threshold", [None, 0.15])
def test_blocks_are_filled_from_left_to_right(block_length, threshold):
    """By hand: of the leftmost block (counted from the row's start) with something hidden, the surest and what is sure enough."""
    model = make_model()
    options = {"steps": 8, "block_length": block_length, "threshold": threshold}
    for before, after in zip(states := trace(model, PROMPT, **options), states[1:]):
        p, tokens = model(before).double().softmax(dim=-1).max(dim=-1)
        for row in range(2):
            hidden = [i for i in range(10) if before[row, i] == 11]
            if hidden:
                block = [i for i in hidden if i // block_length == hidden[0] // block_length]
                best = max(block, key=lambda i: p[row, i].item())
                wanted = [i for i in block if i == best or p[row, i] > (threshold or 1)]
                assert (after[row] != before[row]).nonzero()[:, 0].tolist() == wanted
                assert torch.equal(after[row, wanted], tokens[row, wanted])


def test_blocks_and_few_steps():
    """Seven hidden places in two steps: four from the left, though a block has three; then the other three."""
    x = torch.full((1, 7), 11)
    states = trace(make_model(), x, steps=2, block_length=3)
    assert (states[1] != 11)[0, :3].all() and (states[1] != 11).sum() == 4 and len(states) == 3


def test_prefix_cache(variant):
    """Exact where nothing is left of the block; else an approximation, which computes the prefix once a block: by hand."""
    model = make_model(**variant)
    assert torch.equal(
        *(generate(model, PROMPT, steps=8, block_length=10, prefix_cache=c)[0] for c in (False, True))
    )
    L, n_sink = 4, model.config.n_sink
    states = trace(model, PROMPT[:1], steps=8, block_length=L, prefix_cache=True)
    cached = None
    for before, after in zip(states, states[1:]):
        block = (before[0] == 11).nonzero()[0].item() // L
        if block != cached:
            model.hidden_states(before, store=(store := []))
            cached, kv = (
                block,
                [(k[:, :, : n_sink + block * L], v[:, :, : n_sink + block * L]) for k, v in store],
            )
        logits = model(before[:, block * L :], before=kv)[0]
        p, tokens = logits.double().softmax(dim=-1).max(dim=-1)
        p = p.masked_fill(before[0, block * L :] != 11, -1)[:L]
        assert (after != before)[0].nonzero()[:, 0].tolist() == [block * L + p.argmax().item()]
        assert after[0, block * L + p.argmax()] == tokens[p.argmax()]


def test_a_row_that_waits_loses_no_steps():
    """Row 0 has four blocks to write, row 1 two: with few steps, how many tokens it reveals at once is its own affair."""
    model, x = make_model(), torch.full((2, 16), 11)
    x[1, :8] = 2
    options = {"steps": 8, "block_length": 4, "prefix_cache": True}
    together, _ = generate(model, x, seeds=[1, 2], **options)
    for row in (0, 1):
        assert torch.equal(generate(model, x[row : row + 1], seeds=[1 + row], **options)[0][0], together[row])


def test_prefix_cache_computes_less():
    model = make_model()
    x = torch.full((1, 16), 11)
    passes = lambda cache: [
        len(args[0]) for args in seen(model, x, steps=16, block_length=4, prefix_cache=cache)
    ]  # noqa: E731
    assert passes(True) == passes(False) == [1] * 16
    x = torch.zeros(2, 16, dtype=torch.long)
    x[0, [1, 9, 10]] = x[1, [8, 9]] = 11  # a row waits until the others have come to its block
    shapes = [tuple(args[0].shape) for args in seen(model, x, steps=16, block_length=4, prefix_cache=True)]
    assert shapes == [(1, 16), (2, 16), (2, 8)]
    x = torch.full((1, 16), 11)
    lengths = [args[0].size(1) for args in seen(model, x, steps=16, block_length=4, prefix_cache=True)]
    assert lengths == [16, 16, 16, 16, 16, 12, 12, 12, 16, 8, 8, 8, 16, 4, 4, 4]


def seen(model, x, **options):
    """The arguments of every forward pass of generate."""
    calls = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(args))
    generate(model, x, **options)
    hook.remove()
    return calls


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_sinks_are_computed_once_for_a_text(cfg_scale, monkeypatch):
    model, calls = make_model(sink_attention="split"), []
    real = model.sink_keys_values
    monkeypatch.setattr(model, "sink_keys_values", lambda: calls.append(1) or real())
    generate(model, PROMPT, steps=8, cfg_scale=cfg_scale)
    assert calls == [1]


def test_random_reverse_process_reveals_at_the_right_rate():
    """From t to s, (t - s) / t of the hidden tokens: uniformly over the steps, whatever the model's confidence."""
    x = torch.full((400, 10), 11)
    left = []
    torch.manual_seed(0)
    generate(
        make_model(),
        x,
        steps=5,
        remasking="random",
        on_step=lambda x: left.append((x == 11).float().mean().item()),
    )
    assert left == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=0.03)


def test_random_one_token_at_a_time_draws_from_the_model():
    """With a single hidden token, temperature 1 must reproduce softmax(logits): chi-square over 4,000 draws."""
    model = make_model()
    x = torch.tensor([[1, 11, 3, 4]])
    p = model(x)[0, 1].softmax(-1).double()
    torch.manual_seed(0)
    filled, _ = generate(model, x.expand(4000, -1), steps=1, temperature=1.0, remasking="random")
    counts = torch.bincount(filled[:, 1], minlength=11).double()
    chi2 = ((counts - 4000 * p) ** 2 / (4000 * p)).sum().item()
    assert chi2 < 29.6  # 99.9 % of chi-square with 10 degrees of freedom


def test_temperature():
    logits = torch.tensor([[1.0, 2.0, 0.0]]).expand(20000, 3)
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        tokens, confidence = sample_tokens(logits, temperature, generator)
        wanted = (logits[0] / temperature).softmax(-1)
        got = torch.bincount(tokens, minlength=3) / 20000
        torch.testing.assert_close(got, wanted, atol=0.012, rtol=0)
        torch.testing.assert_close(
            confidence, logits[0].softmax(-1).double()[tokens]
        )  # of the untempered model
    tokens, _ = sample_tokens(logits, 0.0)
    assert (tokens == 1).all()


def test_guidance():
    model = make_model()
    x, given = PROMPT, PROMPT != 11
    cond, un = model(x), model(torch.full_like(x, 11))
    torch.testing.assert_close(guided_logits(model, x, given, 0.0), cond)
    torch.testing.assert_close(guided_logits(model, x, given, 0.6), un + 1.6 * (cond - un))
    plain, _ = generate(model, x, steps=10)
    guided, _ = generate(model, x, steps=10, cfg_scale=4.0)
    assert not torch.equal(plain, guided)


def test_surest():
    assert surest(torch.tensor([0.1, 0.9, 0.5, 0.9]), 2).tolist() == [False, True, False, True]
    assert surest(torch.tensor([0.3, 0.3, 0.3]), 1).tolist() == [True, False, False]
    assert surest(torch.tensor([0.3, 0.2]), 0).tolist() == [False, False]
    assert surest(torch.tensor([0.3, 0.2]), 5).tolist() == [True, True]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"remasking": "greddy"}, "remasking is 'greddy'"),
        ({"steps": 0}, "wanted steps >= 1"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"cfg_scale": -0.1}, "cfg_scale >= 0"),
        ({"seeds": [1]}, "1 seeds for 2 rows"),
        ({"threshold": 1.5}, "wanted threshold in 0..1"),
        ({"threshold": math.nan}, "wanted threshold in 0..1"),
        ({"block_length": 0}, "block_length >= 1"),
        ({"threshold": 0.9, "remasking": "random"}, "leave them out with remasking='random'"),
        ({"block_length": 4, "remasking": "random"}, "leave them out with remasking='random'"),
        ({"prefix_cache": True}, "prefix_cache needs a block_length"),
        ({"prefix_cache": True, "block_length": 4, "cfg_scale": 1.0}, "without cfg_scale only"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), PROMPT, **{"steps": 4, **options})
