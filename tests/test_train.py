"""The training loop: what it computes does not depend on how the work is cut, stopped or spread."""

import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model

import train as train_module
from configurator import parse
from model import MDM, MDMConfig, load_checkpoint, mask_tokens, seed_for, weighted_nll
from train import TrainConfig, bound_and_error, load_meta, spread_levels, token_batches, validate, write_file

TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 8, "micro_batch_size": 4,
    "max_steps": 6, "eval_interval": 2, "eval_seqs": 8, "log_interval": 1, "warmup": 0.34, "device": "cpu",
}  # fmt: skip
TINY_FLAGS = [f"--{key}={value}" for key, value in TINY.items()]


def start(*flags):
    return train_module.start_run(*parse(TrainConfig, [str(flag) for flag in flags]))


def go(*flags):
    """What train.py's main does, in this process."""
    cfg, meta, model, resume = start(*flags)
    get_batch = token_batches(f"{cfg.data_dir}/{cfg.dataset}", meta, cfg)
    return train_module.train(cfg, model, get_batch, meta, resume)


def run(data_dir, out_dir, *flags):
    return go(*TINY_FLAGS, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags)


def on_seed(monkeypatch, action):
    """action(*key) when train.py needs a seed: (seed, index) of a micro-batch, or three to validate."""
    monkeypatch.setattr(train_module, "seed_for", lambda *key: action(*key) or seed_for(*key))


def send_at(monkeypatch, index, signum):
    """Sends a signal to this process while the micro-batch of this index is under way."""
    on_seed(monkeypatch, lambda *key: os.kill(os.getpid(), signum) if key == (0, index) else None)


def rows(out_dir, key):
    """[(step, value)] of log.jsonl; of a step that is logged twice, the last."""
    log = [json.loads(line) for line in open(f"{out_dir}/log.jsonl")]
    return list({row["step"]: row[key] for row in log if key in row}.items())


def assert_same_runs(a, b):
    """Bit for bit: weights, optimizer, losses, validations, and the step of best.pt."""
    states = []
    for name in (a, b):
        keys = ("model", "optimizer", "step", "best_val_loss", "losses")
        states.append({key: load_checkpoint(name)[key] for key in keys})
        states[-1]["best"] = load_checkpoint(f"{name}/best.pt")["step"]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for key in ("loss", "val_loss", "val_se", "lr", "grad_norm", "tokens"):
        assert rows(a, key) == rows(b, key) and len(rows(a, key)) > 1, key


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the loop


