"""Likelihoods: the estimators against enumeration, scores that depend on nothing but the request, greedy decoding by hand.

python -m pytest tests/test_likelihood.py
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import make_model

from bench import one_at_a_time
from configurator import parse
from eval import (
    EvalConfig,
    Trained,
    continuations,
    encode_pair,
    fit,
    greedy_matches,
    hidden_tokens,
    rolling_loglikelihoods,
    score,
)
from model import MDM, generate, guided_logits
from prepare_data import load_tokenizer, make_tokenizer

MASK = 11  # of the tiny model


def nll_of(model, context, target, hidden, cfg_scale=0.0):
    """-log p of every target token, (L,), given which of them are hidden: one plain forward pass (two with guidance)."""
    x = torch.tensor([[*context, *(MASK if h else token for token, h in zip(target, hidden))]])
    with torch.no_grad():
        logits = model(x)[0]
        if cfg_scale:
            x[0, : len(context)] = MASK
            unconditional = model(x)[0]
            logits = unconditional + (1 + cfg_scale) * (logits - unconditional)
    return -logits.log_softmax(dim=-1)[len(context) :].gather(1, torch.tensor(target)[:, None])[:, 0]


def requests(n, seed=0, longest=16):
    """Pairs of random ids of mixed lengths, up to the model's 16 tokens."""
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(0, longest - 4)), int(rng.integers(1, 6))) for _ in range(n)]
    return [
        (rng.integers(0, 11, a).tolist(), rng.integers(0, 11, min(b, longest - a)).tolist())
        for a, b in shapes
    ]


# ---- the estimators

CONTEXT, TARGET = [3, 1, 4], [1, 5, 9, 2]


def enumerated_bound(model, cfg_scale):
    """E_t E_masks [sum over hidden of -log p / t] over all 2^4 masks, each with probability t^k (1-t)^(4-k), by quadrature in t."""
    t = (np.arange(20000) + 0.5) / 20000
    total = 0.0
    for hidden in itertools.product([False, True], repeat=4):
        k = sum(hidden)
        if k:
            nll = nll_of(model, CONTEXT, TARGET, hidden, cfg_scale)[list(hidden)].sum().item()
            total += nll * np.mean(t**k * (1 - t) ** (4 - k) / t)
    return total


@pytest.mark.parametrize("cfg_scale", [0.0, 0.6])
@pytest.mark.parametrize("way", ["coins", "exact", "plain loop"])
def test_monte_carlo_is_unbiased(way, cfg_scale):
    model = make_model()
    if way == "plain loop" and cfg_scale:
        pytest.skip("the yardstick of bench.py has no guidance")
    wanted, seeds = enumerated_bound(model, cfg_scale), range(600)
    for mc_num in (1, 8):
        if way == "plain loop":
            draws = np.array([one_at_a_time(model, [(CONTEXT, TARGET)], mc_num, seed)[0] for seed in seeds])
        else:
            options = {"mc_num": mc_num, "mc_masking": way, "cfg_scale": cfg_scale}
            draws = np.array([score(model, [(CONTEXT, TARGET)], seed=seed, **options)[0] for seed in seeds])
        assert abs(draws.mean() - wanted) < 3 * draws.std() / math.sqrt(len(draws)), mc_num
        assert draws.std() > 0.01


def test_exact_counts_vary_less_than_coins():
    model, sd = make_model(), {}
    for way in ("coins", "exact"):
        sd[way] = np.std(
            [score(model, [(CONTEXT, TARGET)], mc_num=8, mc_masking=way, seed=seed)[0] for seed in range(300)]
        )
    assert sd["exact"] < sd["coins"] / 3


def test_coins_weigh_the_inverse_of_their_chance():
    """Of 2,000 tokens the hidden share is t, within a few per cent: a weight of 1 / t is a weight of 2,000 / hidden."""
    hidden, weight = hidden_tokens([3], [1] * 2000, "mc", 6, "coins", 0)
    share = hidden.mean(axis=1)
    assert len(share) == 6 and np.ptp(share) > 0.7
    np.testing.assert_allclose(weight.max(axis=1), 1 / share / 6, rtol=0.1)


