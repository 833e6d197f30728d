"""eval.py's look inside: attention recomputed from q and k, sinks followed through trajectories, changed sinks, tables of runs.

python -m pytest tests/test_sinks.py
"""

import json
import math
import statistics
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model

import eval as eval_module
from eval import CHANGES, EvalConfig, Trained, attention_weights, follow_sink, look_at_attention, states, trajectories
from model import MDMConfig
from prepare_data import load_tokenizer
from train import TrainConfig, load_meta, save_checkpoint

# ---- attention, recomputed


def texts(n=3, T=16, seed=0):
    return torch.randint(0, 12, (n, T), generator=torch.Generator().manual_seed(seed))  # [MASK] is 11


@pytest.mark.parametrize("sink_attention", ["mask", "split"])
def test_recomputed_attention_is_sdpa_s(variant, sink_attention, monkeypatch):
    """With what SDPA was called, its output to 1e-5; and the masses, maps and norms from the same, by plain sums."""
    model, calls = make_model(**variant, sink_attention=sink_attention).requires_grad_(False), []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        calls.append((q, k, v, attn_mask, real(q, k, v, attn_mask=attn_mask)))
        return calls[-1][-1]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    mass, norms, maps, error = look_at_attention(model, texts(), layers=(0, 1))
    n_sink = model.config.n_sink
    assert len(calls) == len(mass) == len(norms) == 2 and error < 1e-5
    for layer, (q, k, v, may_attend, output) in enumerate(calls):
        weights = attention_weights(q, k, may_attend)
        torch.testing.assert_close(weights @ v, output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        torch.testing.assert_close(maps[layer][:, n_sink:], weights[:, :, -16:].sum(dim=1) / 2)  # of two heads, the text's rows
        torch.testing.assert_close(mass[layer], weights[:, :, -16:].sum(dim=(1, 2)) / (2 * 16))
        torch.testing.assert_close(norms[layer], (v**2).sum(dim=-1).sqrt().sum(dim=1) / 2)
    torch.testing.assert_close(mass.sum(dim=-1), torch.ones(2, 3))
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 16 + n_sink))
        assert torch.equal(weights[:, :n_sink], torch.eye(16 + n_sink)[:n_sink].expand(3, -1, -1))  # a sink sees only itself


def test_looking_changes_nothing_and_its_error_is_honest(monkeypatch):
    model, xt = make_model(gated_attention=True), texts()
    before = model(xt)
    look_at_attention(model, xt)
    assert torch.equal(model(xt), before) and not any(block.attn._forward_hooks for block in model.blocks)
    right = attention_weights
    monkeypatch.setattr(eval_module, "attention_weights", lambda q, k, may_attend: right(q, 1.01 * k, may_attend))
    assert look_at_attention(model, xt)[3] > 1e-4


# ---- a known sink


@pytest.mark.parametrize(
    "flags, at, positions",
    [
        ({"n_sink": 0}, [2, 2, 0, 3], [2, 2, 0, 3]),
        ({"n_sink": 1}, [0, 0, 3, 0], [-1, -1, 2, -1]),  # row 0 is the sink token
        ({"n_sink": 1, "sink_position": "end"}, [0, 0, 3, 0], [4, 4, 2, 4]),
        ({"n_sink": 2, "sink_position": "end"}, [0, 1, 4, 1], [4, 5, 2, 5]),
    ],
)
def test_a_known_sink_is_found(flags, at, positions, monkeypatch):
    """q, k, v by hand: at step s, row at[s] gets 9 times as much as any other from every query; its values have the norm 5 in
    one head and 1 in the other, those of another row r have 12 + 2r and 8."""
    config = MDMConfig(block_size=4, vocab_size=5, n_layer=1, n_head=2, n_embd=8, **flags)
    model, S = make_model(**asdict(config)), 4 + config.n_sink
    model.rope_cos.fill_(1), model.rope_sin.zero_()  # no rotation
    q, k, v = torch.zeros(3, len(at), 2, S, 4)
    q[..., 1] = math.sqrt(4)
    v[:, 0, :, 2], v[:, 1, :, 3] = 12 + 2 * torch.arange(S), -8
    for step, row in enumerate(at):
        k[step, :, row, 1] = math.log(9)
        v[step, 0, row], v[step, 1, row] = torch.tensor([3.0, 0, 4, 0]), torch.tensor([0, -1.0, 0, 0])
    monkeypatch.setattr(model.blocks[0].attn, "project", lambda x, n_sink: (q, k, v))
    hidden = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)

    mass, norms, _, error = look_at_attention(model, torch.where(hidden, 5, 1))
    found = follow_sink(mass[0].numpy(), norms[0].numpy(), hidden.numpy(), config)
    share, others = 9 / (9 + S - 1), 1 / (9 + S - 1)
    n, is_sink = config.n_sink, [row < config.n_sink for row in at]
    assert error < 1e-6
    assert found["position"] == positions
    assert found["mass"] == pytest.approx([share] * 4, abs=1e-6)
    assert found["moved_by"] == [abs(b - a) for a, b in zip(positions, positions[1:])]
    assert found["hidden"] == [not sink and bool(hidden[step, row - n]) for step, (row, sink) in enumerate(zip(at, is_sink))]
    rows = [[3 if r == row else 10 + r for r in range(S)] for row in at]  # norms at each step, mean of the heads
    assert found["norm"] == [3.0] * 4
    assert found["norm_of_others"] == [statistics.median(10 + r for r in range(S) if r != row) for row in at]
    assert found["text_norm"] == [statistics.median(norms[n:]) for norms in rows]
    assert found["sink_norm"] == pytest.approx([sum(norms[:n]) / n if n else 0 for norms in rows], abs=1e-6)
    assert found["text_mass"] == pytest.approx([others if sink else share for sink in is_sink], abs=1e-6)
    assert found["sink_mass"] == pytest.approx([(n - 1) * others + share if sink else n * others for sink in is_sink], abs=1e-6)