@pytest.mark.parametrize("stop, signum", [(2, signal.SIGTERM), (3, signal.SIGINT), (6, signal.SIGTERM)])
def test_a_resumed_run_is_the_uninterrupted_one(data_dir, tmp_path, monkeypatch, capsys, stop, signum):
    """Stopped where a validation is due (it is made up for), between two log lines, in the last step."""
    run(data_dir, tmp_path / "whole", "--log_interval=2")
    send_at(monkeypatch, 2 * stop - 1 - stop % 2, signum)  # the second micro-batch of a step, or the first
    with pytest.raises(SystemExit) as end:
        run(data_dir, tmp_path / "cut", "--log_interval=2")
    assert end.value.code == 128 + signum and load_checkpoint(tmp_path / "cut")["step"] == stop
    how = f"stopped at step {stop}; continue with --init_from=resume --out_dir={tmp_path / 'cut'}"
    assert capsys.readouterr().out.splitlines()[-1] == how
    assert stop not in dict(rows(tmp_path / "cut", "val_loss"))  # there may be no time for it
    go("--init_from=resume", f"--out_dir={tmp_path / 'cut'}")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_four_micro_batches_are_one_of_four_times_the_size(tmp_path, monkeypatch):
    x0, maskable, results = torch.arange(1024).view(64, 16) * 7 % 11, torch.ones(64, 16).bool(), []

    def loss_without_noise(model, x0, maskable, *options):
        p_mask = torch.full((len(x0), 1), 0.5)
        xt, masked = mask_tokens(x0, p_mask, maskable, 11, noise=x0 / 10)
        return weighted_nll(model, x0, xt, masked, p_mask).sum() / maskable.sum()

    monkeypatch.setattr(train_module, "diffusion_loss", loss_without_noise)
    for B in (8, 2):
        cfg = TrainConfig(**TINY | {"micro_batch_size": B, "out_dir": str(tmp_path / str(B))})
        model = train_module.train(cfg, make_model(), lambda split, i, B=B: (x0[i * B :][:B], maskable[:B]))
        results.append((model.state_dict(), rows(cfg.out_dir, "loss"), rows(cfg.out_dir, "grad_norm")))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_two_ranks_take_turns_with_the_micro_batches(tmp_path, monkeypatch):
    """Each rank alone, as if the other one were there: the batches, and the seeds of their masks."""
    x0, seen, cpu = torch.zeros(2, 16).long(), [], torch.device("cpu")
    monkeypatch.setattr(train_module, "DistributedDataParallel", lambda model, **options: model)
    monkeypatch.setattr(train_module.dist, "all_reduce", lambda tensor: None)
    on_seed(monkeypatch, lambda *key: seen.append(key))
    cfg = TrainConfig(**TINY | {"micro_batch_size": 2, "max_steps": 2, "out_dir": str(tmp_path)})
    for rank in (0, 1):
        seen.clear()
        monkeypatch.setattr(train_module, "setup_distributed", lambda device, rank=rank: (rank, 2, cpu))
        train_module.train(cfg, make_model(), lambda *key: seen.append(key) or (x0, x0 == 0))
        assert [index for split, index, *_ in seen if split == "train"] == list(range(rank, 10, 2))
        assert [index for seed, index, *_ in seen if seed == 0] == list(range(rank, 8, 2))


def test_variants_see_the_same_texts_and_masks_and_seeds_do_not(data_dir, tmp_path, monkeypatch):
    def record(x0, p_mask, maskable, mask_id, noise):
        xt, masked = mask_tokens(x0, p_mask, maskable, mask_id, noise)
        if noise is None:  # in training; the validation has noise of its own
            seen.append(torch.stack((x0, masked.long())))
        return xt, masked

    monkeypatch.setattr("model.mask_tokens", record)
    runs = []
    for flag in ("--n_sink=0", "--n_sink=4", "--gated_attention=True", "--seed=1"):
        seen = []
        run(data_dir, tmp_path / flag, flag)
        runs.append(torch.stack(seen))  # (12 micro-batches, 2, 4, 16)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    both = torch.cat((runs[0], runs[3]))  # seed 1 is no shifted copy of seed 0
    assert len(both[:, 0].unique(dim=0)) == len(both[:, 1].unique(dim=0)) == 24


def test_every_option_changes_the_result(data_dir, tmp_path):
    plain = run(data_dir, tmp_path / "plain", "--eval_interval=9")
    flags = "seed=1 n_layer=1 n_head=1 n_embd=32 mlp_hidden=8 block_size=8 n_sink=0 sink_position=end "
    flags += "sink_zero_value=True gated_attention=True batch_size=4 micro_batch_size=2 max_steps=3 "
    flags += "stratified_t=True random_length=1 learning_rate=1e-2 min_lr=1e-5 warmup=0 weight_decay=5 "
    flags += "beta1=0.5 beta2=0.5 grad_clip=0.01 dtype=bfloat16"
    for flag in flags.split():
        other = run(data_dir, tmp_path / flag, "--eval_interval=9", f"--{flag}")
        assert not same(plain, other) and all(p.isfinite().all() for p in other.parameters()), flag


