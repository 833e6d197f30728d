"""The training loop: what it computes does not depend on how the work is cut, stopped or spread.

python -m pytest tests/test_train.py
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model
from test_diffusion import Stub

import train as train_module
from configurator import describe, parse
from model import MDM, MDMConfig, load_checkpoint, tokens_for_flops
from train import (
    TrainConfig,
    evaluate,
    get_lr,
    load_meta,
    seed_for,
    settle,
    start_model,
    token_batches,
    train,
)

TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 8, "micro_batch_size": 4, "max_steps": 6,
    "eval_interval": 2, "eval_seqs": 8, "log_interval": 1, "warmup": 0.34, "device": "cpu",
}  # fmt: skip
TINY_FLAGS = [f"--{key}={value}" for key, value in TINY.items()]


def run(data_dir, out_dir, *flags, wrap=lambda get_batch: get_batch):
    """What train.py's main does, in this process, but for the end: the model also after Ctrl-C."""
    cfg, set_by = parse(TrainConfig, [*TINY_FLAGS, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags])
    return go(cfg, set_by, wrap)


def start_run(cfg, set_by, meta):
    cfg, checkpoint = settle(cfg, set_by)
    return cfg, start_model(cfg, checkpoint, meta), checkpoint if cfg.init_from == "resume" else None


def go(cfg, set_by, wrap=lambda get_batch: get_batch):
    cfg, checkpoint = settle(cfg, set_by)
    folder = f"{cfg.data_dir}/{cfg.dataset}"
    meta = load_meta(folder)
    model = start_model(cfg, checkpoint, meta)
    get_batch = wrap(token_batches(folder, meta, cfg))
    try:
        return train(cfg, model, get_batch, meta, checkpoint if cfg.init_from == "resume" else None)
    except KeyboardInterrupt:
        return model


def rows(out_dir, key):
    with open(os.path.join(out_dir, "log.jsonl")) as file:
        return [(row["step"], row[key]) for row in map(json.loads, file) if key in row]


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def interrupt_at(n):
    def wrap(get_batch):
        def batches(split, index):
            if split == "train" and index == n:
                os.kill(os.getpid(), signal.SIGINT)
            return get_batch(split, index)

        return batches

    return wrap


@pytest.mark.parametrize(
    "micro", [0, 5, 7]
)  # in the first step, the third, and the fourth, at whose end a validation is due
def test_interrupted_and_resumed_equals_uninterrupted(data_dir, tmp_path, micro, capsys):
    whole = run(data_dir, tmp_path / "whole")
    run(data_dir, tmp_path / "cut", wrap=interrupt_at(micro))
    stopped = load_checkpoint(tmp_path / "cut")["step"]
    assert stopped == micro // 2 + 1
    assert f"stopped at step {stopped} of 6" in capsys.readouterr().out
    resumed = go(
        *parse(TrainConfig, ["--init_from=resume", f"--out_dir={tmp_path / 'cut'}"])
    )  # the rest is in the checkpoint
    assert same(whole, resumed)
    a, b = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "cut")
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(tensor, b["optimizer"]["state"][i][key]) for key, tensor in state.items())
    for key in ("loss", "lr", "val_loss", "grad_norm"):
        assert rows(tmp_path / "whole", key) == rows(tmp_path / "cut", key)


def test_resume_after_a_crash_drops_what_was_logged_since(data_dir, tmp_path):
    whole = run(data_dir, tmp_path / "whole")

    def crash(get_batch):
        def batches(split, index):
            if split == "train" and index == 11:  # in the last step; the checkpoint is of step 4
                raise RuntimeError("power cut")
            return get_batch(split, index)

        return batches

    with pytest.raises(RuntimeError):
        run(data_dir, tmp_path / "cut", wrap=crash)
    assert rows(tmp_path / "cut", "loss")[-1][0] == 5
    assert same(whole, run(data_dir, tmp_path / "cut", "--init_from=resume"))
    assert rows(tmp_path / "whole", "loss") == rows(tmp_path / "cut", "loss")