def test_summary():
    """Two prompts of one layer, by hand: means over steps, then over prompts."""
    one = {
        "mass": [0.5, 0.7, 0.9],
        "moved_by": [0, 1],
        "hidden": [True, False, False],
        "norm": [1, 1, 4],
        "norm_of_others": [2, 2, 4],
    }
    one |= {"text_mass": [0.1, 0.1, 0.4], "sink_mass": [0.5, 0.5, 0.8], "sink_norm": [1, 1, 1], "text_norm": [2, 4, 4]}
    two = {"mass": [0.3], "moved_by": [], "hidden": [True], "norm": [3], "norm_of_others": [2]}
    two |= {"text_mass": [0.2], "sink_mass": [0.0], "sink_norm": [1], "text_norm": [1]}
    (layer,) = eval_module.summarize_sinks([{"layers": [one]}, {"layers": [two]}])
    wanted = {"mass": (0.7, 0.3), "hidden": (1 / 3, 1), "moved_by": (0.5, 0), "moved": (0.5, 0), "text_mass": (0.2, 0.2)}
    wanted |= {"sink_mass": (0.6, 0), "norm_ratio": (2 / 3, 1.5), "sink_norm_ratio": (1 / 3, 1)}
    for key, (a, b) in wanted.items():
        assert layer[key] == pytest.approx((a + b) / 2), key
        assert layer[f"{key}_se"] == pytest.approx(abs(a - b) / 2), key  # sd of two is |a - b| / sqrt(2), over sqrt(2)


# ---- trajectories


@pytest.fixture
def out_dir(data_dir):
    """A folder with a checkpoint of random weights with a sink token; a vanilla one beside it."""
    meta = load_meta(data_dir / "arithmetic")
    for name, n_sink in (("sink", 1), ("vanilla", 0)):
        model = make_model(vocab_size=meta["vocab_size"], block_size=24, n_sink=n_sink)
        run = asdict(TrainConfig(data_dir=str(data_dir), block_size=24, micro_batch_size=8, batch_size=8, n_sink=n_sink))
        checkpoint = {"model": model.state_dict(), "model_config": vars(model.config), "run_config": run, "meta": meta, "step": 3}
        (data_dir.parent / name).mkdir()
        save_checkpoint(data_dir.parent / name / "ckpt.pt", checkpoint)
    return data_dir.parent / "sink"


def load(out_dir):
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    model = make_model(**checkpoint["model_config"])
    model.load_state_dict(checkpoint["model"])
    return Trained(model, load_tokenizer(checkpoint["meta"]["tokenizer"]), checkpoint, 0, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 5}, {"remasking": "random", "temperature": 1.0, "steps": 9}, {"threshold": 0.02}, {"prompt_length": 0}],
)
def test_the_steps_are_those_of_the_sampler(out_dir, options):
    """What is looked at is what the sampler's model saw, step for step; a prompt's result does not depend on the others."""
    trained, seen = load(out_dir), []
    cfg = EvalConfig(**{"limit": 4, "prompt_length": 6, "batch_tokens": 60} | options)
    handle = trained.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    (record,) = trajectories(cfg, trained, [2])
    handle.remove()
    xt, mask_id = states(record, trained.model.config.mask_id), trained.model.config.mask_id
    assert torch.equal(xt, torch.cat(seen)) and (xt == mask_id).sum(dim=1)[0] == 24 - cfg.prompt_length
    assert trajectories(cfg, trained, [0, 1, 2, 3])[2] == record
    mass, norms, _, _ = look_at_attention(trained.model, xt)
    for layer, found in enumerate(record["layers"]):
        assert found == follow_sink(mass[layer].numpy(), norms[layer].numpy(), (xt == mask_id).numpy(), trained.model.config)
    x0 = eval_module.validation(trained, None, 4)[0]("val", 2)[0][0]
    assert record["tokens"][: cfg.prompt_length] == x0[: cfg.prompt_length].tolist()