def test_weight_decay_is_on_every_tensor(tmp_path):
    """With zero gradients AdamW only shrinks, by lr * wd a step: norms, embeddings and the sink included."""
    cfg = TrainConfig(**TINY | {"max_steps": 1, "warmup": 0, "out_dir": str(tmp_path)})
    x0, nothing = torch.zeros(4, 16).long(), torch.zeros(4, 16).bool()
    after = train_module.train(cfg, make_model(), lambda split, index: (x0, nothing | (split == "val")))
    shrunk = {name: w * (1 - cfg.min_lr * cfg.weight_decay) for name, w in make_model().state_dict().items()}
    torch.testing.assert_close(after.state_dict(), shrunk)


def test_a_text_is_learned_by_heart(tmp_path):
    x0, keys = torch.arange(16).expand(16, -1) * 7 % 11, ("max_steps", "eval_interval", "log_interval")
    settings = TINY | dict.fromkeys(keys, 150) | {"batch_size": 16, "micro_batch_size": 16}
    cfg = TrainConfig(**settings, learning_rate=1e-2, out_dir=str(tmp_path))
    model = MDM(MDMConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32))
    train_module.train(cfg, model, lambda split, index: (x0, x0 >= 0))
    (_, first), (_, last) = rows(tmp_path, "val_loss")
    assert first == pytest.approx(math.log(11), abs=0.5) and last < 0.1


