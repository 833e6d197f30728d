"""Our model with the authors' weights against the outputs of their code (see golden/README.md)."""

import json
import types

import numpy as np
import pytest
import torch
from conftest import ROOT

from eval import EvalConfig, draws, greedy_match, nll_of
from extras import convert
from model import MDM, PRESETS, MDMConfig, generate, guided_logits, sample_tokens, weighted_nll
from train import TrainConfig, get_lr, train

SCHEDULE = np.load(ROOT / "tests" / "golden" / "schedule.npz")
VARIANTS = {"base": {"n_sink": 0}, "gate": {"n_sink": 0, "gated_attention": True}, "sink": {"n_sink": 1}}


def load(variant):
    """(arrays, state dict, heads) of a golden file."""
    z = np.load(ROOT / "tests" / "golden" / f"{variant}.npz")
    weights = {name[2:]: torch.from_numpy(z[name]) for name in z.files if name.startswith("w/")}
    return z, weights, json.loads(str(z["config_json"]))["n_head"]


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request):
    z, weights, n_head = load(request.param)
    model = convert.from_smdm(weights, n_head, block_size=32)
    config = {"block_size": 32, "vocab_size": 96, "n_layer": 3, "n_head": 4, "n_embd": 64}
    assert model.config == MDMConfig(**config, **VARIANTS[request.param])
    return z, model


def ids(z, key):
    return torch.from_numpy(z[key]).long()


def test_hidden_states_and_logits(golden):
    (z, model), states = golden, []
    hooks = [block.register_forward_hook(lambda _, args, x: states.append(x)) for block in model.blocks]
    logits = model(ids(z, "noisy_ids"))
    for hook in hooks:
        hook.remove()
    assert len(states) == 3
    for i, state in enumerate(states, start=1):
        np.testing.assert_allclose(state.detach(), z[f"hidden_{i}"], atol=1e-4, rtol=0, err_msg=f"hidden_{i}")
    np.testing.assert_allclose(logits.detach(), z["logits"], atol=1e-4, rtol=0)


def test_loss_and_gradients(golden):
    z, model = golden
    x0, xt, masked = ids(z, "clean_ids"), ids(z, "noisy_ids"), torch.from_numpy(z["mask"])
    model.zero_grad()
    loss = weighted_nll(model, x0, xt, masked, torch.from_numpy(z["p_mask"][:, :1])).sum() / x0.numel()
    loss.backward()
    np.testing.assert_allclose(loss.item(), z["loss"], rtol=1e-5)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    np.testing.assert_allclose(np.linalg.norm(list(norms.values())), z["grad_norm_total"], rtol=1e-4)
    if model.sink is not None:  # in the authors' code the sink is the last row of the embedding
        norms["wte.weight"] = np.hypot(norms["wte.weight"], norms.pop("sink"))
    wanted = {}
    for name, norm in zip(z["param_names"].tolist(), z["grad_norm"]):
        name = name.replace("transformer.h.", "blocks.").replace("transformer.", "")
        wanted[name.replace("attn.attn.", "attn.qkv.").replace("swiglu.", "")] = norm
    assert norms == pytest.approx(wanted, rel=1e-4)


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
    """One token a step, the surest first: generate with as many steps as hidden tokens."""
    z, model = golden
    trace, seen = ids(z, f"pair{pair}_greedy_trace_cfg{cfg_scale:g}"), []
    n_hidden = int((trace[0] == model.config.mask_id).sum())
    options = {"steps": n_hidden, "cfg_scale": cfg_scale, "on_step": lambda x: seen.append(x[0])}
    filled, passes = generate(model, trace[:1], **options)
    assert torch.equal(torch.stack(seen), trace[1:])
    assert torch.equal(filled[0], ids(z, f"pair{pair}_greedy_fill_cfg{cfg_scale:g}"))
    assert passes.tolist() == [n_hidden * (2 if cfg_scale else 1)]


@pytest.mark.parametrize("cfg_scale", [0, 1])
def test_deterministic_sampler_decisions(golden, cfg_scale):
    """With the authors' counts of tokens a step, our predictions and confidences make their trace."""
    z, model = golden
    trace, n_masks = ids(z, f"sample_trace_cfg{cfg_scale}"), z["sample_masks_left"]
    given = trace[:1] != model.config.mask_id
    assert len(trace) == 9
    for step, x in enumerate(trace[:-1]):
        hidden = x == model.config.mask_id
        with torch.no_grad():
            ((_, logits),) = guided_logits(model, x[None], hidden[None], given, float(cfg_scale))
        tokens, confidence = sample_tokens(logits, 0.0, None)
        surest = confidence.argsort(descending=True)[: n_masks[step] - n_masks[step + 1]]
        x = x.clone()
        x[hidden.nonzero()[surest, 0]] = tokens[surest]
        assert torch.equal(x, trace[step + 1])


