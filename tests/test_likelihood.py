"""eval.py's likelihoods: Monte Carlo against the integral, chain rule and greedy decoding by hand, tokens."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import make_model

import eval as eval_module
from eval import EvalConfig, draws, encode_pair, greedy_match, log_likelihood
from prepare_data import load_tokenizer, make_tokenizer

CONTEXT, TARGET, MASK = [3, 1, 4], [1, 5, 9, 2], 11  # MASK of the tiny model
ALL_MASKS = list(itertools.product([False, True], repeat=4))
CHAIN = {"nll_type": "chain_rule"}


def logits_of(model, context, tokens, cfg_scale):
    """Logits (L, V) behind the context: a plain forward pass, and one with a hidden context for guidance."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *tokens]]))[0].double()
        if cfg_scale:
            un = model(torch.tensor([[MASK] * len(context) + tokens]))[0].double()
            logits = un + (1 + cfg_scale) * (logits - un)
    return logits[len(context) :]


def nll_by_hand(model, context, target, hidden, cfg_scale=0.0):
    """-log p of every target token (L,), given which of them are hidden."""
    tokens = [MASK if is_hidden else token for token, is_hidden in zip(target, hidden)]
    log_p = logits_of(model, context, tokens, cfg_scale).log_softmax(dim=-1)
    return -log_p[range(len(target)), target].numpy()


def nll(model, context, target, **options):
    return -log_likelihood(model, context, target, EvalConfig(**options))


def estimates(table, n, **options):
    """n draws of the estimator, from -log p of all masks, {mask: (4,)}."""
    values = []
    for seed in range(n):
        hidden, weight = draws(4, EvalConfig(**options), np.random.default_rng(seed))
        values.append(sum((w * table[tuple(row)]).sum() for row, w in zip(hidden.tolist(), weight)))
    return np.array(values)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.6])
@pytest.mark.parametrize("mc_masking", ["coins", "exact"])
def test_monte_carlo_is_unbiased(mc_masking, cfg_scale):
    """E_t E_masks [sum over hidden of -log p / t], over all 16 masks and by quadrature in t."""
    model, t, wanted = make_model(), (np.arange(20000) + 0.5) / 20000, 0.0
    table = {mask: nll_by_hand(model, CONTEXT, TARGET, mask, cfg_scale) for mask in ALL_MASKS}
    for mask, values in table.items():
        k = sum(mask)
        wanted += values[list(mask)].sum() * np.mean(t**k * (1 - t) ** (4 - k) / t)
    for mc_num in (1, 5):
        values = estimates(table, 1500, mc_num=mc_num, mc_masking=mc_masking)
        assert abs(values.mean() - wanted) < 3.5 * values.std() / math.sqrt(1500), mc_num
    mc_num = {"coins": 200_000, "exact": 2000}[mc_masking]
    many = nll(model, CONTEXT, TARGET, mc_num=mc_num, mc_masking=mc_masking, cfg_scale=cfg_scale)
    assert many == pytest.approx(wanted, rel=0.005)


def test_exact_masks_hide_all_tokens_equally_often():
    """Over the draws of a request no token is hidden more than once more often than another."""
    for seed in range(20):
        hidden, weight = draws(7, EvalConfig(mc_num=9), np.random.default_rng(seed))
        times = weight.max(axis=1) * 9 * hidden.sum(axis=1) / 7  # a pass may stand for several draws
        counts = (times[:, None] * hidden).sum(axis=0).round(6)
        assert counts.max() - counts.min() <= 1 and counts.sum() > 20


def test_exact_masks_of_a_size_are_equally_likely():
    """Balanced or not: every set of k of 4 tokens comes equally often, and every k once in 4 draws."""
    counts = dict.fromkeys(ALL_MASKS[1:], 0)
    for seed in range(3000):
        hidden, weight = draws(4, EvalConfig(mc_num=4), np.random.default_rng(seed))
        assert sorted(hidden.sum(axis=1)) == [1, 2, 3, 4]
        np.testing.assert_allclose(weight, hidden / hidden.sum(axis=1, keepdims=True))  # L / k / mc_num
        for row in hidden.tolist():
            counts[tuple(row)] += 1
    for mask, n in counts.items():
        wanted = 3000 / math.comb(4, sum(mask))
        assert abs(n - wanted) < 4.5 * math.sqrt(wanted), mask


@pytest.mark.parametrize("mc_masking", ["coins", "exact"])
def test_equal_passes_are_made_once(mc_masking):
    hidden, weight = draws(4, EvalConfig(mc_num=200, mc_masking=mc_masking), np.random.default_rng(0))
    assert 12 < len(hidden) <= 16 and len(np.unique(hidden, axis=0)) == len(hidden)
    assert np.array_equal(weight > 0, hidden)
    if mc_masking == "exact":
        assert weight.sum() == pytest.approx(4)  # with a -log p of 1 everywhere: L


@pytest.mark.parametrize("context", [CONTEXT, []])
def test_one_token_is_exact(context):
    model = make_model()
    wanted = pytest.approx(nll_by_hand(model, context, [7], [True])[0], abs=1e-6)
    assert nll(model, context, [7], **CHAIN) == wanted and nll(model, context, [7], mc_num=3) == wanted


