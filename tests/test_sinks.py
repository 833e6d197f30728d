"""eval.py's look inside: attention recomputed from q and k, sinks followed through trajectories, changed sinks, tables of runs.

python -m pytest tests/test_sinks.py
"""

import itertools
import json
import math
import os
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model

import eval as eval_module
from eval import (
    CHANGES,
    EvalConfig,
    Trained,
    attention_weights,
    follow_sink,
    look_at_attention,
    states,
    trajectories,
)
from model import MDMConfig
from prepare_data import load_tokenizer
from sft_gsm8k import SFTConfig
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
    mass, norms, error, _ = look_at_attention(model, texts())
    n_sink = model.config.n_sink
    assert len(calls) == len(mass) == len(norms) == 2 and error < 1e-5
    for layer, (q, k, v, may_attend, output) in enumerate(calls[:]):
        weights = attention_weights(q, k, may_attend)
        torch.testing.assert_close(weights @ v, output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        maps = look_at_attention(model, texts(), layer=layer)[3]
        torch.testing.assert_close(
            maps[:, n_sink:], weights[:, :, -16:].sum(dim=1) / 2
        )  # of two heads, the text's rows
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 16 + n_sink))
        assert torch.equal(
            maps[:, :n_sink], torch.eye(16 + n_sink)[:n_sink].expand(3, -1, -1)
        )  # a sink sees only itself
        torch.testing.assert_close(mass[layer], weights[:, :, -16:].sum(dim=(1, 2)) / (2 * 16))
        torch.testing.assert_close(norms[layer], (v**2).sum(dim=-1).sqrt().sum(dim=1) / 2)
    torch.testing.assert_close(mass.sum(dim=-1), torch.ones(2, 3))
    for whole, part in zip(
        (mass, norms), look_at_attention(model, texts(), batch_tokens=20)
    ):  # a text at a time
        torch.testing.assert_close(part, whole)


def test_looking_changes_nothing_and_its_error_is_honest(monkeypatch):
    model, xt = make_model(gated_attention=True), texts()
    before = model(xt)
    look_at_attention(model, xt)
    assert torch.equal(model(xt), before) and not any(block.attn._forward_hooks for block in model.blocks)
    assert torch.get_float32_matmul_precision() == "highest"
    right = attention_weights
    monkeypatch.setattr(
        eval_module, "attention_weights", lambda q, k, may_attend: right(q, 1.01 * k, may_attend)
    )
    assert look_at_attention(model, xt)[2] > 1e-4


# ---- a known sink