@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.6])
def test_chain_rule_and_greedy_match(golden, pair, cfg_scale):
    """The terms of the sum, the sum, and whether greedy decoding writes the target."""
    z, model = golden
    key, cfg = f"cfg{cfg_scale:g}", EvalConfig(nll_type="chain_rule", cfg_scale=cfg_scale, batch_size=3)
    context, target = z[f"pair{pair}_prefix"].tolist(), z[f"pair{pair}_target"].tolist()
    hidden, weight = draws(len(target), cfg, None)
    terms = [nll_of(model, context, target, hidden[[j]], weight[[j]], cfg) for j in range(len(target))]
    np.testing.assert_allclose(terms, z[f"pair{pair}_toknll_{key}"], atol=1e-4, rtol=0)
    nll = nll_of(model, context, target, hidden, weight, cfg)
    np.testing.assert_allclose(nll, z[f"pair{pair}_nll_{key}"], atol=1e-4, rtol=0)
    assert greedy_match(model, context, target, cfg) == z[f"pair{pair}_is_greedy_{key}"]
    filled = z[f"pair{pair}_greedy_fill_{key}"].tolist()[len(context) :]
    assert greedy_match(model, context, filled, cfg)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.6])
def test_monte_carlo_nll(golden, cfg_scale):
    """On the stored draw of the noise: the sum over hidden tokens of NLL / p, averaged over the rows."""
    z, model = golden
    context, target = z["pair0_prefix"].tolist(), z["pair0_target"].tolist()
    hidden = z["mc_noisy_ids"][:, len(context) :] == model.config.mask_id
    weight = hidden / z["mc_p_mask"][:, len(context) :] / len(hidden)
    nll = nll_of(model, context, target, hidden, weight, EvalConfig(cfg_scale=cfg_scale, batch_size=5))
    np.testing.assert_allclose(nll, z[f"mc_nll_cfg{cfg_scale:g}"], atol=1e-4, rtol=0)


def test_table_of_sizes():
    assert len(PRESETS) == len(SCHEDULE["model_id"]) == 30
    for i, size in enumerate(SCHEDULE["model_id"]):
        config = MDMConfig.preset(f"{size}M")
        shape = {key: SCHEDULE[key][i] for key in ("n_layer", "n_head", "n_embd")}
        assert config == MDMConfig(2048, 32000, **shape, mlp_hidden=SCHEDULE["intermediate_size"][i])
        assert config.table_params() == round(SCHEDULE["nonemb_params_M"][i] * 1e6)
        name = list(VARIANTS)[i % 3]  # in turns: 90 models take long
        with torch.device("meta"):  # shapes without memory
            model = MDM(MDMConfig.preset(f"{size}M", **VARIANTS[name]))
        assert model.num_params() == SCHEDULE[f"counted_{name}"][i], (size, name)
        assert model.num_params(non_embedding=False) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("row", range(len(SCHEDULE["runs"])))
def test_steps_from_flops(row):
    """train names them when it refuses to continue behind them. The gate's own parameters do not count."""
    run = dict(zip(SCHEDULE["run_columns"].tolist(), SCHEDULE["runs"][row].tolist()))
    config = MDMConfig.preset(f"{run['model']:.0f}M", gated_attention=True)
    batch = {"batch_size": int(run["batch_size"]), "micro_batch_size": 1, "block_size": 2048}
    cfg = TrainConfig(train_flops=run["flops_e18"] * 1e18, **batch, device="cpu")
    resume = {"step": 10**9, "best_val_loss": 0, "losses": []}
    with pytest.raises(ValueError, match=f"max_steps is {run['max_step']:.0f};"):
        train(cfg, types.SimpleNamespace(config=config), None, resume=resume)


@pytest.mark.parametrize("run", ["m472_f300", "m6_f1", "m6_f0.006", "m19_f3", "sft"])
def test_learning_rate_schedule(run):
    """The authors' schedule counts micro-batches; ours is the same function of whatever is counted."""
    peak, floor = SCHEDULE["lr_const"][:2]
    if run == "sft":
        lengths = dict(zip(SCHEDULE["sft_columns"].tolist(), SCHEDULE["sft"]))
        micros, rates = SCHEDULE["sft_lr_iters"], SCHEDULE["sft_lr"]
    else:
        rows = {f"m{row[0]:g}_f{row[1]:g}": row for row in SCHEDULE["runs"][::-1]}  # the first of a name
        lengths = dict(zip(SCHEDULE["run_columns"].tolist(), rows[run]))
        micros, rates = SCHEDULE[f"lr_iters_{run}"], SCHEDULE[f"lr_{run}"]
    ours = [get_lr(micro, lengths["max_iters"], peak, floor, lengths["warmup_iters"]) for micro in micros]
    np.testing.assert_allclose(ours, rates, rtol=1e-9)
    assert len(set(ours)) > 5