def test_two_processes_do_the_work_of_one(data_dir, tmp_path):
    """1 process x 4 accumulation steps = 2 processes x 2, up to rounding: same texts, same masks, same weights after 6 steps."""
    flags = [*TINY_FLAGS, "--micro_batch_size=2", f"--data_dir={data_dir}"]
    one = run(data_dir, tmp_path / "one", "--micro_batch_size=2")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    done = subprocess.run(
        [*command, *flags, f"--out_dir={tmp_path / 'two'}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu; a step is 2 x 2 x 2 sequences" in done.stdout
    two = MDM.from_checkpoint(tmp_path / "two")
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=name)
    for key in ("loss", "val_loss", "val_se", "grad_norm"):
        (steps, a), (other, b) = zip(*rows(tmp_path / "one", key)), zip(*rows(tmp_path / "two", key))
        assert steps == other and a == pytest.approx(b, rel=1e-4), key
    done = subprocess.run(
        [*command, *flags, "--batch_size=6", f"--out_dir={tmp_path / 'three'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode != 0
        and "batch_size 6 is not a multiple of micro_batch_size 2 x 2 processes = 4" in done.stderr
    )


@pytest.mark.parametrize(
    "flag",
    "seed=1 n_layer=1 n_head=1 n_embd=32 mlp_hidden=8 block_size=8 n_sink=0 sink_position=end sink_zero_value=True "
    "gated_attention=True batch_size=4 micro_batch_size=2 max_steps=3 align_documents=False stratified_t=True random_length=1 "
    "learning_rate=1e-2 min_lr=1e-5 warmup=0 weight_decay=5 beta1=0.5 beta2=0.5 grad_clip=0.01 dtype=bfloat16".split(),
)
def test_every_option_changes_the_result(data_dir, tmp_path, flag):
    plain = run(data_dir, tmp_path / "plain")
    other = run(data_dir, tmp_path / "other", f"--{flag}")
    a, b = plain.state_dict(), other.state_dict()
    assert (
        any(k not in b or v.shape != b[k].shape or not torch.equal(v, b[k]) for k, v in a.items())
        or a.keys() != b.keys()
    )
    assert all(v.isfinite().all() for v in b.values())


def test_log_and_checkpoints(data_dir, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.7])
    monkeypatch.setattr(train_module, "evaluate", lambda *args: (next(losses), 0.1))
    model = run(data_dir, tmp_path, "--learning_rate=0.1")
    assert rows(tmp_path, "val_loss") == [(0, 3.0), (2, 2.0), (4, 2.5), (6, 2.7)]
    warmup_steps = round(0.34 * 6)
    assert rows(tmp_path, "lr") == [
        (k, get_lr(k, 6, 0.1, TrainConfig.min_lr, warmup_steps)) for k in range(1, 7)
    ]
    assert rows(tmp_path, "tokens") == [(k, k * 8 * 16) for k in range(1, 7)]
    for name, step in {"ckpt.pt": 6, "best.pt": 2}.items():
        checkpoint = load_checkpoint(tmp_path / name)
        assert (checkpoint["step"], checkpoint["best_val_loss"]) == (step, 2.0)
        assert (
            checkpoint["run_config"]["learning_rate"] == 0.1
            and checkpoint["meta"]["tokenizer"]["name"] == "bpe"
        )
    assert same(model, MDM.from_checkpoint(tmp_path)) and same(
        model, MDM.from_checkpoint(str(tmp_path / "ckpt.pt"))
    )
    assert not list(tmp_path.glob("*.tmp"))


def test_schedule():
    assert [get_lr(k, 10, 1.0, 0.1, 4) for k in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]
    assert get_lr(7, 10, 1.0, 0.1, 4) == pytest.approx(0.55)  # half-way
    assert get_lr(10, 10, 1.0, 0.1, 4) == pytest.approx(0.1) and get_lr(11, 10, 1.0, 0.1, 4) == 0.1


def test_weight_decay_is_on_every_tensor(data_dir, tmp_path):
    """With zero gradients AdamW only shrinks: by lr * wd a step, norms, embeddings and the sink included."""
    cfg, set_by = parse(
        TrainConfig,
        [*TINY_FLAGS, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_steps=1", "--warmup=0"],
    )
    meta = load_meta(data_dir / "arithmetic")
    cfg, model, _ = start_run(cfg, set_by, meta)
    before = {name: p.clone() for name, p in model.named_parameters()}
    get_batch = token_batches(str(data_dir / "arithmetic"), meta, cfg)

    def nothing_maskable(split, index):
        x0, maskable = get_batch(split, index)
        return x0, maskable if split == "val" else torch.zeros_like(maskable)

    train(cfg, model, nothing_maskable, meta)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - cfg.min_lr * cfg.weight_decay), msg=name)