def test_tokens_are_dealt_from_one_deck():
    """Over the draws of a request no token is hidden more than once more often than another."""
    for seed in range(20):
        hidden, weight = hidden_tokens([3], list(range(7)), "mc", 9, "exact", seed)
        k = hidden.sum(axis=1)
        times = weight.max(axis=1) * 9 * k / 7  # a pass that stands for several draws
        counts = (times[:, None] * hidden).sum(axis=0).round(6)
        assert counts.max() - counts.min() <= 1 and counts.sum() > 20


def test_marginal_of_exact_masks_is_uniform():
    """Dealt from one deck or not: of each size, every set of tokens comes equally often, in every draw."""
    counts = {}
    for seed in range(6000):
        hidden, weight = hidden_tokens(CONTEXT, TARGET, "mc", 4, "exact", seed)
        for row, w in zip(hidden, weight):
            assert w[row] == pytest.approx(4 / row.sum() / 4) and not w[~row].any()
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert len(counts) == 15
    for row, n in counts.items():
        wanted = 6000 / math.comb(4, sum(row))
        assert abs(n - wanted) < 4.5 * math.sqrt(wanted), row


@pytest.mark.parametrize("way", ["coins", "exact"])
def test_passes_are_made_once(way):
    """With 200 draws and 4 tokens there are no more than 15 passes, and none without a hidden token; the weights add up."""
    hidden, weight = hidden_tokens(CONTEXT, TARGET, "mc", 200, way, 0)
    assert (
        len(hidden) <= 15 and hidden.any(axis=1).all() and len({tuple(row) for row in hidden}) == len(hidden)
    )
    assert np.array_equal(weight > 0, hidden)
    if way == "exact":
        assert weight.sum() == pytest.approx(4)  # of nll = 1 everywhere: L tokens


@pytest.mark.parametrize("cfg_scale", [0.0, 0.6])
def test_chain_rule_by_hand(variant, cfg_scale):
    model = make_model(**variant)
    wanted = 0.0
    for j in range(4):
        wanted += nll_of(model, CONTEXT, TARGET, [i >= j for i in range(4)], cfg_scale)[j].item()
    (nll,) = score(model, [(CONTEXT, TARGET)], "chain_rule", cfg_scale=cfg_scale)
    assert nll == pytest.approx(wanted, abs=1e-5)


def test_one_token_is_exact():
    """For one token all estimators are its -log p; with coins, in the mean."""
    model = make_model()
    wanted = nll_of(model, CONTEXT, [7], [True]).item()
    assert score(model, [(CONTEXT, [7])], "chain_rule")[0] == pytest.approx(wanted, abs=1e-6)
    assert score(model, [(CONTEXT, [7])], mc_num=3)[0] == pytest.approx(wanted, abs=1e-6)


def test_no_target_and_no_number():
    model = make_model()
    with np.errstate(all="raise"):
        assert (
            score(model, [(CONTEXT, [])]).tolist()
            == score(model, [(CONTEXT, [])], "chain_rule").tolist()
            == [0]
        )
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="a -log p is nan: the model is broken, or dtype too small"):
        score(model, [(CONTEXT, TARGET)])


# ---- nothing but the request counts


