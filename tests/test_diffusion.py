"""Forward process, loss and sampler against what is worked out by hand."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model

from model import diffusion_loss, generate, mask_tokens, noise_levels, sample_tokens

PROMPT = torch.tensor([[11, 3, 11, 11, 5, 11, 11, 11, 2, 11], [1, 11, 7, 2, 8, 11, 9, 0, 11, 4]])
WAYS = [{}, {"remasking": "random"}, {"threshold": 0.5}]


def stub(V, trunk):
    """A model of V tokens without layers: trunk(xt) gives its logits (B, T, V)."""
    model = make_model(vocab_size=V)
    model.trunk, model.head = trunk, lambda x: x
    return model


def linear_stub(slope):
    """Token 0 has -log p = 1 + slope * (share of [MASK] in the row)."""

    def trunk(xt):
        p = torch.exp(-1 - slope * (xt == 2).float().mean(dim=1, keepdim=True)).expand(xt.shape)
        return torch.stack((p, 1 - p), dim=-1).log()

    return stub(2, trunk)


def inputs_of(module):
    """A list that gets the input of every later call."""
    inputs = []
    module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    return inputs


def zeros(B, T):
    """x0, maskable: a text of token 0, all of it maskable."""
    return torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)


def test_share_of_masked_tokens_is_p_mask():
    torch.manual_seed(0)
    p_mask = noise_levels(torch.tensor([[0.0], [0.1], [0.5], [0.9], [1.0]]))
    torch.testing.assert_close(p_mask[:, 0], torch.tensor([0.001, 0.1009, 0.5005, 0.9001, 1.0]))
    x0, maskable = torch.randint(0, 7, (5, 20000)), torch.rand(5, 20000) < 0.5
    xt, masked = mask_tokens(x0, p_mask, maskable, mask_id=7)
    share = masked.sum(dim=1, keepdim=True) / maskable.sum(dim=1, keepdim=True)
    assert ((share - p_mask).abs() <= 4 * (p_mask * (1 - p_mask) / 10000).sqrt()).all()
    assert not (masked & ~maskable).any() and torch.equal(xt, x0.masked_fill(masked, 7))


@pytest.mark.parametrize("stratified", [False, True])
def test_loss_is_the_integral_over_t(stratified):
    """Of 1 + 5 t: 3.5. Without the weight 1 / p_mask it is the mean over hidden tokens, 1 + 5 * 2/3."""
    torch.manual_seed(0)
    loss = diffusion_loss(linear_stub(5), *zeros(4000, 400), stratified=stratified)
    assert loss.item() == pytest.approx(3.5, abs=0.06)


def test_stratified_levels_are_evenly_spaced():
    """1 / B apart, which lowers the variance of the loss."""
    torch.manual_seed(0)
    model, losses = linear_stub(5), {False: [], True: []}
    inputs = inputs_of(model)
    diffusion_loss(model, *zeros(4, 100_000), stratified=True)
    levels = (inputs[0] == 2).float().mean(dim=1).sort().values
    assert levels.diff().tolist() == pytest.approx([0.25] * 3, abs=0.01)
    for stratified in [False, True] * 100:
        losses[stratified].append(diffusion_loss(model, *zeros(16, 800), stratified).item())
    assert np.std(losses[True]) < np.std(losses[False]) / 2


def test_loss_counts_maskable_tokens_only():
    """Fine-tuning: the prompt is never hidden, and the loss is per maskable token, hidden or not."""
    torch.manual_seed(0)
    model, (x0, maskable) = linear_stub(0), zeros(4000, 100)
    inputs = inputs_of(model)
    maskable[:, :60] = False
    assert diffusion_loss(model, x0, maskable).item() == pytest.approx(1.0, abs=0.03)
    assert (inputs[0][:, :60] == 0).all()


def test_share_of_batches_of_random_length():
    torch.manual_seed(0)
    model = linear_stub(0)
    inputs = inputs_of(model)
    for _ in range(600):
        diffusion_loss(model, *zeros(2, 64), random_length=0.25)
    short = [xt.size(1) for xt in inputs if xt.size(1) < 64]
    assert len(short) / 600 == pytest.approx(0.25 * 63 / 64, abs=0.08)
    assert 1 <= min(short) <= 4 and max(short) >= 60 and np.mean(short) == pytest.approx(32, abs=6)


def test_bound_is_exact_for_a_single_token():
    """The integral of -log p(x0 | [MASK]) is -log p(x0) itself."""
    model = make_model()
    loss = diffusion_loss(model, *zeros(100_000, 1)).item()
    assert loss == pytest.approx(-model(torch.tensor([[11]])).log_softmax(-1)[0, 0, 0].item(), rel=0.03)


def test_a_training_step_asks_the_device_for_nothing():
    """On "meta", a device without values, whatever reads a value back raises. So no step waits for a GPU."""
    model = make_model().to("meta")
    diffusion_loss(model, *zeros(4, 16), stratified=True, random_length=0.5).backward()
    assert all(p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("V, temperature", [(3, 0.5), (3, 1.0), (3, 2.0), (152_000, 1.0)])
def test_law_of_sample_tokens(V, temperature):
    """Evenly spread uniform numbers give the cumulative softmax(logits / temperature), to 1 / 2n."""
    n, logits = 256, 3 * torch.randn(V, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = [sample_tokens(logits.expand(32, V), temperature, part) for part in uniform.split(32)]
    tokens, probability = (torch.cat(parts) for parts in zip(*drawn))
    p = np.exp(logits.double().numpy() / temperature)
    difference = np.bincount(tokens, minlength=V).cumsum() / n - p.cumsum() / p.sum()
    assert np.abs(difference).max() < 0.501 / n
    torch.testing.assert_close(probability, logits.double().softmax(-1)[tokens])  # knows no temperature
    assert (sample_tokens(logits[None], 0.0, uniform[:1])[0] == logits.argmax()).all()
    impossible_at_both_ends = F.pad(logits, (1, 1), value=-math.inf).expand(2, -1)
    extremes = torch.tensor([0, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(impossible_at_both_ends, temperature, extremes)[0].tolist() == [1, V]


def test_guidance_of_generate_hides_the_prompt_only():
    model = make_model()
    inputs = inputs_of(model.wte)
    generate(model, PROMPT[:1], steps=5, cfg_scale=0.5)
    assert len(inputs) == 10
    for cond, un in zip(inputs[::2], inputs[1::2]):
        assert torch.equal(un, torch.where(PROMPT[:1] < 11, 11, cond))


def trace(model, x, **options):
    """x before and after every step, and the passes of each row."""
    states = [x]
    _, passes = generate(model, x, on_step=states.append, seeds=range(len(x)), **options)
    return states, passes.tolist()


@pytest.mark.parametrize("threshold", [None, 0.0, 0.15, 0.25, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_keeps_the_surest_of_each_row(steps, threshold):
    """By hand: the ceil(hidden / steps left) likeliest, and all above the threshold."""
    model = make_model()
    states, _ = trace(model, PROMPT, steps=steps, threshold=threshold)
    for step, (before, after) in enumerate(zip(states, states[1:])):
        p, tokens = model(before).softmax(-1).max(-1)
        for row in (0, 1):
            hidden = [i for i in range(10) if before[row, i] == 11]
            keep = sorted(hidden, key=lambda i: -p[row, i])[: math.ceil(len(hidden) / (steps - step))]
            keep += [i for i in hidden if threshold is not None and p[row, i] > threshold]
            wanted = before[row].clone()
            wanted[keep] = tokens[row, keep]
            assert torch.equal(after[row], wanted)


def test_passes_are_counted_per_row():
    """One a step until the row is complete, two with guidance, none for a row that is complete already."""
    x = torch.cat((PROMPT, torch.zeros(1, 10, dtype=torch.long)))
    assert trace(make_model(), x, steps=50)[1] == [7, 3, 0]
    assert trace(make_model(), x, steps=50, cfg_scale=0.5)[1] == [14, 6, 0]
    assert trace(make_model(), x, steps=50, threshold=0.0)[1] == [1, 1, 0]


def test_end_of_text():
    """Positions are written in the order 2, 4, 0, 1, 3, 5. A written 3 ends a row, a given one does not."""
    tokens, sureness = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([4, 3, 6, 2, 5, 1])
    logits = sureness[:, None] * F.one_hot(tokens, 7)
    x = torch.tensor([[7, 7, 7, 7, 7, 7], [3, 7, 7, 7, 7, 7], [0, 0, 3, 7, 0, 7]])
    states, passes = trace(stub(7, lambda xt: logits.expand(len(xt), 6, 7)), x, steps=6, eot_id=3)
    assert states[2].tolist() == [[7, 7, 3, 7, 5, 7], [3, 7, 3, 7, 5, 7], [0, 0, 3, 4, 0, 6]]
    assert states[-1].tolist() == [[1, 2, 3, 3, 5, 3], [3, 2, 3, 3, 5, 3], [0, 0, 3, 4, 0, 6]]
    assert passes == [4, 3, 2]


@pytest.mark.parametrize("options", [*WAYS, {"cfg_scale": 0.7}, {"eot_id": 3}])
def test_a_row_keeps_what_is_given_and_does_not_depend_on_its_batch(variant, options):
    model, seeds = make_model(**variant), range(7, 27)
    x = torch.where(torch.rand(20, 16) < torch.rand(20, 1), 11, torch.randint(11, (20, 16)))
    x[:, 0] = 1  # where nothing is visible all positions are equally sure, and rounding decides
    filled, passes = generate(model, x, 6, 0.7, seeds=seeds, **options)
    assert torch.equal(filled[x < 11], x[x < 11]) and filled.max() < 11
    for i in range(0, 20, 3):
        alone, passes_alone = generate(model, x[i : i + 1], 6, 0.7, seeds=seeds[i : i + 1], **options)
        assert torch.equal(alone[0], filled[i]) and passes_alone == passes[i]


def test_bad_options():
    bad = {"steps": 0, "temperature": -1.0, "cfg_scale": -0.1, "remasking": "greddy", "threshold": 1.5}
    for key, value in bad.items():
        with pytest.raises(ValueError, match=f"{key}.*{value}"):
            generate(make_model(), PROMPT, **{"steps": 4, key: value})
    with pytest.raises(ValueError, match="needs remasking='confidence'"):
        generate(make_model(), PROMPT, 4, remasking="random", threshold=0.9)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_memory_is_bounded(cfg_scale, monkeypatch):
    """The head sees up to 160 positions in pieces of 20, and the result is the same."""
    model, x = make_model(), torch.full((10, 16), 11)
    options = {"steps": 3, "temperature": 1.0, "cfg_scale": cfg_scale, "seeds": range(10)}
    whole, _ = generate(model, x, **options)
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 20 * 11)
    inputs = inputs_of(model.lm_head)
    pieces, _ = generate(model, x, **options)
    assert max(len(piece) for piece in inputs) == 20 and torch.equal(pieces, whole)


def law(p, steps, remasking="confidence", threshold=1.0):
    """Probability of each outcome: all tokens that may be drawn, all sets of positions that may be kept."""
    now = {(3, 3, 3, 3): 1.0}  # p[state][i][v] is the model's; 3 is [MASK]
    for steps_left in range(steps, 0, -1):
        after = Counter()
        for state, weight in now.items():
            hidden = [i for i in range(4) if state[i] == 3]
            h, n = len(hidden), math.ceil(len(hidden) / steps_left)
            for tokens, keep in product(product(range(3), repeat=h), product((0, 1), repeat=h)):
                sure = [p[state][i][v] for i, v in zip(hidden, tokens)]
                if remasking == "random":
                    chance = math.prod(1 / steps_left if k else 1 - 1 / steps_left for k in keep)
                else:
                    chance = keep == tuple(s in sorted(sure)[-n:] or s > threshold for s in sure)
                written = {i: v for i, v, k in zip(hidden, tokens, keep) if k}
                outcome = tuple(written.get(i, state[i]) for i in range(4))
                after[outcome] += weight * math.prod(sure) * chance
        now = after
    return now


@pytest.mark.parametrize("options", WAYS)
def test_law_of_generate(options):
    """3 tokens, 4 positions, 3 steps: 5,000 rows against exact enumeration, chi-square at 99.9 %."""
    model, n, states = make_model(vocab_size=3, block_size=4), 5000, list(product(range(4), repeat=4))
    p = dict(zip(states, model(torch.tensor(states)).double().softmax(-1).tolist()))
    rows, _ = generate(model, torch.full((n, 4), 3), 3, 1.0, seeds=range(n), **options)
    counts, probabilities = Counter(map(tuple, rows.tolist())), law(p, 3, **options)
    cells = [[0.0, 0]]  # expected and counted; those expected below 5 are merged
    for outcome in sorted(probabilities, key=probabilities.get):
        if cells[-1][0] >= 5:
            cells.append([0.0, 0])
        cells[-1][0] += n * probabilities[outcome]
        cells[-1][1] += counts[outcome]
    df = len(cells) - 1
    bound = df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3  # Wilson-Hilferty
    assert sum(count for _, count in cells) == n and df > 20
    assert sum((count - expected) ** 2 / expected for expected, count in cells) < bound