def test_a_text_is_learned_by_heart(tmp_path):
    torch.manual_seed(0)
    x0 = torch.randint(0, 11, (1, 16)).expand(16, -1)
    config = {
        "batch_size": 16,
        "micro_batch_size": 16,
        "block_size": 16,
        "max_steps": 250,
        "eval_interval": 250,
        "eval_seqs": 64,
    }
    cfg = TrainConfig(**config, learning_rate=1e-2, out_dir=str(tmp_path), device="cpu")
    torch.manual_seed(0)
    model = MDM(MDMConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32))
    train(cfg, model, lambda split, index: (x0, torch.ones(16, 16, dtype=torch.bool)))
    (_, first), (_, last) = rows(tmp_path, "val_loss")
    assert first == pytest.approx(math.log(11), abs=0.5) and last < 0.1


# ---- validation


def batches_of_zeros(B, T):
    return lambda split, index: (torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool))


def test_validation_of_the_stub():
    """nll = 1 + 5 * masked share has the bound 3.5. Its error is that of the coins alone, since t is spaced evenly: the value must
    lie within a few standard errors, and these must be far below the spread over t."""
    cfg = dataclasses.replace(TrainConfig(), eval_seqs=500, micro_batch_size=20)
    mean, error = evaluate(cfg, Stub(lambda share: 1 + 5 * share), batches_of_zeros(20, 200))
    assert abs(mean - 3.5) < 4 * error
    naive = 5 / math.sqrt(12 * 500)
    assert 0 < error < naive


def test_validation_error_is_the_spread_of_the_estimate(monkeypatch):
    """Over many other draws of the masks, the estimate scatters as much as its standard error says."""
    cfg = dataclasses.replace(TrainConfig(), eval_seqs=64, micro_batch_size=64)
    real, found = np.random.default_rng, []
    for draw in range(150):
        monkeypatch.setattr(
            np.random, "default_rng", lambda key, draw=draw: real([*np.atleast_1d(key), draw])
        )
        found.append(evaluate(cfg, Stub(lambda share: 1 + 5 * share), batches_of_zeros(64, 30)))
    means, errors = np.array(found).T
    assert means.std() == pytest.approx(errors.mean(), rel=0.25)