def call(monkeypatch, out_dir, *argv):
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--out_dir={out_dir}", "--device=cpu", *argv])
    eval_module.main()


def test_two_checkpoints_side_by_side(out_dir, monkeypatch, capsys):
    vanilla = out_dir.parent / "vanilla"
    call(monkeypatch, out_dir, "--task=sinks", f"--compare={vanilla}", "--limit=3", "--prompt_length=8", "--steps=4")
    found = json.loads((out_dir / "sinks.json").read_text())
    assert list(found) == [str(out_dir), str(vanilla)] and [run["n_sink"] for run in found.values()] == [1, 0]
    out = capsys.readouterr().out
    for folder, run in found.items():
        assert len(run["prompts"]) == 3 and len(run["layers"]) == 2
        _, table = out.split(f"\n{folder}: means", 1)
        assert "sink tokens get" in table.split("evenly")[0] or run["n_sink"] == 0
        for number, layer in enumerate(run["layers"]):
            row = f"{number:>5}  {layer['mass']:.3f} ± {layer['mass_se']:.3f} ".split()
            assert any(line.split()[: len(row)] == row for line in table.splitlines())
        assert all(np.array(record["tokens"]).shape == (24,) for record in run["prompts"])
    prompts = [[record["tokens"][:8] for record in run["prompts"]] for run in found.values()]
    assert prompts[0] == prompts[1]
    (result,) = json.loads((out_dir / "results.json").read_text()).values()
    assert result["layers"] == found[str(out_dir)]["layers"] and result["settings"]["steps"] == 4