@pytest.mark.parametrize(
    "flags, at, positions",
    [
        ({"n_sink": 0}, [2, 2, 0, 3], [2, 2, 0, 3]),
        ({"n_sink": 1}, [0, 0, 3, 0], [-1, -1, 2, -1]),  # row 0 is the sink token
        ({"n_sink": 1, "sink_position": "end"}, [0, 0, 3, 0], [4, 4, 2, 4]),
        (
            {"n_sink": 2, "sink_position": "end"},
            [0, 1, 4, 1],
            [4, 4, 2, 4],
        ),  # from one sink token to the other is no move
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

    mass, norms, error, _ = look_at_attention(model, torch.where(hidden, 5, 1))
    found = follow_sink(mass[0].numpy(), norms[0].numpy(), hidden.numpy(), config)
    share, others = 9 / (9 + S - 1), 1 / (9 + S - 1)
    n, is_sink = config.n_sink, [row < config.n_sink for row in at]
    assert error < 1e-6
    assert found["position"] == positions
    assert found["mass"] == pytest.approx([share] * 4, abs=1e-6)
    assert found["moved_by"] == [abs(b - a) for a, b in zip(positions, positions[1:])]
    assert found["hidden"] == [
        not sink and bool(hidden[step, row - n]) for step, (row, sink) in enumerate(zip(at, is_sink))
    ]
    rows = [
        [3 if r == row else 10 + r for r in range(S)] for row in at
    ]  # norms at each step, mean of the heads
    assert found["norm"] == [3.0] * 4
    assert found["norm_of_others"] == [statistics.median(10 + r for r in range(S) if r != row) for row in at]
    assert found["text_norm"] == [statistics.median(norms[n:]) for norms in rows]
    assert found["text_mass"] == pytest.approx([others if sink else share for sink in is_sink], abs=1e-6)
    by_row = [[share if r == row else others for r in range(n, S)] for row in at]
    wanted = [
        sum(m for m, is_mask in zip(*pair) if is_mask) / (sum(pair[1]) / S)
        for pair in zip(by_row, hidden.tolist())
    ]
    assert found["masks_get"] == pytest.approx(wanted, abs=1e-5)
    if not n:
        assert not {"sink_mass", "sink_norm"} & found.keys()
        return
    assert found["sink_norm"] == pytest.approx([sum(norms[:n]) / n for norms in rows], abs=1e-6)
    assert found["sink_mass"] == pytest.approx(
        [(n - 1) * others + share if sink else n * others for sink in is_sink], abs=1e-6
    )


def test_summary():
    """Two prompts of one layer, by hand: means over steps, then over prompts."""
    one = {
        "mass": [0.5, 0.7, 0.9],
        "moved_by": [0, 1],
        "hidden": [True, False, False],
        "norm": [1, 1, 4],
        "norm_of_others": [2, 2, 4],
    }
    one |= {
        "masks_get": [2, 4, 3],
        "text_mass": [0.1, 0.1, 0.4],
        "sink_mass": [0.5, 0.5, 0.8],
        "sink_norm": [1, 1, 1],
        "text_norm": [2, 4, 4],
    }
    two = {"mass": [0.3], "moved_by": [], "hidden": [True], "norm": [3], "norm_of_others": [2]}
    two |= {"masks_get": [5], "text_mass": [0.2], "sink_mass": [0.0], "sink_norm": [1], "text_norm": [1]}
    (layer,) = eval_module.summarize_sinks([{"layers": [one]}, {"layers": [two]}])
    wanted = {
        "mass": (0.7, 0.3),
        "hidden": (1 / 3, 1),
        "moved_by": (0.5, 0),
        "moved": (0.5, 0),
        "text_mass": (0.2, 0.2),
    }
    wanted |= {
        "masks_get": (3, 5),
        "sink_mass": (0.6, 0),
        "norm_ratio": (2 / 3, 1.5),
        "sink_norm_ratio": (1 / 3, 1),
    }
    for key, (a, b) in wanted.items():
        assert layer[key] == pytest.approx((a + b) / 2), key
        assert layer[f"{key}_se"] == pytest.approx(abs(a - b) / 2), (
            key
        )  # sd of two is |a - b| / sqrt(2), over sqrt(2)


# ---- trajectories


def save(folder, data_dir, run_class=TrainConfig, **flags):
    """A checkpoint of random weights on the built-in problems."""
    meta = load_meta(data_dir / "arithmetic")
    model = make_model(vocab_size=meta["vocab_size"], **{"block_size": 24, **flags})
    settings = {"dataset": "arithmetic", "data_dir": str(data_dir), "micro_batch_size": 8, "batch_size": 8}
    run = asdict(run_class(**settings, block_size=model.config.block_size))
    checkpoint = {
        "model": model.state_dict(),
        "model_config": vars(model.config),
        "run_config": run,
        "meta": meta,
        "step": 3,
    }
    folder.mkdir()
    save_checkpoint(folder / "ckpt.pt", checkpoint)
    return folder


@pytest.fixture
def out_dir(data_dir):
    """A folder with a checkpoint of a model with a sink token; a vanilla one beside it."""
    save(data_dir.parent / "vanilla", data_dir, n_sink=0)
    return save(data_dir.parent / "sink", data_dir, n_sink=1)


def load(out_dir):
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    model = make_model(**checkpoint["model_config"])
    model.load_state_dict(checkpoint["model"])
    return Trained(model, load_tokenizer(checkpoint["meta"]["tokenizer"]), checkpoint, 0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_length": None},
        {},
        {"steps": 5},
        {"remasking": "random", "temperature": 1.0, "steps": 9},
        {"threshold": 0.02},
        {"prompt_length": 0},
    ],
)
def test_the_steps_are_those_of_the_sampler(out_dir, options):
    """What is looked at is what the sampler's model saw, step for step; a prompt's result does not depend on the others."""
    trained, seen = load(out_dir), []
    cfg = EvalConfig(**{"limit": 4, "prompt_length": 6, "batch_tokens": 60} | options)
    given = 6 if cfg.prompt_length is None else cfg.prompt_length  # a quarter of 24
    handle = trained.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    (record,) = trajectories(cfg, trained, [2])
    handle.remove()
    xt, mask_id = states(record, trained.model.config.mask_id), trained.model.config.mask_id
    assert torch.equal(xt, torch.cat(seen)) and (xt == mask_id).sum(dim=1)[0] == 24 - given
    assert trajectories(cfg, trained, [0, 1, 2, 3])[2] == record
    mass, norms, error, _ = look_at_attention(trained.model, xt)
    assert record["error"] == pytest.approx(error, abs=1e-5) and trajectories(cfg, trained, []) == []
    for layer, found in enumerate(record["layers"]):
        wanted = follow_sink(
            mass[layer].numpy(), norms[layer].numpy(), (xt == mask_id).numpy(), trained.model.config
        )
        assert found.keys() == wanted.keys() and all(
            found[key] == pytest.approx(wanted[key], abs=2e-6) for key in wanted
        )
    x0 = eval_module.validation(trained, None, 4)[0]("val", 2)[0][0]
    assert record["tokens"][:given] == x0[:given].tolist()


def call(monkeypatch, out_dir, *argv):
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--out_dir={out_dir}", "--device=cpu", *argv])
    eval_module.main()


def test_fine_tuned_and_many_sinks(data_dir, tmp_path):
    """The response alone is written; sinks at the end, split: the trajectory is looked at as it was made."""
    flags = {"n_sink": 2, "sink_position": "end", "sink_attention": "split", "block_size": 48}
    trained, cfg = load(save(tmp_path / "sft", data_dir, SFTConfig, **flags)), EvalConfig(limit=6, steps=3)
    records = trajectories(cfg, trained, list(range(6)))
    x0, maskable = eval_module.validation_rows(cfg, trained, list(range(6)))
    for record, tokens, own in zip(records, x0, maskable):
        assert ((np.array(record["step"]) >= 0) == own.numpy()).all() and own.sum() < 48
        assert torch.equal(torch.tensor(record["tokens"])[~own], tokens[~own])
        for found in record["layers"]:
            assert {48} | set(range(48)) >= set(found["position"]) and 0 < np.mean(found["sink_mass"]) < 1
    assert len({str(record["tokens"]) for record in records}) == 6
    other = trajectories(replace(cfg, seed=1, temperature=3.0), trained, [0])[0]
    assert other["tokens"] != trajectories(replace(cfg, seed=2, temperature=3.0), trained, [0])[0]["tokens"]
    for leak in (
        {"cfg_scale": 2.0},
        {"prefix_cache": True},
        {"answer_steps": 1},
    ):  # what another task of the same command makes use of
        cfg = replace(cfg, block_length=8)
        assert trajectories(replace(cfg, **leak), trained, [0, 1]) == trajectories(cfg, trained, [0, 1])


def table_of(out, title):
    """Rows of numbers under a line that begins with title."""
    lines = out[out.index(title) :].splitlines()[2:]
    return [
        [float(word) for word in line.split() if word != "±"]
        for line in itertools.takewhile(lambda x: x[:1] == " ", lines)
    ]


def test_two_checkpoints_side_by_side(out_dir, monkeypatch, capsys):
    vanilla = out_dir.parent / "vanilla"
    call(
        monkeypatch,
        out_dir,
        "--task=sinks",
        f"--compare={vanilla}",
        "--limit=3",
        "--prompt_length=8",
        "--steps=4",
    )
    found, out = json.loads((out_dir / "sinks.json").read_text()), capsys.readouterr().out
    assert list(found) == [str(out_dir), str(vanilla)] and [run["n_sink"] for run in found.values()] == [1, 0]
    columns = "mass moved moved_by hidden norm_ratio masks_get sink_mass sink_norm_ratio text_mass".split()
    for folder, run in found.items():
        assert len(run["prompts"]) == 3 and run["layers"] == eval_module.summarize_sinks(run["prompts"])
        own = columns if run["n_sink"] else columns[:6]
        wanted = [
            [i, *(layer[f"{key}{end}"] for key in own for end in ("", "_se"))]
            for i, layer in enumerate(run["layers"])
        ]
        np.testing.assert_allclose(table_of(out, f"{folder}\nlayer"), wanted, atol=6e-4)
        assert f"An even share of attention is {1 / (24 + run['n_sink']):.4f}." in out
        mass, trained = np.load(Path(folder) / "sinks.npz")["mass"], load(Path(folder))
        looked = look_at_attention(trained.model, states(run["prompts"][0], trained.model.config.mask_id))
        np.testing.assert_allclose(mass, looked[0], atol=1e-6)
        assert next(Path(folder).glob("sinks-*.jsonl")).read_text().count("\n") == 3
    assert [record["tokens"][:8] for record in found[str(out_dir)]["prompts"]] == [
        record["tokens"][:8] for record in found[str(vanilla)]["prompts"]
    ]
    (result,) = json.loads((out_dir / "results.json").read_text()).values()
    assert result["layers"] == found[str(out_dir)]["layers"] and result["settings"]["steps"] == 4
    for more in (
        ["--seed=3"],
        ["--temperature=1"],
        ["--prompt_length=9"],
        ["--remasking=random"],
    ):  # are other measurements
        before = len(list(out_dir.glob("sinks-*.jsonl")))
        call(
            monkeypatch,
            out_dir,
            "--task=sinks",
            "--limit=1",
            "--prompt_length=8",
            "--steps=2",
            f"--data={load_data(out_dir)}",
            *more,
        )
        assert len(list(out_dir.glob("sinks-*.jsonl"))) == before + 1


def load_data(out_dir):
    run = torch.load(out_dir / "ckpt.pt", weights_only=True)["run_config"]
    return os.path.join(run["data_dir"], "arithmetic")


def test_pictures(out_dir, monkeypatch):
    """What is drawn are the numbers of sinks.json and of the model."""
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib.axes import Axes

    drawn = {"imshow": [], "plot": [], "scatter": []}
    for name in drawn:
        real = getattr(Axes, name)
        spy = lambda self, *args, _name=name, _real=real, **how: (
            drawn[_name].append(args) or _real(self, *args, **how)
        )  # noqa: E731
        monkeypatch.setattr(Axes, name, spy)
    vanilla = out_dir.parent / "vanilla"
    checkpoint = torch.load(vanilla / "ckpt.pt", weights_only=True)
    checkpoint["model"]["blocks.1.attn.qkv.weight"] *= 4  # attention that is sharp in this layer
    save_checkpoint(vanilla / "ckpt.pt", checkpoint)
    call(
        monkeypatch,
        out_dir,
        "--task=sinks",
        f"--compare={vanilla}",
        "--limit=2",
        "--prompt_length=8",
        "--plot=True",
    )
    assert all((out_dir / f"sinks_{name}.png").stat().st_size > 10_000 for name in ("maps", "paths", "norms"))
    found = json.loads((out_dir / "sinks.json").read_text())
    models = {folder: load(Path(folder)).model for folder in found}

    maps = iter(drawn["imshow"])
    for folder, model in models.items():
        weights = look_at_attention(
            model, states(found[folder]["prompts"][0], model.config.mask_id), layer=1
        )[3]
        for step in (1, 14):  # of 16 steps, 0 to 15
            np.testing.assert_allclose(
                next(maps)[0], weights[step, model.config.n_sink :].clip(0.1 / 24), atol=1e-6
            )
    with pytest.raises(ValueError, match="layer is 2; the layers are 0 to 1"):
        call(monkeypatch, out_dir, "--task=sinks", "--plot=True", "--layer=2")
    maps = list(drawn["imshow"])
    call(
        monkeypatch,
        out_dir,
        "--task=sinks",
        f"--compare={vanilla}",
        "--limit=2",
        "--prompt_length=8",
        "--plot=True",
        "--layer=0",
    )
    assert not any(
        np.allclose(args[0], before[0]) for args, before in zip(drawn["imshow"][4:], maps, strict=True)
    )
    drawn["plot"], drawn["scatter"] = drawn["plot"][:4], drawn["scatter"][:7]
    lines = [run["prompts"][0]["layers"][i]["position"] for i in (0, 1) for run in found.values()]
    assert [args[0] for args in drawn["plot"]] == lines

    (sink, sink_norms), (plain, plain_norms) = (
        [
            array.numpy()
            for array in look_at_attention(
                models[folder], states(run["prompts"][0], models[folder].config.mask_id)
            )[:2]
        ]
        for folder, run in found.items()
    )
    steps = np.linspace(0, 15, 8).astype(int)
    is_mask = [np.load(Path(folder) / "sinks.npz")["hidden"][steps] for folder in found]
    assert [mask.sum(axis=1).tolist() for mask in is_mask] == [(16 - steps).tolist()] * 2
    wanted = [
        sink_norms[:, steps, 1:][:, ~is_mask[0]],
        sink_norms[:, steps, 1:][:, is_mask[0]],
        None,
        sink_norms[:, steps, :1],
    ]
    wanted += [plain_norms[:, steps][:, ~is_mask[1]], plain_norms[:, steps][:, is_mask[1]], None]
    for index, (mass, norms) in ((2, (sink[..., 1:], sink_norms[..., 1:])), (6, (plain, plain_norms))):
        wanted[index] = [[norms[i, step][mass[i, step].argmax()] for step in steps] for i in (0, 1)]
    for (x, y), values in zip(drawn["scatter"], wanted, strict=True):
        np.testing.assert_allclose(y, np.reshape(values, (2, -1)), atol=1e-5)
        assert (np.round(x) == [[0], [1]]).all()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--task=sinks", "--prompt_length=24"], "prompt_length 24 leaves nothing to write of 24 tokens"),
        (
            ["--task=sinks", "--compare={vanilla}", "--prefix_cache=True", "--block_length=4"],
            "makes no use of prefix_cache",
        ),
        (["--task=sinks", "--compare=nowhere"], "no checkpoint at nowhere"),
        (["--task=sinks", "--layer=1"], "layer is that of a picture; set plot=True"),
        (["--task=loss", "--compare={vanilla}"], "makes no use of compare"),
        (
            ["--task=sink_changes", "--out_dir={vanilla}"],
            "has no sink tokens to change; train one with n_sink=1",
        ),
        (["--task=runs", "--limit=3"], "--task=runs makes no use of limit"),
        (["--task=loss,runs"], "task runs measures no model; call it alone"),
        (["--task=sinks", "--compare={vanilla}/../sink"], "compare takes another folder than out_dir"),
        (["--task=runs"], r"no run with a validation in .*/sink/\*/log.jsonl"),
    ],
)
def test_refusals(out_dir, argv, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        call(monkeypatch, out_dir, *(flag.format(vanilla=out_dir.parent / "vanilla") for flag in argv))


def test_other_texts_are_not_compared(out_dir, monkeypatch):
    vanilla = out_dir.parent / "vanilla"
    for key, value in (("align_documents", False), ("block_size", 23)):
        checkpoint = torch.load(vanilla / "ckpt.pt", weights_only=True)
        checkpoint["run_config"][key] = value
        checkpoint["model_config"]["block_size"] = checkpoint["run_config"]["block_size"]
        save_checkpoint(vanilla / "ckpt.pt", checkpoint)
        with pytest.raises(
            ValueError, match="has other validation sequences than .*sink; compare needs the same texts"
        ):
            call(monkeypatch, out_dir, "--task=sinks", f"--compare={vanilla}")
    with pytest.raises(ValueError, match="and one process"):
        eval_module.sinks(
            EvalConfig(out_dir=str(out_dir), compare=str(vanilla)), replace(load(out_dir), world_size=2)
        )


# ---- changed sinks


@pytest.mark.parametrize("flags", [{}, {"n_sink": 2, "sink_position": "end", "sink_attention": "split"}])
def test_changed_sinks(data_dir, tmp_path, flags):
    """Each change is what it says, and leaves the model itself alone."""
    trained = load(save(tmp_path / "out", data_dir, **{"n_sink": 1, **flags}))
    model, xt = trained.model.requires_grad_(False), texts(4, 24)
    model.sink[-1] *= 3  # of two sinks, each has a norm of its own
    before, config = model(xt), asdict(model.config)
    changed = {change: eval_module.with_changed_sinks(trained, change, 5).model for change in CHANGES}
    assert torch.equal(changed["none"](xt), before)
    for change, flags in {
        "moved to the other end": {"sink_position": "end" if config["sink_position"] == "front" else "front"},
        "values: zero": {"sink_zero_value": True},
        "removed": {"n_sink": 0},
    }.items():
        wanted = make_model(**config | flags)
        wanted.load_state_dict(
            {k: v for k, v in model.state_dict().items() if k != "sink" or flags.get("n_sink", 1)}
        )
        for sinks in (changed[change].sink_keys_values(), None):
            torch.testing.assert_close(changed[change](xt, sinks=sinks), wanted(xt))
        assert (changed[change](xt) - before).abs().max() > 1e-3
    noisy = [model for change, model in changed.items() if change.startswith("embedding")]
    noisy.append(
        eval_module.with_changed_sinks(trained, "embedding: noise of its norm, 1", 6).model
    )  # another seed
    for one in noisy:
        torch.testing.assert_close(one.sink.norm(dim=1), model.sink.norm(dim=1))
        assert F.cosine_similarity(one.sink, model.sink).abs().max() < 0.9
        assert sum(torch.equal(one.sink, other.sink) for other in noisy) == 1
        with torch.no_grad():
            one.sink.copy_(model.sink)
        torch.testing.assert_close(one(xt), before)  # nothing else differs
    assert torch.equal(model(xt), before) and asdict(model.config) == config


def test_bounds_of_changed_sinks(out_dir, monkeypatch, capsys):
    """Without a change it is the bound of --task=loss; the differences are of the same sequences and masks."""
    call(
        monkeypatch,
        out_dir,
        "--task=loss,sink_changes",
        "--limit=9",
        "--mc_num=3",
        f"--data={load_data(out_dir)}",
    )
    loss, found = json.loads((out_dir / "results.json").read_text()).values()
    records, out = [json.loads(line) for line in open(found["items"])], capsys.readouterr().out
    assert [row["change"] for row in found["changes"]] == CHANGES and len(records) == 9 * len(CHANGES)
    for end in ("", "_se"):
        assert found["changes"][0][f"nats_per_token{end}"] == pytest.approx(
            loss[f"nats_per_token{end}"], rel=1e-6
        )
    assert (found["changes"][0]["more"], found["changes"][0]["more_se"]) == (0, 0)
    nats = np.array([np.mean(record["nll"]) / 24 for record in records]).reshape(-1, 9)
    order = np.argsort([record["t"][0] for record in records[:9]])
    for row, own in zip(found["changes"], nats):
        more = (own - nats[0])[order]
        neighbours = np.sqrt(
            np.mean((more - np.roll(more, 1)) ** 2) / 2 / 9
        )  # the spread that is left between neighbours in t
        assert row["nats_per_token"] == pytest.approx(own.mean()) and row["more"] == pytest.approx(
            more.mean(), abs=1e-6
        )
        assert row["more_se"] == pytest.approx(neighbours, abs=1e-6)
        numbers = f"{row['nats_per_token']:.4f} ± {row['nats_per_token_se']:.4f} {row['more']:.4f} ± {row['more_se']:.4f}"
        assert f"{row['change']} {numbers}" in " ".join(out.split())
    trained, cfg = load(out_dir), EvalConfig(limit=9, mc_num=3)
    vanilla = make_model(**asdict(trained.model.config) | {"n_sink": 0})
    vanilla.load_state_dict({k: v for k, v in trained.model.state_dict().items() if k != "sink"})
    alone = eval_module.bounds(cfg, replace(trained, model=vanilla), list(range(9)))
    np.testing.assert_allclose(
        [record["nll"] for record in alone], [record["nll"] for record in records[-9:]], rtol=1e-5
    )
    call(
        monkeypatch,
        out_dir,
        "--task=sink_changes",
        "--limit=9",
        "--mc_num=3",
        "--seed=1",
        f"--data={load_data(out_dir)}",
    )
    assert len(list(out_dir.glob("sink_changes-*.jsonl"))) == 2  # other noise is another measurement


# ---- a table of runs


def write_log(folder, seed, bounds, commit="c" * 40, resumed=False, **settings):
    """As train.py writes it."""
    folder.mkdir(parents=True)
    config = asdict(TrainConfig(seed=seed, out_dir=str(folder), **settings))
    start = {"step": 0, "config": config, "commit": commit, "data_sha256": {"train": "0"}}
    lines = [start] + [{"step": 10 * i, "val_loss": bound, "val_se": 0.1} for i, bound in enumerate(bounds)]
    lines.insert(2, {"step": 5, "loss": 1.0})
    if resumed:
        lines.insert(3, {**start, "step": 7, "config": {**config, "init_from": "resume"}})
    (folder / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "val_lo'
    )


def test_table_of_runs(tmp_path, capsys, monkeypatch):
    """Three seeds of two kinds, one of a third; means, standard errors and paired differences by hand."""
    for seed, vanilla, sink in ((0, 5.0, 4.8), (1, 5.3, 5.0), (2, 5.6, 5.2)):
        write_log(tmp_path / f"b-{seed}", seed, [9.0, vanilla], n_sink=0, device="cpu", resumed=seed == 1)
        write_log(tmp_path / f"c-{seed}", seed, [9.0, sink], n_sink=1, compile=True, sink_attention="split")
    write_log(tmp_path / "d", 7, [9.0, 4.0], n_sink=0, gated_attention=True)
    write_log(tmp_path / "just-started", 3, [])
    monkeypatch.setattr(sys, "argv", ["eval.py", "--task=runs", f"--out_dir={tmp_path}"])
    eval_module.main()
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == "n_sink gated_attention seeds validation bound more than the first".split()
    assert rows == [
        "0 False 3 5.3000 ± 0.1732".split(),
        "1 False 3 5.0000 ± 0.1155 -0.3000 ± 0.0577".split(),
        "0 True 1 4.0000".split(),
    ]
    write_log(tmp_path / "again", 1, [9.0, 5.0], n_sink=0)
    with pytest.raises(
        ValueError, match="b-1/log.jsonl is a second run of seed 1 with the same settings and commit"
    ):
        eval_module.main()
    (tmp_path / "again" / "log.jsonl").unlink()
    write_log(
        tmp_path / "a", 1, [9.0, 5.5], commit="c" * 40 + "-dirty", n_sink=0
    )  # other code is another kind
    write_log(tmp_path / "e", 1, [9.0, 5.0, 4.5], n_sink=0)  # and so is another length
    eval_module.main()
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[:4] == "n_sink gated_attention step commit".split()
    assert rows[0] == ["0", "False", "10", "c" * 40 + "-dirty", "1", "5.5000"]
    assert rows[1] == ["0", "False", "10", "c" * 40, *"3 5.3000 ± 0.1732 -0.2000".split()]
    assert rows[4] == ["0", "False", "20", "c" * 40, *"1 4.5000 -1.0000".split()]
    (tmp_path / "a" / "log.jsonl").write_text("{}\n[3\n")
    with pytest.raises(ValueError, match="a/log.jsonl is no log of train.py"):
        eval_module.main()