@pytest.mark.parametrize(
    "options",
    [{"nll_type": "chain_rule"}, {"mc_num": 5}, {"mc_num": 3, "mc_masking": "coins", "cfg_scale": 0.7}],
)
def test_score_does_not_depend_on_the_batch(variant, options):
    """Alone, among 32 of mixed lengths, in another order, in batches of another size."""
    model, pairs = make_model(**variant), requests(32)
    assert len({len(context) + len(target) for context, target in pairs}) > 8
    alone = np.array([score(model, [pair], **options)[0] for pair in pairs])
    np.testing.assert_allclose(score(model, pairs, **options), alone, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(score(model, pairs[::-1], **options)[::-1], alone, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(score(model, pairs, batch_tokens=50, **options), alone, atol=1e-5, rtol=1e-6)
    assert len(np.unique(alone.round(4))) > 20


def test_each_request_has_its_own_draws():
    """From its tokens and the seed: neither the same for all, nor dependent on the place among them."""
    masks = [
        hidden_tokens(context, [1] * 12, "mc", 8, way, 0)[0].tolist()
        for way in ("exact", "coins")
        for context in ([2], [3])
    ]
    assert masks[0] != masks[1] and masks[2] != masks[3]
    assert masks[0] == hidden_tokens([2], [1] * 12, "mc", 8, "exact", 0)[0].tolist()
    assert masks[0] != hidden_tokens([2], [1] * 12, "mc", 8, "exact", 1)[0].tolist()


def test_passes_stay_within_batch_tokens():
    model, shapes = make_model(), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    score(model, requests(20), mc_num=4, batch_tokens=64)
    assert max(rows * width for rows, width in shapes) <= 64 and max(rows for rows, _ in shapes) > 4
    shapes.clear()
    score(model, requests(3), mc_num=4, batch_tokens=1)  # a row at least
    assert {rows for rows, _ in shapes} == {1}


def test_head_runs_at_scored_places_only():
    model, rows = make_model(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    score(model, [(CONTEXT, TARGET)], "chain_rule")
    assert sum(rows) == 4


@pytest.mark.parametrize(
    "option",
    [{"nll_type": "chain_rule"}, {"mc_num": 7}, {"mc_masking": "coins"}, {"cfg_scale": 0.5}, {"seed": 2}],
)
def test_every_option_changes_the_score(option):
    model = make_model()
    assert abs(score(model, [(CONTEXT, TARGET)]) - score(model, [(CONTEXT, TARGET)], **option)) > 1e-4


def test_sums_are_not_made_in_half_precision(monkeypatch):
    """Under bfloat16 the network's products are rounded; softmax is taken in float32, and the sum over draws in float64."""
    model, seen, cross_entropy = make_model(), [], torch.nn.functional.cross_entropy
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))

    def recorded(logits, *args, **options):
        seen.append(logits.dtype)
        return cross_entropy(logits, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    (half,) = score(model, [(CONTEXT, TARGET)], dtype="bfloat16")
    assert seen == [torch.bfloat16, torch.float32] and half.dtype == np.float64
    assert half == pytest.approx(score(model, [(CONTEXT, TARGET)])[0], rel=0.02)


# ---- greedy decoding


def greedy_fill(model, context, n, cfg_scale=0.0):
    """By hand: one row, one token a step, the surest of all hidden ones."""
    x = torch.tensor([[*context, *[MASK] * n]])
    given = torch.arange(x.size(1))[None] < len(context)
    for _ in range(n):
        with torch.no_grad():
            p = guided_logits(model, x, given, cfg_scale)[0].double().softmax(dim=-1)
        p[x[0] != MASK] = -1
        place, token = divmod(int(p.argmax()), 11)
        x[0, place] = token
    return x[0, len(context) :].tolist()


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_greedy_matches(variant, cfg_scale):
    """Of 24 requests of mixed lengths in one batch every third has a wrong token somewhere."""
    model, wanted = make_model(**variant), []
    pairs = [
        (context or [5], target) for context, target in requests(24, longest=15)
    ]  # with no token to see, places tie
    pairs = [(context, greedy_fill(model, context, len(target), cfg_scale)) for context, target in pairs]
    for number, (_, target) in enumerate(pairs):
        wanted.append(number % 3 > 0)
        if number % 3 == 0:
            at = number % len(target)
            target[at] = (target[at] + 1) % 11
    assert greedy_matches(model, pairs, cfg_scale).tolist() == wanted
    assert greedy_matches(model, pairs, cfg_scale, batch_tokens=40).tolist() == wanted


def test_a_wrong_token_ends_a_request():
    model = make_model()
    fill, passes = greedy_fill(model, CONTEXT, 5), []
    wrong = [(token + 1) % 11 for token in fill]
    model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    assert greedy_matches(model, [(CONTEXT, fill), (CONTEXT, wrong)]).tolist() == [True, False]
    assert passes == [2, 1, 1, 1, 1]


# ---- text


@pytest.fixture(scope="module")
def tokenizer():
    """Merges of a small corpus: ' yes', 'now' and the like are one token."""
    spec = make_tokenizer("bpe", False, 290, ["Answer: yes no now " * 30])
    return load_tokenizer(spec)


@pytest.mark.parametrize(
    "context, continuation, first",
    [
        ("Answer:", " yes", b" yes"),
        ("Answer: ", "yes", b" yes"),  # the space belongs to the token, and so to the continuation
        (" no", "w", b" now"),  # a token over the border is the continuation's
        ("ä", "ö", "ö".encode()[:1]),
    ],
)
def test_tokens_are_those_of_the_joint_text(tokenizer, context, continuation, first):
    before, after = encode_pair(tokenizer, context, continuation)
    if before != [tokenizer.eot_token]:
        assert before + after == tokenizer.encode_ordinary(context + continuation)
    assert tokenizer.decode_single_token_bytes(after[0]) == first


def test_half_a_character_becomes_a_question_mark(tokenizer):
    assert encode_pair(tokenizer, "a\ud800", "b") == ([97, 63], [98])


def test_empty_context_is_end_of_text(tokenizer):
    assert encode_pair(tokenizer, "", "yes") == ([tokenizer.eot_token], tokenizer.encode_ordinary("yes"))


def test_contexts_are_cut_from_the_left():
    assert fit([1, 2, 3, 4], [5, 6], 6) == ([1, 2, 3, 4], [5, 6])
    assert fit([1, 2, 3, 4], [5, 6], 5) == ([2, 3, 4], [5, 6])
    assert fit([1, 2, 3, 4], [5, 6], 2) == ([], [5, 6])
    with pytest.raises(ValueError, match="a continuation of 3 tokens exceeds the model's block_size 2"):
        fit([1], [5, 6, 7], 2)


@pytest.fixture(scope="module")
def trained(tokenizer):
    model = make_model(vocab_size=tokenizer.n_vocab, block_size=24)
    return Trained(model, tokenizer, {"model": model.state_dict()}, 0, 1)


def test_rolling_covers_every_token_once(trained):
    """60 bytes in pieces of 23 tokens, each behind the last token of the one before; the last piece behind as many as fit."""
    text = "xq" * 30
    ids = [trained.tokenizer.eot_token, *text.encode()]
    ids[1:] = trained.tokenizer.encode_ordinary(text)
    assert len(ids) == 61
    pieces = [(ids[0:1], ids[1:24]), (ids[23:24], ids[24:47]), (ids[37:47], ids[47:61])]
    cfg = EvalConfig(mc_num=4)
    both = rolling_loglikelihoods(cfg, trained, [text, "", "yes"])
    assert both[0]["log_p"] == pytest.approx(-score(trained.model, pieces, mc_num=4).sum())
    assert both[1]["log_p"] == 0
    assert both[2]["log_p"] == pytest.approx(
        -score(trained.model, [encode_pair(trained.tokenizer, "", "yes")], mc_num=4)[0]
    )


def test_rolling_windows_are_the_harness_s(trained, monkeypatch):
    utils = pytest.importorskip("lm_eval.utils")
    seen = []
    monkeypatch.setattr("eval.score", lambda model, pairs, **_: seen.append(pairs) or np.zeros(len(pairs)))
    for n in (1, 22, 23, 24, 46, 47, 60, 100):
        text = "".join(chr(97 + i * 7 % 26) for i in range(n))
        ids = trained.tokenizer.encode_ordinary(text)
        windows = utils.get_rolling_token_windows(ids, trained.tokenizer.eot_token, 23, 1)
        rolling_loglikelihoods(EvalConfig(), trained, [text])
        assert seen.pop() == [utils.make_disjoint_window(window) for window in windows]


def asked(context, max_gen_toks, repeat=0, **options):
    return context, {"until": [], "do_sample": False, "max_gen_toks": max_gen_toks, **options}, repeat


def test_continuations(trained):
    """Equal to generate on each row alone, at its temperature; ends at `until`; an over-long context is cut from the left."""
    cfg, tokenizer, eot = EvalConfig(temperature=1.5), trained.tokenizer, trained.tokenizer.eot_token
    hot = {"do_sample": True, "temperature": 3.0}
    requests = [
        asked("Answer:", 6),
        asked("Answer: yes", 9),
        asked("q" * 40, 5),
        asked("", 4),
        asked("zz", 6, **hot),
    ]
    requests += [asked("Answer:", 6, do_sample=True)]
    together = continuations(cfg, trained, requests)
    assert together == [continuations(cfg, trained, [request])[0] for request in requests]
    assert [record["cut"] for record in together] == [0, 0, 40 - (24 - 5), 0, 0, 0]
    for (context, options, _), record in list(zip(requests, together))[:4]:
        n_new = options["max_gen_toks"]
        prompt = (tokenizer.encode_ordinary(context) or [eot])[-(24 - n_new) :]
        x = torch.tensor([prompt + [trained.model.config.mask_id] * n_new])
        ids = generate(trained.model, x, 256, eot_id=eot)[0][0].tolist()[len(prompt) :]
        assert record["text"] == tokenizer.decode(ids[: ids.index(eot)] if eot in ids else ids)
    first = together[1]["text"]
    (cut,) = continuations(cfg, trained, [asked("Answer: yes", 9, until=[first[3:5], "never"])])
    assert cut["text"] == first[: first.index(first[3:5])]


@pytest.mark.parametrize(
    "n_context, n_new, cut", [(2, 22, 0), (11, 13, 0), (12, 12, 0), (13, 12, 1), (40, 12, 28)]
)
def test_a_long_text_leaves_the_context_its_half(trained, monkeypatch, n_context, n_new, cut):
    """The harness asks for 256 tokens by default, which small models do not have: the context is kept, up to half of the model."""
    hidden = []

    def fake(model, x, *_, **options):
        hidden.append(int((x[0] == model.config.mask_id).sum()))
        return torch.full_like(x, 97), 1

    monkeypatch.setattr("eval.generate", fake)
    (record,) = continuations(EvalConfig(), trained, [asked("q" * n_context, 256)])
    assert (hidden, record["cut"]) == ([n_new], cut)


def test_a_text_ends_before_its_end_of_text(trained, monkeypatch):
    def fake(model, x, *_, **options):
        x[0, -4:] = torch.tensor([32, 98, trained.tokenizer.eot_token, 99])
        return x, 1

    monkeypatch.setattr("eval.generate", fake)
    (record,) = continuations(EvalConfig(), trained, [asked("q", 4)])
    assert record["text"] == " b"  # with its space


@pytest.mark.parametrize(
    "change",
    "temperature=2 steps=2 remasking=random cfg_scale=3 seed=1 threshold=0.01 block_length=3 "
    "block_length=6,prefix_cache=True".split(),
)
def test_every_option_changes_the_text(trained, change):
    requests = [asked("Answer:", 12, do_sample=True)] * 2 + [asked("Answer:", 12, repeat=1, do_sample=True)]
    *base, change = (f"--{flag}" for flag in ["temperature=1.5", *change.split(",")])
    plain, other = (
        continuations(parse(EvalConfig, flags)[0], trained, requests) for flags in (base, [*base, change])
    )
    assert plain[0] == plain[1] != plain[2] and plain != other  # the second asking of the same draws anew
    requests = [asked("Answer:", 12, do_sample=True, temperature=3.0)]  # the task's own settings win
    assert continuations(EvalConfig(), trained, requests) == continuations(
        EvalConfig(temperature=0.7), trained, requests
    )


def test_sinks_are_computed_once_for_many_passes(monkeypatch):
    model, calls = make_model(sink_attention="split", block_size=32), []
    real, pairs = model.sink_keys_values, [([1, 2], [3, 4, 5]), ([6], [7, 8, 9, 1])]
    wanted = score(make_model(block_size=32), pairs)
    monkeypatch.setattr(model, "sink_keys_values", lambda: calls.append(1) or real())
    passes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["sinks"]), with_kwargs=True
    )
    np.testing.assert_allclose(score(model, pairs, batch_tokens=8), wanted, rtol=1e-5)
    assert calls == [1] and len(passes) > 5 and all(sinks is passes[0] is not None for sinks in passes)


def test_padding_is_invisible(variant):
    """Rows of 1 to 16 tokens side by side, whatever stands behind them, also in gradients; the head at chosen places alone."""
    model: MDM = make_model(**variant)
    lengths = torch.tensor([16, 1, 7, 12, 3])
    x = torch.randint(0, 12, (5, 16), generator=torch.Generator().manual_seed(0))
    real = torch.arange(16) < lengths[:, None]
    logits = model(x, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[row, :n], model(x[row : row + 1, :n])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model(torch.where(real, x, 3), lengths=lengths)[real], logits[real], atol=0, rtol=0
    )
    only = real & (torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) < 0.5)
    places = only.flatten().nonzero()[:, 0]
    torch.testing.assert_close(model(x, only=places, lengths=lengths), logits[only])
