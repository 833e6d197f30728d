"""Our model with the authors' weights against the outputs of their code. Skipped where the golden folder is absent.

python -m pytest tests/test_golden.py
"""

import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT

from eval import greedy_matches, hidden_tokens, score, sum_rows
from model import (
    MDM,
    PRESETS,
    MDMConfig,
    generate,
    guided_logits,
    sample_tokens,
    surest,
    tokens_for_flops,
    weighted_nll,
)
from train import get_lr

GOLDEN = os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden")
pytestmark = pytest.mark.skipif(not os.path.exists(GOLDEN), reason="no golden folder (set GOLDEN_DIR)")


@pytest.fixture(scope="module", params=["base", "gate", "sink"])
def golden(request):
    z = np.load(os.path.join(GOLDEN, f"{request.param}.npz"), allow_pickle=False)
    config = json.loads(str(z["config_json"]))
    weights = {name[2:]: torch.from_numpy(z[name]) for name in z.files if name.startswith("w/")}
    model = MDM.from_smdm(weights, n_head=config["n_head"], block_size=config["block_size"])
    return z, model


def ids(z, key):
    return torch.from_numpy(z[key]).long()


def test_variant_is_read_off_the_shapes(golden, request):
    config = golden[1].config
    wanted = {"base": (0, False), "gate": (0, True), "sink": (1, False)}[
        request.node.callspec.params["golden"]
    ]
    assert (config.n_sink, config.gated_attention) == wanted
    assert (config.n_layer, config.n_embd, config.mlp_hidden, config.vocab_size) == (3, 64, 256, 96)


def test_hidden_states_and_logits(golden):
    z, model = golden
    states = []
    hooks = [model.blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    hooks += [
        block.register_forward_hook(lambda module, args, output: states.append(output))
        for block in model.blocks
    ]
    logits = model(ids(z, "noisy_ids"))
    for hook in hooks:
        hook.remove()
    assert len(states) == 4
    for i, state in enumerate(states):
        np.testing.assert_allclose(
            state.detach().numpy(), z[f"hidden_{i}"], atol=1e-4, rtol=0, err_msg=f"hidden_{i}"
        )
    np.testing.assert_allclose(logits.detach().numpy(), z["logits"], atol=1e-4, rtol=0)


def test_loss_and_gradients(golden):
    z, model = golden
    x0, xt, masked = ids(z, "clean_ids"), ids(z, "noisy_ids"), torch.from_numpy(z["mask"])
    p_mask = torch.from_numpy(z["p_mask"][:, :1])
    model.zero_grad()
    loss = weighted_nll(model, x0, xt, masked, p_mask).sum() / x0.numel()
    loss.backward()
    np.testing.assert_allclose(loss.item(), z["loss"], rtol=1e-5)
    ours = {name: p.grad for name, p in model.named_parameters()}
    if model.sink is not None:  # in the authors' code the sink is the last row of the embedding table
        ours["wte.weight"] = torch.cat((ours["wte.weight"], model.sink.grad))
    for name, wanted in zip(z["param_names"].tolist(), z["grad_norm"]):
        name = (
            name.removeprefix("transformer.").replace("h.", "blocks.", 1)
            if ".h." in name
            else name.removeprefix("transformer.")
        )
        name = name.replace("attn.attn.", "attn.qkv.").replace("swiglu.", "")
        np.testing.assert_allclose(ours[name].norm().item(), wanted, rtol=1e-4, err_msg=name)
    total = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    np.testing.assert_allclose(total.item(), z["grad_norm_total"], rtol=1e-4)


def test_sft_loss(golden):
    z, model = golden
    x0, xt = ids(z, "clean_ids"), ids(z, "sft_noisy_ids")
    maskable = torch.arange(x0.size(1)) >= torch.from_numpy(z["sft_prompt_len"])[:, None]
    masked = xt == model.config.mask_id
    assert not (masked & ~maskable).any()
    loss = weighted_nll(model, x0, xt, masked, torch.from_numpy(z["p_mask"][:, :1])).sum() / maskable.sum()
    np.testing.assert_allclose(loss.item(), z["sft_loss"], rtol=1e-5)


@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.6])
def test_greedy_trace(golden, pair, cfg_scale):
    """One token a step, the surest first: our generate with as many steps as hidden tokens."""
    z, model = golden
    trace = ids(z, f"pair{pair}_greedy_trace_cfg{cfg_scale:g}")
    seen = [trace[0]]
    n_hidden = int((trace[0] == model.config.mask_id).sum())
    filled, n_forward = generate(
        model, trace[:1], steps=n_hidden, cfg_scale=cfg_scale, on_step=lambda x: seen.append(x[0])
    )
    assert torch.equal(torch.stack(seen), trace)
    assert torch.equal(filled[0], ids(z, f"pair{pair}_greedy_fill_cfg{cfg_scale:g}"))
    assert n_forward == n_hidden * (1 if cfg_scale == 0 else 2)


@pytest.mark.parametrize("cfg_scale", [0, 1])
def test_deterministic_sampler_decisions(golden, cfg_scale):
    """The authors' sampler reveals floor(n (1 - s/t)) tokens a step, ours ceil(n / steps left). Given their counts, our
    prediction and our choice of places reproduce their trace token for token."""
    z, model = golden
    trace, left = ids(z, f"sample_trace_cfg{cfg_scale}"), z["sample_masks_left"]
    mask_id = model.config.mask_id
    given = trace[:1] != mask_id
    for step in range(len(trace) - 1):
        x = trace[step : step + 1]
        with torch.no_grad():
            tokens, confidence = sample_tokens(
                guided_logits(model, x, given, float(cfg_scale))[0], temperature=0.0
            )
        confidence = torch.where(x[0] == mask_id, confidence, -1.0)
        reveal = surest(confidence, left[step] - left[step + 1])
        assert torch.equal(torch.where(reveal, tokens, x[0]), trace[step + 1])