def test_empty_target():
    model = make_model()
    with np.errstate(all="raise"):
        assert nll(model, CONTEXT, []) == nll(model, CONTEXT, [], **CHAIN) == 0
    assert greedy_match(model, CONTEXT, [], EvalConfig())


def test_each_request_has_its_own_draws(monkeypatch):
    """They follow from its tokens and the seed, and from nothing else."""
    model, masks = make_model(), []

    def recorded(*args):
        hidden, weight = draws(*args)
        masks.append(hidden.tolist())
        return hidden, weight

    monkeypatch.setattr(eval_module, "draws", recorded)
    a, b = [1] * 12, [1] * 11 + [2]
    for context, target, seed in (([2], a, 0), ([3], a, 0), ([2], b, 0), ([2], a, 1), ([2], a, 0)):
        nll(model, context, target, mc_num=8, seed=seed)
    assert masks.pop() == masks[0] and len({str(mask) for mask in masks}) == 4


@pytest.mark.parametrize("options", [CHAIN, {}, {"mc_masking": "coins", "cfg_scale": 0.7}])
def test_score_does_not_depend_on_batch_size(variant, options):
    model, rows, target = make_model(**variant), [], [1, 5, 9, 2, 6, 5, 3]
    wanted = pytest.approx(nll(model, CONTEXT, target, mc_num=9, **options), rel=1e-6)
    model.blocks[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for batch_size in (1, 3):
        rows.clear()
        assert nll(model, CONTEXT, target, mc_num=9, batch_size=batch_size, **options) == wanted
        assert max(rows) == batch_size


def test_sums_are_not_made_in_half_precision(monkeypatch):
    """Under bfloat16 products are rounded; softmax is taken in float32, the sum over passes in float64."""
    model, seen, real = make_model(), [], torch.nn.functional.cross_entropy
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))

    def recorded(logits, *args, **options):
        seen.append(logits.dtype)
        seen.append(real(logits, *args, **options))
        return seen[-1]

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    half = nll(model, CONTEXT, 3 * TARGET, **CHAIN, dtype="bfloat16")
    *dtypes, values = seen
    assert dtypes == [torch.bfloat16, torch.float32]
    assert half == pytest.approx(math.fsum(values.tolist()), rel=1e-12)
    assert half == pytest.approx(nll(model, CONTEXT, 3 * TARGET, **CHAIN), rel=0.02)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_greedy_match_by_hand(variant, cfg_scale):
    """One token a step, the surest of all hidden ones. Then any other token in one position is no match."""
    model, cfg = make_model(**variant), EvalConfig(cfg_scale=cfg_scale)
    for context in ([5], [3, 1, 4], [9, 2, 6, 5, 3, 5, 8]):
        tokens = [MASK] * 5
        for _ in range(5):
            p = logits_of(model, context, tokens, cfg_scale).softmax(dim=-1)
            p[[token != MASK for token in tokens]] = -1
            position, token = divmod(p.argmax().item(), 11)
            tokens[position] = token
        assert greedy_match(model, context, tokens, cfg)
        for i in range(5):
            changed = tokens[:i] + [(tokens[i] + 1) % 11] + tokens[i + 1 :]
            assert not greedy_match(model, context, changed, cfg)


# ---- tokens of a request


@pytest.fixture(scope="module")
def tokenizer():
    """Merges of a small corpus: ' yes', 'now' and the like are one token."""
    return load_tokenizer(make_tokenizer("words", texts=["Answer: yes no now "]))


BORDERS = [("Answer:", " yes", b" yes"), ("aä", "ö", "ö".encode()[:1])]
BORDERS += [("Answer: ", "yes", b" yes")]  # the space belongs to the token, and so to the continuation
BORDERS += [("Answer: no", "w", b" now")]  # a token over the border is the continuation's


@pytest.mark.parametrize("context, continuation, first", BORDERS)
def test_tokens_are_those_of_the_joint_text(tokenizer, context, continuation, first):
    before, after, n_cut = encode_pair(tokenizer, context, continuation, 99)
    assert before + after == tokenizer.encode_ordinary(context + continuation) and n_cut == 0
    assert tokenizer.decode_single_token_bytes(after[0]) == first
    assert context.encode().startswith(tokenizer.decode_bytes(before))


def test_contexts_are_cut_from_the_left(tokenizer):
    """An empty one is end-of-text."""
    a, b, c, x, y = b"abcxy"  # ids of the bytes
    assert encode_pair(tokenizer, "", "xy", 99) == ([tokenizer.eot_token], [x, y], 0)
    for block_size, context, n_cut in ((5, [a, b, c], 0), (4, [b, c], 1), (2, [], 3)):
        assert encode_pair(tokenizer, "abc", "xy", block_size) == (context, [x, y], n_cut)
    with pytest.raises(ValueError, match="a continuation of 2 tokens exceeds block_size 1"):
        encode_pair(tokenizer, "abc", "xy", 1)