@pytest.mark.parametrize("bad", [math.nan, "gradient"])
def test_what_is_not_finite_stops_before_the_step(data_dir, tmp_path, monkeypatch, bad):
    """Micro-batch 9 belongs to step 5. The model then still has the weights of step 4, as ckpt.pt has."""
    real, models = train_module.diffusion_loss, []

    def diffusion_loss(model, *args):
        models.append(model)
        change = (0 * model.sink).abs().sum().sqrt() if bad == "gradient" else bad  # 0, of infinite slope
        return real(model, *args) + (change if len(models) == 10 else 0)

    monkeypatch.setattr(train_module, "diffusion_loss", diffusion_loss)
    with pytest.raises(ValueError, match="step 5 was not made.*(nan|inf).*lower learning_rate"):
        run(data_dir, tmp_path, "--log_interval=100")
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint["step"] == 4 and same(models[0], MDM.from_checkpoint(checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["mask", "split"])
def test_compiled_equals_plain(data_dir, tmp_path, way, monkeypatch):
    """The trunk is compiled for its fixed shape; texts that are cut to a random length run as they are."""
    flags = [f"--sink_attention={way}", "--n_layer=1", "--max_steps=12", "--random_length=0.6"]
    plain, names, shapes, real = run(data_dir, tmp_path / "plain", *flags), [], [], torch.compile

    def compile(function, **options):
        name, compiled = function.__name__, real(function, **options)
        names.append(name)
        return lambda *args: shapes.append((name, args[0].shape)) or compiled(*args)

    monkeypatch.setattr(torch, "compile", compile)
    compiled = run(data_dir, tmp_path / "compiled", *flags, "--compile=True")
    trunks = [shape for name, shape in shapes if name == "trunk"]
    assert names == ["trunk", "nll"] and set(trunks) == {(4, 16)}
    assert 16 < len(trunks) < 24 + 14  # of 24 micro-batches and 7 validations of 2, some are cut
    torch.testing.assert_close(plain.state_dict(), compiled.state_dict(), atol=1e-3, rtol=0)


PEAKS = {"A100-SXM4-80GB": 312, "H100 80GB HBM3": 989, "H100 PCIe": 756, "B200": 2250, "H200 NVL": 835}
PEAKS |= dict.fromkeys(("RTX A1000", "GB200", "GeForce RTX 4090 Laptop GPU", "H100 MIG 1g.10gb"), math.inf)


@pytest.mark.parametrize("name", PEAKS)
def test_flops_utilization_knows_a_gpu_by_whole_words(monkeypatch, name):
    """And tells PCIe cards and laptops, which are slower, from the others."""
    weight = SimpleNamespace(is_cuda=True, device="cuda", numel=lambda: 40)
    model = SimpleNamespace(config=MDMConfig(n_layer=1, n_embd=8), lm_head=SimpleNamespace(weight=weight))
    model.num_params = lambda: 80
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {name}")
    by_hand = (6 * 80 + 3 * 40 + 12 * 8 * 10) * 1e9 / (PEAKS[name] * 1e12)
    assert train_module.flops_utilization(model, 10, 1e9) == pytest.approx(by_hand)


# ---- validation


@torch.no_grad()
@pytest.mark.parametrize("B, mc_num", [(1, 1), (3, 2), (16, 1)])
def test_validation_by_hand(monkeypatch, B, mc_num):
    """Levels from the golden ratio, its own noise for each row, the mean over tokens; also on two ranks."""
    model, x0, expected = make_model(), torch.arange(13 * 16).view(13, 16) * 7 % 11, torch.zeros(13).double()
    maskable = torch.arange(16) >= torch.arange(13)[:, None] * 5 % 14
    golden = [row * (math.sqrt(5) - 1) / 2 % 1 for row in range(13)]
    levels = [(sorted(golden).index(value) + 0.5) / 13 for value in golden]
    for row in range(13):
        for draw in range(mc_num):
            p_mask = 0.001 + 0.999 * (levels[row] + draw) / mc_num
            noise = torch.rand(16, generator=torch.Generator().manual_seed(seed_for(1234, row, draw)))
            hidden = (noise < p_mask) & maskable[row]
            log_p = model(torch.where(hidden, 11, x0[row])[None])[0].log_softmax(dim=-1)
            for i in hidden.nonzero()[:, 0]:
                expected[row] -= log_p[i, x0[row, i]] / p_mask / mc_num

    def get_batch(split, index):
        chosen = torch.arange(index * B, (index + 1) * B) % 13
        return x0[chosen], maskable[chosen] & (split == "val")

    mean, error, nats, tokens = validate(model, get_batch, B, 13, mc_num=mc_num)
    torch.testing.assert_close(nats, expected, atol=0, rtol=1e-4)
    assert tokens.tolist() == maskable.sum(dim=1).tolist()
    assert mean == pytest.approx((expected.sum() / maskable.sum()).item(), rel=1e-5)
    assert error == bound_and_error(nats, tokens, torch.tensor(levels))[1]
    parts = []
    monkeypatch.setattr(train_module.dist, "all_reduce", parts.append)
    for rank in range(2):
        validate(model, get_batch, B, 13, mc_num=mc_num, rank=rank, world_size=2)
    torch.testing.assert_close(parts[0] + parts[1], torch.stack((nats, tokens)))
    assert sum(part[1, 0] > 0 for part in parts) == 1  # who has the first row


def test_standard_error_by_hand():
    """From neighbours in t within each half of the texts, where the first and the last pair count twice."""
    nats = torch.tensor([9.0, 2.0, 5.0, 4.0, 7.0])
    tokens, t = torch.tensor([4.0, 2.0, 3.0, 3.0, 3.0]), torch.tensor([0.9, 0.1, 0.5, 0.3, 0.2])
    mean = 27 / 15
    a, b, c, d, e = ((nats - mean * tokens) / 3).tolist()
    squares = [(c - b) ** 2, (a - c) ** 2, (c - b) ** 2, (a - c) ** 2] + 3 * [(d - e) ** 2]
    assert bound_and_error(nats, tokens, t) == pytest.approx((mean, math.sqrt(sum(squares) / 7 / 2 / 5)))


@pytest.mark.parametrize("n", [1, 2, 16, 33, 512])
def test_levels_are_the_midpoints_of_equal_parts(n):
    """So their mean is 1/2, and any texts in a row have levels from everywhere."""
    levels = spread_levels(n)
    torch.testing.assert_close(levels.sort().values, (torch.arange(n).double() + 0.5) / n, atol=1e-12, rtol=0)
    for start in range(n - 7):
        assert levels[start : start + 8].sort().values.diff().max() < 0.3


@pytest.mark.parametrize("N, most", [(16, 1.6), (64, 1.1), (512, 1.05)])
@pytest.mark.parametrize("step", [0, 5])
def test_two_standard_errors_cover_the_bound(N, most, step):
    """The loss rises with t and scatters by 0.4; with a step, the two halves differ, as in fine-tuning."""
    rng, t, errors, covered = np.random.default_rng(0), spread_levels(N), [], []
    trend = 1 + 4 * t + t**2 + step * (torch.arange(N) >= N / 2)
    for _ in range(1000):
        nats = 1024 * (trend + 0.4 * torch.from_numpy(rng.normal(size=N)))
        mean, error = bound_and_error(nats, torch.full((N,), 1024.0), t)
        errors.append(error * math.sqrt(N) / 0.4)
        covered.append(abs(mean - (1 + 4 / 2 + 1 / 3 + step / 2)) < 2 * error)
    assert 0.95 < np.mean(errors) < most and np.mean(covered) > 0.93


# ---- data


def batches(data_dir, one_per_line=False, **settings):
    cfg = TrainConfig(**{"block_size": 16, "micro_batch_size": 8, "eval_seqs": 16} | settings)
    meta = load_meta(data_dir / "arithmetic") | {"one_per_line": one_per_line}
    return token_batches(str(data_dir / "arithmetic"), meta, cfg)


def test_training_batches_follow_from_seed_and_index(data_dir):
    keys = [(0, 5), (0, 4), (0, 6), (1, 4), (1, 5)]  # seed + index is not what counts
    x0 = torch.stack([batches(data_dir, seed=seed)("train", index)[0] for seed, index in keys])
    assert len(x0.unique(dim=0)) == 5 and torch.equal(batches(data_dir, seed=0)("train", 5)[0], x0[0])
    text = (data_dir / "arithmetic" / "train.bin").read_bytes()
    assert all(row.numpy().astype(np.uint16).tobytes() in text for row in x0.flatten(0, 1))


@pytest.mark.parametrize("one_per_line", [True, False])
def test_validation_sequences_are_spread_over_the_held_out_part(data_dir, one_per_line):
    """Of lines, each sequence starts at one, in training too."""
    tokens = np.fromfile(data_dir / "arithmetic" / "val.bin", np.uint16).astype(np.int64)
    eot_id = load_meta(data_dir / "arithmetic")["eot_id"]
    starts = [i for i in range(len(tokens) - 15) if tokens[i] == eot_id or not one_per_line]
    get_batch = batches(data_dir, one_per_line)
    for row, x0 in enumerate(torch.cat([get_batch("val", 0)[0], get_batch("val", 1)[0]]).tolist()):
        assert x0 == tokens[starts[row * len(starts) // 16] :][:16].tolist()
    x0, maskable = get_batch("train", 0)
    assert (x0[:, 0] == eot_id).all() == one_per_line and maskable.all()


def test_data_that_are_absent_or_too_short(data_dir):
    with pytest.raises(ValueError, match="no prepared data in .*nothing"):
        load_meta(data_dir / "nothing")
    with pytest.raises(ValueError, match="train.bin is too short for block_size 100000"):
        batches(data_dir, block_size=100_000)
    os.truncate(data_dir / "arithmetic" / "val.bin", 1000)
    with pytest.raises(ValueError, match="val.bin should have 79,410 bytes"):
        load_meta(data_dir / "arithmetic")


# ---- start and resume


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt"])
def test_scratch_takes_no_out_dir_that_is_in_use(data_dir, tmp_path, name):
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ValueError, match=f"{name} exists; continue with --init_from=resume"):
        run(data_dir, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["data", name]) and (tmp_path / name).read_bytes() == b"old"


def test_a_log_without_a_checkpoint_is_moved_aside(data_dir, tmp_path):
    """A start that failed before its first checkpoint does not block the folder; it is no part of the run."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 0, "config": {"seed": 7}}\n{"step"')
    run(data_dir, tmp_path)
    assert [config["seed"] for _, config in rows(tmp_path, "config")] == [0]
    assert (tmp_path / "log.jsonl.old").read_text() == '{"step": 0, "config": {"seed": 7}}\n'


def test_a_cut_off_line_of_the_log_goes(data_dir, tmp_path):
    """Also in the middle of a character; a resumed run appends to the rest."""
    run(data_dir, tmp_path, "--max_steps=2")
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": "é'.encode()[:-1])
    go("--init_from=resume", f"--out_dir={tmp_path}", "--max_steps=4")
    assert path.read_bytes().startswith(whole + b'{"step": 2') and rows(tmp_path, "val_loss")[-1][0] == 4


def test_auto_resumes_if_there_is_a_checkpoint(data_dir, tmp_path):
    for max_steps in (2, 4):
        run(data_dir, tmp_path, "--init_from=auto", f"--max_steps={max_steps}")
    starts = [(step, config["init_from"]) for step, config in rows(tmp_path, "config")]
    assert starts == [(0, "scratch"), (2, "resume")] and load_checkpoint(tmp_path)["step"] == 4


def test_preset(data_dir):
    flags = [f"--data_dir={data_dir}", "--out_dir=nowhere", "--preset=6M", "--n_embd=256"]
    cfg, _, model, _ = start(*flags)
    assert (cfg.n_layer, cfg.n_head, cfg.mlp_hidden, model.num_params()) == (6, 4, 1024, 6_294_784)
    with pytest.raises(ValueError, match=r"n_layer=3 \(command line\) contradicts preset 6M, which has 6"):
        start(*flags, "--n_layer=3")


def test_a_model_without_a_sink_is_given_one(data_dir, tmp_path, capsys):
    """With the embedding of end-of-text; it is said, and trains. One that has a sink keeps it."""
    run(data_dir, tmp_path / "vanilla", "--n_sink=0")
    flags = [f"--init_from={tmp_path / 'vanilla'}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'b'}"]
    cfg, meta, model, _ = start(*flags, "--n_sink=2", "--sink_attends_all=True")
    assert "vanilla has no sink token: it gets 2" in capsys.readouterr().out
    assert (cfg.n_sink, model.config.n_sink, model.config.sink_attends_all) == (2, 2, True)
    assert torch.equal(model.sink, model.wte.weight[[meta["eot_id"]] * 2])
    assert start(*flags)[2].config.n_sink == 0
    go(*flags, "--n_sink=1", *TINY_FLAGS[6:])
    with pytest.raises(ValueError, match="n_sink=2 .command line. contradicts .*/b, which has 1"):
        start(f"--init_from={tmp_path / 'b'}", *flags[1:2], "--out_dir=nowhere", "--n_sink=2")


def test_start_from_the_weights_of_another_run(data_dir, tmp_path):
    """With its architecture. The length of a sequence and the way of the sink's attention are free."""
    first, path = run(data_dir, tmp_path / "a", "--gated_attention=True"), tmp_path / "a" / "ckpt.pt"
    flags = [f"--init_from={path}", f"--data_dir={data_dir}", "--out_dir=nowhere"]
    cfg, _, model, resume = start(*flags, "--block_size=32", "--sink_attention=split")
    assert resume is None and same(first, model) and start(*flags)[0].block_size == 16
    assert (cfg.gated_attention, cfg.n_embd, cfg.learning_rate, cfg.batch_size) == (True, 16, 1e-3, 16)
    assert (model.config.block_size, model.config.sink_attention) == (32, "split")
    for flag, source in (("--n_layer=6", "command line"), ("--preset=6M", "preset 6M")):
        with pytest.raises(ValueError, match=rf"n_layer=6 \({source}\) contradicts .*ckpt.pt, which has 2"):
            start(*flags, flag)


def test_resume_keeps_every_setting_but_a_few(data_dir, tmp_path, capsys):
    run(data_dir, tmp_path)
    resume = ["--init_from=resume", f"--out_dir={tmp_path}"]
    (tmp_path / "x.py").write_text("seed = 1")
    with pytest.raises(ValueError, match=rf"seed=1 \(.*x.py\) contradicts {tmp_path}, which has 0; leave it"):
        start(*resume, tmp_path / "x.py")
    free = {"max_steps": 9, "train_flops": 1e9, "eval_interval": 5, "log_interval": 7, "wandb": "name"}
    free |= {"data_dir": f"{data_dir}/", "device": "auto", "compile": True, "sink_attention": "split"}
    flags = [f"--{key}={value}" for key, value in free.items()]
    cfg, _, model, checkpoint = start(*resume, *flags, "--n_layer=2")
    assert {key: getattr(cfg, key) for key in TINY | free} == TINY | free
    assert (checkpoint["step"], model.config.sink_attention) == (6, "split")
    assert f"n_embd = 16  (default 96, set by {tmp_path})" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has made 6 steps, but max_steps is 4"):
        go(*resume, "--max_steps=4")


def test_resume_refuses_other_data_and_scripts(data_dir, tmp_path):
    """How a tokenizer splits texts, its pattern, does not count."""
    run(data_dir, tmp_path, "--max_steps=0")
    meta, saved = load_meta(data_dir / "arithmetic"), load_checkpoint(tmp_path)

    def resume_with(checkpoint=saved, **changes):
        torch.save(checkpoint, tmp_path / "ckpt.pt")
        (data_dir / "arithmetic" / "meta.json").write_text(json.dumps(meta | changes))
        start("--init_from=resume", f"--out_dir={tmp_path}")

    resume_with(tokenizer=meta["tokenizer"] | {"pattern": "other"})
    with pytest.raises(ValueError, match="arithmetic has other tokens than when .* was saved"):
        resume_with(sha256={})
    for changes in {"tokenizer": meta["tokenizer"] | {"words": []}}, {"vocab_size": 500}:
        with pytest.raises(ValueError, match="different vocabularies"):
            resume_with(**changes)
    converted = {key: value for key, value in saved.items() if key != "optimizer"}
    for checkpoint in converted, saved | {"run_config": saved["run_config"] | {"epochs": 3.0}}:
        with pytest.raises(ValueError, match="another script or version .*--init_from="):
            resume_with(checkpoint)
    with pytest.raises(ValueError, match="has no tokenizer; convert it again with --tokenizer"):
        resume_with(saved | {"meta": None})


BAD_SETTINGS = "batch_size=6 dtype=float16 device=foo seed=-1 eval_seqs=1 grad_clip=-1.0 log_interval=0"
BAD_SETTINGS += " learning_rate=1e-05"  # below the min_lr of this run


@pytest.mark.parametrize("flag", BAD_SETTINGS.split())
def test_bad_settings_are_named_before_anything_is_written(data_dir, tmp_path, flag):
    name, value = flag.split("=")
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        run(data_dir, tmp_path / "a", "--min_lr=2e-5", f"--{flag}")
    assert not (tmp_path / "a").exists()


def test_the_recipe_of_the_paper():
    cfg, _ = parse(TrainConfig, [str(ROOT / "config/pretrain_472m.py")])
    recipe = {"batch_size": 256, "block_size": 2048, "random_length": 0.01, "stratified_t": False}
    recipe |= {"learning_rate": 2e-4, "min_lr": 2e-5, "warmup": 0.01, "grad_clip": 1.0}
    recipe |= {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "preset": "472M", "train_flops": 3e20}
    assert {key: getattr(cfg, key) for key in recipe} == recipe


# ---- what is written


def test_checkpoints_and_log(data_dir, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.7, 2.7, 2.6])  # a resumed run repeats the validation of its first step
    monkeypatch.setattr(train_module, "validate", lambda *args, **kwargs: (next(losses), 0.1, None, None))
    run(data_dir, tmp_path, "--learning_rate=0.1")
    model = go("--init_from=resume", f"--out_dir={tmp_path}", "--max_steps=8", "--keep_all=True")
    assert rows(tmp_path, "val_loss") == [(0, 3.0), (2, 2.0), (4, 2.5), (6, 2.7), (8, 2.6)]
    rates = {step: train_module.get_lr(step, 6, 0.1, 0.01, 2) for step in range(1, 7)}
    assert dict(rows(tmp_path, "lr")[:6]) == rates
    assert rows(tmp_path, "tokens") == [(step, step * 8 * 16) for step in range(1, 9)]
    for name, step in {"ckpt.pt": 8, "best.pt": 2, "6.pt": 6, "8.pt": 8}.items():
        checkpoint = load_checkpoint(tmp_path / name)
        assert (checkpoint["step"], checkpoint["best_val_loss"]) == (step, 2.0)
        assert checkpoint["run_config"]["learning_rate"] == 0.1
        assert checkpoint["meta"] == load_meta(data_dir / "arithmetic")
    assert same(model, MDM.from_checkpoint(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["6.pt", "8.pt", "best.pt", "ckpt.pt"]


def test_a_run_killed_between_its_first_two_checkpoints_can_be_resumed(data_dir, tmp_path, monkeypatch):
    def killed(path, write):
        write_file(path, write)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "write_file", killed)
        run(data_dir, tmp_path)
    go("--init_from=auto", f"--out_dir={tmp_path}")
    assert load_checkpoint(tmp_path)["step"] == 6 and (tmp_path / "best.pt").exists()


def test_the_log_says_what_made_it_and_a_resumed_run_appends(data_dir, tmp_path):
    run(data_dir, tmp_path, "--seed=5")
    go("--init_from=resume", f"--out_dir={tmp_path}", "--max_steps=8")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    starts = [json.loads(line) for line in open(tmp_path / "log.jsonl") if "config" in line]
    for row, step, steps in zip(starts, (0, 6), (6, 8), strict=True):
        assert (row["step"], row["config"]["max_steps"], row["config"]["seed"]) == (step, steps, 5)
        assert row["data_sha256"] == load_meta(data_dir / "arithmetic")["sha256"]
        assert (row["commit"] or "").removesuffix("-dirty") == git.stdout.strip()
        assert (row["torch"], row["device"], row["processes"]) == (torch.__version__, "cpu", 1)


def test_tokens_per_second(data_dir, tmp_path, monkeypatch):
    """A micro-batch of 64 tokens takes a second, or two when resumed; validations do not count."""
    now = 0.0

    def work(*key):
        nonlocal now
        now += 100 if len(key) == 3 else 1 if key[1] < 12 else 2

    on_seed(monkeypatch, work)
    monkeypatch.setattr(train_module.time, "perf_counter", lambda: now)
    run(data_dir, tmp_path, "--log_interval=3")
    go("--init_from=resume", f"--out_dir={tmp_path}", "--max_steps=10")
    assert rows(tmp_path, "tokens_per_s") == [(3, 64), (6, 64), (9, 32), (10, 32)]


def test_wandb(data_dir, tmp_path, monkeypatch):
    """A resumed run is the same run, and one that was stopped is not marked as failed."""
    started, logged, ended = [], [], []

    def init(**options):
        started.append(options)
        log = lambda row, step: logged.append((step, row["step"]))  # noqa: E731
        return SimpleNamespace(id="abc", log=log, finish=lambda: ended.append(True))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run(data_dir, tmp_path, "--wandb=name")
    send_at(monkeypatch, 15, signal.SIGTERM)
    with pytest.raises(SystemExit):
        go("--init_from=resume", f"--out_dir={tmp_path}", "--max_steps=10")
    assert [options["id"] for options in started] == [None, "abc"] and ended == [True, True]
    assert started[0]["project"] == "name" and started[0]["config"]["seed"] == 0
    assert {step for step, _ in logged} == set(range(9)) and all(a == b for a, b in logged)