def test_validation_levels_are_not_tied_to_the_place_in_the_file():
    """A corpus whose second half is as hard at any t: levels in file order would give it 3/4 of t, not 1/2."""

    class Half(Stub):
        def forward(self, xt, only, targets):
            return super().forward(xt, only, targets) * (xt[only // T, 0] == 1)

    N, T = 500, 200
    x0 = torch.zeros(N, T, dtype=torch.long)
    x0[N // 2 :, 0] = 1
    maskable = torch.ones(N, T, dtype=torch.bool)
    maskable[:, 0] = False
    cfg = dataclasses.replace(TrainConfig(), eval_seqs=N, micro_batch_size=N)
    mean, error = evaluate(cfg, Half(lambda share: 5 * share + 1e-6), lambda split, index: (x0, maskable))
    assert abs(mean - 1.25) < 4 * error + 0.02  # half the texts, and 5 * 1/2 for them


def test_validation_does_not_depend_on_the_batch_size(data_dir):
    model, meta = make_model(vocab_size=500), load_meta(data_dir / "arithmetic")
    found = []
    for B in (1, 3, 16):
        cfg = dataclasses.replace(TrainConfig(), eval_seqs=13, micro_batch_size=B, block_size=16, seed=B)
        torch.manual_seed(B)
        get_batch = token_batches(str(data_dir / "arithmetic"), meta, cfg)
        found.append(evaluate(cfg, model, get_batch))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] == pytest.approx(found[2], rel=1e-5)


# ---- data


def test_batches_follow_from_seed_and_index(data_dir):
    meta = load_meta(data_dir / "arithmetic")
    tokens = np.fromfile(data_dir / "arithmetic" / "train.bin", np.uint16)

    def batch(seed, index):
        cfg = TrainConfig(seed=seed, block_size=16, micro_batch_size=4, align_documents=False)
        return token_batches(str(data_dir / "arithmetic"), meta, cfg)("train", index)[0]

    assert torch.equal(batch(0, 5), batch(0, 5))
    others = [batch(0, 4), batch(0, 6), batch(1, 4), batch(1, 5)]  # seed + index must not be what counts
    assert not any(torch.equal(batch(0, 5), other) for other in others)
    text = tokens.tobytes()
    assert all(row.numpy().astype(np.uint16).tobytes() in text for row in batch(0, 5))


def test_aligned_sequences_start_at_documents(data_dir):
    meta = load_meta(data_dir / "arithmetic")
    for align, share in {None: 1.0, True: 1.0, False: 0.0}.items():
        cfg = TrainConfig(block_size=16, micro_batch_size=64, eval_seqs=64, align_documents=align)
        get_batch = token_batches(str(data_dir / "arithmetic"), meta, cfg)
        for split in ("train", "val"):
            first = (get_batch(split, 0)[0][:, 0] == meta["eot_id"]).float().mean().item()
            assert first == share or (align is False and first < 0.2)
    with pytest.raises(ValueError, match="no document to start a sequence of 64 tokens"):
        token_batches(str(data_dir / "arithmetic"), {**meta, "eot_id": meta["vocab_size"] + 1}, TrainConfig())


def test_seeds_are_mixed():
    seeds = [seed_for(seed, index) for seed in range(30) for index in range(30)]
    assert len(set(seeds)) == 900 and all(0 <= s < 2**32 for s in seeds)
    assert max(seeds) > 2**31


def test_validation_sequences_cover_the_file(data_dir):
    meta = load_meta(data_dir / "arithmetic")
    cfg = TrainConfig(block_size=16, micro_batch_size=4, eval_seqs=8, align_documents=False)
    get_batch = token_batches(str(data_dir / "arithmetic"), meta, cfg)
    tokens = torch.from_numpy(np.fromfile(data_dir / "arithmetic" / "val.bin", np.uint16).astype(np.int64))
    found = torch.cat([get_batch("val", 0)[0], get_batch("val", 1)[0]])
    starts = [i * (len(tokens) - 15) // 8 for i in range(8)]
    assert torch.equal(found, torch.stack([tokens[s : s + 16] for s in starts]))


# ---- start, resume, bad input


def test_start_from_the_weights_of_another_run(data_dir, tmp_path):
    first = run(data_dir, tmp_path / "a", "--gated_attention=True")
    flags = [
        f"--init_from={tmp_path / 'a' / 'ckpt.pt'}",
        f"--data_dir={data_dir}",
        f"--out_dir={tmp_path / 'b'}",
    ]
    cfg, set_by = parse(TrainConfig, [*flags, "--block_size=32"])
    cfg, model, checkpoint = start_run(cfg, set_by, load_meta(data_dir / "arithmetic"))
    assert checkpoint is None and same(first, model)
    assert (cfg.gated_attention, cfg.n_embd, cfg.block_size, model.config.block_size) == (True, 16, 32, 32)
    for flag, message in {
        "--n_layer=3": r"settings contradict .*ckpt.pt: n_layer=3 \(command line\), not 2; leave them out",
        "--preset=6M": r"n_layer=6 \(preset 6M\), not 2",
        "--n_sink=0": r"n_sink=0 \(command line\), not 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            start_run(*parse(TrainConfig, [*flags, flag]), load_meta(data_dir / "arithmetic"))


def test_resume_refuses_what_contradicts(data_dir, tmp_path):
    run(data_dir, tmp_path / "a")
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    with pytest.raises(
        ValueError, match="ckpt.pt exists; go on with --init_from=resume, or choose another --out_dir"
    ):
        run(data_dir, tmp_path / "a")
    resume = ["--init_from=resume", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'a'}"]
    meta = load_meta(data_dir / "arithmetic")
    with pytest.raises(
        ValueError, match=r"seed=1 \(command line\), not 0; n_layer=3 \(command line\), not 2; leave them out"
    ):
        start_run(*parse(TrainConfig, [*resume, "--n_layer=3", "--seed=1"]), meta)
    parsed, set_by = parse(TrainConfig, [*resume, "--max_steps=9", "--n_layer=2"])
    cfg, _, checkpoint = start_run(parsed, set_by, meta)
    text = describe(cfg, set_by)
    assert (
        "n_embd = 16  (default 96, set by" in text
        and "max_steps = 9  (default 4000, set by command line)" in text
    )
    assert (cfg.max_steps, cfg.n_embd, cfg.learning_rate, checkpoint["step"]) == (
        9,
        16,
        TrainConfig.learning_rate,
        6,
    )
    with pytest.raises(ValueError, match="has other tokens now"):
        start_run(*parse(TrainConfig, resume), {**meta, "sha256": {}})
    with pytest.raises(
        ValueError, match=r"another vocabulary \(bpe of .*\) than data set arithmetic \(bytes of 257"
    ):
        start_run(*parse(TrainConfig, resume), {**meta, "tokenizer": {"name": "bytes"}, "vocab_size": 257})
    start_run(*parse(TrainConfig, resume), {**meta, "tokenizer": {**meta["tokenizer"], "pattern": "other"}})
    with pytest.raises(ValueError, match="4 steps, but the run to resume has made 6; raise max_steps"):
        run(data_dir, tmp_path / "a", "--init_from=resume", "--max_steps=4")
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before


def test_length_by_flops_or_by_steps(data_dir, tmp_path):
    meta = load_meta(data_dir / "arithmetic")
    flags = [*TINY_FLAGS, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--train_flops=1e8"]
    with pytest.raises(
        ValueError, match=r"max_steps \(command line\) and train_flops \(command line\) all set the length"
    ):
        settle(*parse(TrainConfig, flags))
    with pytest.raises(ValueError, match="max_steps and train_flops are all None"):
        parse(TrainConfig, ["--max_steps=None"])
    go(*parse(TrainConfig, [flag for flag in flags if "max_steps" not in flag]))
    resume = ["--init_from=resume", f"--out_dir={tmp_path}"]
    assert settle(*parse(TrainConfig, resume))[0].train_flops == 1e8
    cfg, _ = settle(*parse(TrainConfig, [*resume, "--max_steps=99"]))
    assert (cfg.max_steps, cfg.train_flops) == (99, None)
    n = MDMConfig(16, meta["vocab_size"], 2, 2, 16).table_params()
    assert load_checkpoint(tmp_path)["step"] == int(1e8 / (6 * n * 8 * 16)) > 3


def test_the_paper_configs_hold_its_recipe_and_differ_in_the_variant_only():
    arms = {
        name: parse(TrainConfig, [str(ROOT / f"config/pretrain_472m_{name}.py")])[0]
        for name in ("vanilla", "sink", "gate")
    }
    for name, cfg in arms.items():
        assert (cfg.n_sink, cfg.gated_attention) == {
            "vanilla": (0, False),
            "sink": (1, False),
            "gate": (0, True),
        }[name]
        assert (cfg.batch_size, cfg.block_size, cfg.beta1, cfg.beta2, cfg.weight_decay) == (
            256,
            2048,
            0.9,
            0.95,
            0.1,
        )
        assert (cfg.grad_clip, cfg.learning_rate, cfg.min_lr, cfg.warmup, cfg.stratified_t) == (
            1.0,
            2e-4,
            2e-5,
            0.01,
            False,
        )
        shape = MDMConfig.preset(cfg.preset, n_sink=cfg.n_sink, gated_attention=cfg.gated_attention)
        assert int(tokens_for_flops(shape, cfg.train_flops) / (256 * 2048)) == 202089  # as the authors count
        assert cfg.sink_attention == "split" or cfg.n_sink == 0  # no mask in any arm
        same = dataclasses.replace(cfg, n_sink=1, sink_attention="split", gated_attention=False, out_dir="x")
        assert same == dataclasses.replace(arms["sink"], out_dir="x")


def test_defaults_are_the_authors_loss():
    assert (TrainConfig.stratified_t, TrainConfig.random_length, TrainConfig.n_sink) == (False, 0.0, 1)


def test_preset(data_dir, tmp_path):
    meta = load_meta(data_dir / "arithmetic")
    cfg, model, _ = start_run(
        *parse(TrainConfig, ["--preset=6M", "--block_size=32", f"--out_dir={tmp_path}"]), meta
    )
    assert (cfg.n_layer, cfg.n_embd, cfg.mlp_hidden) == (6, 256, 1024)  # what the checkpoint will say
    assert (
        model.num_params() == 6_294_784
        and model.config.block_size == 32
        and model.config.vocab_size == meta["vocab_size"]
    )
    train(dataclasses.replace(cfg, max_steps=0, eval_seqs=2), model, batches_of_zeros(16, 32), meta)
    flags = ["--preset=6M", f"--init_from={tmp_path}/ckpt.pt", f"--out_dir={tmp_path / 'b'}"]
    assert same(
        model, start_run(*parse(TrainConfig, flags), meta)[1]
    )  # the config that made a checkpoint can start from it
    with pytest.raises(ValueError, match=r"settings contradict preset 6M: n_layer=3 \(command line\), not 6"):
        start_run(*parse(TrainConfig, ["--preset=6M", "--n_layer=3", f"--out_dir={tmp_path}"]), meta)


def test_bad_data(data_dir, tmp_path):
    folder = data_dir / "arithmetic"
    meta = load_meta(folder)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    with pytest.raises(ValueError, match="is not prepared; run: python prepare_data.py shakespeare"):
        load_meta(data_dir / "shakespeare")
    with pytest.raises(
        ValueError, match="train.bin has .* tokens, fewer than block_size 100000; lower block_size"
    ):
        token_batches(str(folder), meta, TrainConfig(block_size=100_000))
    tokens[:-1].tofile(folder / "train.bin")
    with pytest.raises(
        ValueError,
        match="train.bin has .* bytes, meta.json says .*; prepare .* again: python prepare_data.py arithmetic --data_dir=",
    ):
        load_meta(folder)
    (tokens + 500).astype(np.uint16).tofile(folder / "train.bin")
    with pytest.raises(
        ValueError,
        match=r"train.bin holds other data than meta.json says \(sha256\); prepare the data set again",
    ):
        load_meta(folder)
    with pytest.raises(ValueError, match=r"train.bin holds token \d+, meta.json has a vocabulary of"):
        token_batches(str(folder), meta, TrainConfig(block_size=16, align_documents=False))("train", 0)
    for damage in ("{", '{"dtype": "uint16"}'):
        (folder / "meta.json").write_text(damage)
        with pytest.raises(ValueError, match="meta.json is damaged .*; prepare the data set again"):
            load_meta(folder)


def test_bad_checkpoints(data_dir, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at .*ckpt.pt; train one"):
        load_checkpoint(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="no checkpoint of train.py"):
        load_checkpoint(tmp_path)
    run(data_dir, tmp_path / "a", "--max_steps=0")
    whole = (tmp_path / "a" / "ckpt.pt").read_bytes()
    (tmp_path / "a" / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut off"):
        load_checkpoint(tmp_path / "a")


def test_bad_settings(data_dir, tmp_path):
    for flag, message in {
        "batch_size=6": r"batch_size 6 is not a multiple of micro_batch_size 4 x 1 processes = 4",
        "n_embd=17": "n_embd 17 is not divisible by n_head 2",
        "dtype=float8": "dtype is 'float8'",
        "micro_batch_size=0": "micro_batch_size is 0; it must be above 0",
        "beta2=1": "beta2 is 1.0",
        "warmup=2": "warmup is 2.0; it must lie between 0 and 1",
        "seed=-1": "seed is -1; it must not be negative",
        "learning_rate=nan": "learning_rate is nan",
        "eval_seqs=1": "eval_seqs is 1",
        "device=foo": "device 'foo' cannot be used here",
        "device=cuda": "device 'cuda' cannot be used here",
        "preset=7B": "no preset '7B'",
    }.items():
        if flag == "device=cuda" and torch.cuda.is_available():
            continue
        flags = [f"--{flag}"]
        with pytest.raises(ValueError, match=message):
            if "preset" in flag:
                start_run(
                    *parse(TrainConfig, [*flags, f"--out_dir={tmp_path}"]), load_meta(data_dir / "arithmetic")
                )
            else:
                run(data_dir, tmp_path / "x", *flags)


def test_a_loss_that_is_no_number_ends_the_run(data_dir, tmp_path):
    wild = ["--learning_rate=1e30", "--grad_clip=0", "--warmup=0"]
    what = "step 2: the gradient's norm is nan, the losses of micro-batches 2 to 3 are finite; the step was not made"
    with pytest.raises(ValueError, match=f"{what}.* lower learning_rate"):
        run(data_dir, tmp_path / "a", *wild, "--eval_interval=100")
    assert load_checkpoint(tmp_path / "a")["step"] == 0  # the last good one
    with pytest.raises(ValueError, match="the validation loss is (nan|inf) at step 1; lower learning_rate"):
        run(
            data_dir,
            tmp_path / "b",
            "--learning_rate=1e38",
            "--grad_clip=0",
            "--warmup=0",
            "--eval_interval=1",
        )
    assert load_checkpoint(tmp_path / "b")["step"] == 0


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    train_module.save_checkpoint(str(tmp_path / "ckpt.pt"), {"step": 1})

    def full_disk(obj, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(ValueError, match="cannot save .*No space left on device.*; make room"):
        train_module.save_checkpoint(str(tmp_path / "ckpt.pt"), {"step": 2})
    assert (
        torch.load(tmp_path / "ckpt.pt", weights_only=True) == {"step": 1}
        and len(list(tmp_path.iterdir())) == 1
    )


def test_float16_scales_the_loss(data_dir, tmp_path):
    model = run(data_dir, tmp_path, "--dtype=float16")
    assert load_checkpoint(tmp_path)["scaler"]["scale"] > 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_batches_are_made_one_ahead():
    """In order, each once, the next one while this one is worked on; an error comes where its batch is due."""
    made, worked_on = [], []

    def get_batch(split, index):
        if index == 9:
            raise ValueError("batch 9 is bad")
        made.append(index)
        return torch.tensor(index), split

    batches = train_module.one_ahead(get_batch, [4, 6, 8])
    for index, x0, split in batches:
        worked_on.append((index, x0.item(), split))
        for _ in range(1000):  # up to ten seconds
            if len(made) > len(worked_on) or len(made) == 3:
                break
            time.sleep(0.01)
        assert len(made) == min(3, len(worked_on) + 1)
    assert worked_on == [(4, 4, "train"), (6, 6, "train"), (8, 8, "train")] and made == [4, 6, 8]
    batches = train_module.one_ahead(get_batch, [7, 9, 11])
    assert next(batches)[0] == 7
    with pytest.raises(ValueError, match="batch 9 is bad"):
        next(batches)
    assert list(train_module.one_ahead(get_batch, [])) == []


def test_nobody_waits_for_a_batch_that_is_not_wanted():
    """As when a second Ctrl-C comes while the next batch takes long; and what fails is not followed by one more batch."""
    made = []

    def get_batch(split, index):
        made.append(index)
        time.sleep(60 if index == 1 else 0)
        if index == 3:
            raise ValueError("bad")
        return index, split

    batches = train_module.one_ahead(get_batch, [0, 1])
    start = time.monotonic()
    next(batches)
    batches.close()
    assert time.monotonic() - start < 5
    made.clear()
    batches = train_module.one_ahead(get_batch, [2, 3, 4])
    next(batches)
    with pytest.raises(ValueError, match="bad"):
        next(batches)
    assert made == [2, 3]


def test_either_way_of_attention_goes_on_with_the_other_s_checkpoint(data_dir, tmp_path):
    """And learns the same, up to rounding."""
    mask = run(data_dir, tmp_path / "mask", "--sink_attention=mask")
    split = run(data_dir, tmp_path / "split", "--sink_attention=split")
    assert (mask.config.sink_attention, split.config.sink_attention) == ("mask", "split")
    for (name, p), q in zip(mask.named_parameters(), split.parameters()):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=0, msg=name)
    run(data_dir, tmp_path / "half", "--sink_attention=mask", "--max_steps=3")
    both = run(data_dir, tmp_path / "half", "--init_from=resume", "--sink_attention=split", "--max_steps=6")
    assert both.config.sink_attention == "split"
    new = run(
        data_dir,
        tmp_path / "new",
        f"--init_from={tmp_path / 'mask' / 'ckpt.pt'}",
        "--sink_attention=split",
        "--max_steps=0",
    )
    assert new.config.sink_attention == "split" and torch.equal(new.sink, mask.sink)
    assert load_checkpoint(tmp_path / "new")["model_config"]["sink_attention"] == "split"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["mask", "split"])
def test_compiled_equals_plain(data_dir, tmp_path, way, monkeypatch):
    """Also where some batches are short and the last rows of a validation are few; and no shape is compiled but the usual one."""
    flags = [f"--sink_attention={way}", "--random_length=0.3", "--eval_seqs=6", "--max_steps=12"]
    plain = run(data_dir, tmp_path / "plain", *flags)
    shapes, real = [], torch.compile

    def compile_and_watch(function, dynamic):
        compiled = real(function, dynamic=dynamic)
        return (
            compiled
            if dynamic
            else lambda xt, **where: shapes.append(tuple(xt.shape)) or compiled(xt, **where)
        )

    monkeypatch.setattr(torch, "compile", compile_and_watch)
    torch._dynamo.reset()
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 20 * 458)  # so that the loss is computed in parts
    compiled = run(data_dir, tmp_path / "compiled", *flags, "--compile=True")
    assert (
        set(shapes) == {(4, 16)} and 10 < len(shapes) < 24 + 7 * 2
    )  # 24 micro-batches, 7 validations of 4 and 2 sequences
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=0, msg=name)