def test_pictures(out_dir, monkeypatch):
    pytest.importorskip("matplotlib")
    vanilla, sizes = out_dir.parent / "vanilla", []
    for more in ([], [f"--compare={vanilla}"]):
        call(monkeypatch, out_dir, "--task=sinks", "--limit=2", "--prompt_length=8", "--plot=True", *more)
        sizes.append([(out_dir / f"sinks_{name}.png").stat().st_size for name in ("maps", "paths", "norms")])
    assert all(5_000 < alone < both for alone, both in zip(*sizes))  # a second model adds panels and lines


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--task=sinks", "--prompt_length=24"], "prompt_length 24 leaves nothing to write of 24 tokens"),
        (["--task=sinks", "--compare={vanilla}", "--prefix_cache=True", "--block_length=4"], "makes no use of prefix_cache"),
        (["--task=sinks", "--compare=nowhere"], "no checkpoint at nowhere"),
        (["--task=loss", "--compare={vanilla}"], "makes no use of compare"),
        (["--task=sink_changes", "--out_dir={vanilla}"], "has no sink tokens to change; train one with n_sink=1"),
        (["--task=runs", "--limit=3"], "--task=runs makes no use of limit"),
        (["--task=runs"], r"no run with a validation in .*/sink/\*/log.jsonl"),
    ],
)
def test_refusals(out_dir, argv, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        call(monkeypatch, out_dir, *(flag.format(vanilla=out_dir.parent / "vanilla") for flag in argv))


def test_other_texts_are_not_compared(out_dir, monkeypatch):
    vanilla = out_dir.parent / "vanilla"
    checkpoint = torch.load(vanilla / "ckpt.pt", weights_only=True)
    checkpoint["run_config"]["block_size"] = checkpoint["model_config"]["block_size"] = 23
    save_checkpoint(vanilla / "ckpt.pt", checkpoint)
    with pytest.raises(ValueError, match="another block_size or other data"):
        call(monkeypatch, out_dir, "--task=sinks", f"--compare={vanilla}")


# ---- changed sinks


def test_changed_sinks(out_dir):
    """Each change is what it says, and leaves the model itself alone."""
    trained = load(out_dir)
    model, xt = trained.model, texts(4, 24)
    before = model(xt)
    changed = {change: eval_module.with_changed_sinks(trained, change, 5).model for change in CHANGES}
    assert torch.equal(changed["none"](xt), before) and torch.equal(model(xt), before)
    config = model.config
    for change, flags in {
        "moved to the other end": {"sink_position": "end"},
        "values: zero": {"sink_zero_value": True},
        "removed": {"n_sink": 0},
    }.items():
        wanted = make_model(**asdict(config) | flags)
        wanted.load_state_dict({k: v for k, v in model.state_dict().items() if k != "sink" or flags.get("n_sink", 1)})
        torch.testing.assert_close(changed[change](xt), wanted(xt))
        assert (changed[change](xt) - before).abs().max() > 1e-3
    noisy = changed["embedding: noise of its norm"]
    torch.testing.assert_close(noisy.sink.norm(dim=1), model.sink.norm(dim=1))
    assert F.cosine_similarity(noisy.sink, model.sink).abs() < 0.9
    again = eval_module.with_changed_sinks(trained, "embedding: noise of its norm", 6).model
    assert (again.sink - noisy.sink).abs().max() > 0.1  # another seed, other noise
    with torch.no_grad():
        noisy.sink.copy_(model.sink)
    torch.testing.assert_close(noisy(xt), before)  # nothing else differs


def test_bounds_of_changed_sinks(out_dir, monkeypatch, capsys):
    """Without a change it is the bound of --task=loss; the differences are of the same sequences and masks."""
    call(monkeypatch, out_dir, "--task=loss,sink_changes", "--limit=9", "--mc_num=3")
    loss, found = json.loads((out_dir / "results.json").read_text()).values()
    table = {row["change"]: row for row in found["changes"]}
    assert table["none"]["nats_per_token"] == pytest.approx(loss["nats_per_token"], rel=1e-6) and table["none"]["more"] == 0
    records = [json.loads(line) for line in open(found["items"])]
    nats = np.array([np.mean(record["nll"]) / 24 for record in records]).reshape(5, 9)
    for change, own in zip(CHANGES, nats):
        assert table[change]["nats_per_token"] == pytest.approx(own.mean())
        assert table[change]["more"] == pytest.approx((own - nats[0]).mean())
        assert table[change]["more_se"] == pytest.approx((own - nats[0]).std(ddof=1) / 3)
        assert f"{change:<32}" in capsys.readouterr().out or change != "none"
    trained = load(out_dir)
    vanilla = make_model(**asdict(trained.model.config) | {"n_sink": 0})
    vanilla.load_state_dict({k: v for k, v in trained.model.state_dict().items() if k != "sink"})
    cfg = EvalConfig(limit=9, mc_num=3)
    alone = eval_module.bounds(cfg, replace(trained, model=vanilla), list(range(9)))
    np.testing.assert_allclose([record["nll"] for record in alone], [record["nll"] for record in records[-9:]], rtol=1e-5)


# ---- a table of runs


def write_log(folder, seed, bounds, commit="abc", **settings):
    """As train.py writes it."""
    folder.mkdir(parents=True)
    config = asdict(TrainConfig(seed=seed, out_dir=str(folder), **settings))
    lines = [{"step": 0, "config": config, "commit": commit, "data_sha256": {"train": "0"}}]
    lines += [{"step": 10 * i, "val_loss": bound, "val_se": 0.1} for i, bound in enumerate(bounds)]
    lines.insert(2, {"step": 5, "loss": 1.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "val_lo')


def test_table_of_runs(tmp_path, capsys, monkeypatch):
    """Three seeds of two kinds, one of a third; means, standard errors and paired differences by hand."""
    for seed, vanilla, sink in ((0, 5.0, 4.8), (1, 5.3, 5.0), (2, 5.6, 5.2)):
        write_log(tmp_path / f"vanilla-{seed}", seed, [9.0, vanilla], n_sink=0, device="cpu")
        write_log(tmp_path / f"one-{seed}", seed, [9.0, sink], n_sink=1, compile=True)
    write_log(tmp_path / "gate", 7, [9.0, 4.0], n_sink=0, gated_attention=True)
    write_log(tmp_path / "just-started", 3, [])
    call_args = ["eval.py", "--task=runs", f"--out_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", call_args)
    eval_module.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        "n_sink gated_attention seeds validation bound against the first".split(),
        "0 False 3 5.3000 ± 0.1732".split(),
        "0 True 1 4.0000 -".split(),
        "1 False 3 5.0000 ± 0.1155 -0.3000 ± 0.0577".split(),
    ]
    write_log(tmp_path / "again", 1, [9.0, 5.0], n_sink=0)
    with pytest.raises(ValueError, match="is a second run of seed 1 with the same settings and commit"):
        eval_module.main()
    write_log(tmp_path / "aa", 1, [9.0, 5.0], commit="abc-dirty", n_sink=0)  # other code is another kind
    (tmp_path / "again" / "log.jsonl").unlink()
    eval_module.main()
    assert "commit" in capsys.readouterr().out.splitlines()[0]
    (tmp_path / "aa" / "log.jsonl").write_text("{}\n[3\n")
    with pytest.raises(ValueError, match="aa/log.jsonl is no log of train.py"):
        eval_module.main()