def test_parameter_table():
    z = np.load(os.path.join(GOLDEN, "schedule.npz"), allow_pickle=False)
    assert len(PRESETS) == len(z["model_id"]) == 30
    for i, size in enumerate(z["model_id"]):
        config = MDMConfig.preset(f"{size}M")
        shape = (config.n_layer, config.n_head, config.n_embd, config.mlp_hidden)
        assert shape == tuple(int(z[key][i]) for key in ("n_layer", "n_head", "n_embd", "intermediate_size"))
        assert (config.block_size, config.vocab_size) == (2048, 32000)
        variants = {
            "base": {"n_sink": 0},
            "sink": {"n_sink": 1},
            "gate": {"n_sink": 0, "gated_attention": True},
        }
        for name, flags in variants.items():
            with torch.device("meta"):  # shapes without memory
                model = MDM(MDMConfig.preset(f"{size}M", **flags))
            assert model.num_params() == z[f"counted_{name}"][i], (size, name)
        assert config.table_params() == round(z["nonemb_params_M"][i] * 1e6)


def test_steps_from_flops():
    z = np.load(os.path.join(GOLDEN, "schedule.npz"), allow_pickle=False)
    columns = z["run_columns"].tolist()
    for row in z["runs"]:
        run = dict(zip(columns, row.tolist()))
        config = MDMConfig.preset(
            f"{run['model']:.0f}M", n_sink=1, gated_attention=True
        )  # the budget ignores the gate
        assert (
            int(tokens_for_flops(config, run["flops_e18"] * 1e18) / (run["batch_size"] * 2048))
            == run["max_step"]
        )


@pytest.mark.parametrize("run", ["m472_f300", "m6_f1", "m6_f0.006", "m19_f3", "sft"])
def test_learning_rate_schedule(run):
    """The authors' schedule counts micro-batches; ours is the same function of whatever is counted."""
    z = np.load(os.path.join(GOLDEN, "schedule.npz"), allow_pickle=False)
    peak, floor = z["lr_const"][:2]
    if run == "sft":
        lengths, its, rates = dict(zip(z["sft_columns"].tolist(), z["sft"])), z["sft_lr_iters"], z["sft_lr"]
    else:
        rows = {
            f"m{row[0]:g}_f{row[1]:g}": row for row in z["runs"][::-1]
        }  # of two rows of a name the first was recorded
        lengths, its, rates = (
            dict(zip(z["run_columns"].tolist(), rows[run])),
            z[f"lr_iters_{run}"],
            z[f"lr_{run}"],
        )
    ours = [get_lr(it, lengths["max_iters"], peak, floor, lengths["warmup_iters"]) for it in its]
    np.testing.assert_allclose(ours, rates, rtol=1e-9)
    assert len(set(ours)) > 5


@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.6])
def test_chain_rule_and_greedy_match(golden, pair, cfg_scale):
    """The summed NLL, its terms, and whether greedy decoding writes the target."""
    z, model = golden
    context, target = z[f"pair{pair}_prefix"].tolist(), z[f"pair{pair}_target"].tolist()
    key = f"cfg{cfg_scale:g}"
    (nll,) = score(model, [(context, target)], "chain_rule", cfg_scale=cfg_scale)
    np.testing.assert_allclose(nll, z[f"pair{pair}_nll_{key}"], atol=1e-4, rtol=0)
    hidden, weight = hidden_tokens(context, target, "chain_rule", 1, "exact", 0)
    rows = [(context, target, h, w > 0) for h, w in zip(hidden, weight)]
    terms = sum_rows(model, rows, [w[w > 0] for w in weight], range(len(rows)), len(rows), cfg_scale, 4096)
    np.testing.assert_allclose(terms, z[f"pair{pair}_toknll_{key}"], atol=1e-4, rtol=0)
    (matches,) = greedy_matches(model, [(context, target)], cfg_scale)
    assert matches == z[f"pair{pair}_is_greedy_{key}"]
    filled = z[f"pair{pair}_greedy_fill_{key}"].tolist()[len(context) :]
    assert greedy_matches(model, [(context, filled)], cfg_scale)[0]


@pytest.mark.parametrize("cfg_scale", [0.0, 0.6])
def test_monte_carlo_nll(golden, cfg_scale):
    """On the stored draw of the noise: the sum over hidden tokens of NLL / p, averaged over the draws."""
    z, model = golden
    context, target = z["pair0_prefix"], z["pair0_target"]
    n = len(context)
    hidden = (z["mc_noisy_ids"] == model.config.mask_id)[:, n:]
    assert (z["mc_noisy_ids"][:, n:][~hidden] == np.broadcast_to(target, hidden.shape)[~hidden]).all()
    weights = [w[h] / len(hidden) for w, h in zip(1 / z["mc_p_mask"][:, n:], hidden)]
    rows = [(context, target, h, h) for h in hidden]
    (nll,) = sum_rows(model, rows, weights, [0] * len(rows), 1, cfg_scale, 4096)
    np.testing.assert_allclose(nll, z[f"mc_nll_cfg{cfg_scale:g}"], atol=1e-4, rtol=0)
