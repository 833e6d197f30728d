"""Runs that survive: killed, stopped, filled up, damaged or fed with nonsense, they lose nothing and say what is wrong.

python -m pytest tests/test_trust.py            # what takes seconds
python -m pytest tests/test_trust.py -m slow    # processes that are killed, stopped and compared
"""

import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import TINY_FLAGS, rows, run, same

import prepare_data
import train as train_module
from configurator import parse
from model import MDM, load_checkpoint
from prepare_data import PrepareConfig, prepare
from sample import load_trained
from train import Reporter, TrainConfig, load_meta, save_checkpoint, start_model

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

# A script run with the one thing changed that a test injects: HOOK is Python that sees the modules and argv.
WRAPPER = """
import io, os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import configurator, sft_gsm8k, train
real_seed_for, real_save, real_replace, real_fsync = train.seed_for, torch.save, os.replace, os.fsync
{hook}
module = sys.modules[sys.argv[1]]
sys.argv = sys.argv[1:]
configurator.run(module.main)
"""


def start(tmp_path, script, *flags, hook="", processes=1, **options):
    """A process that runs train or sft_gsm8k, with a hook if given; under torchrun if processes > 1."""
    path = tmp_path / f"hooked_{abs(hash(hook))}.py"
    path.write_text(WRAPPER.format(root=str(ROOT), hook=hook))
    command = [sys.executable] if processes == 1 else [*TORCHRUN, f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(path), script, "--device=cpu", *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True, **options,
    )  # fmt: skip
    STARTED.append(process)
    return process


STARTED = []


@pytest.fixture(autouse=True)
def leave_nothing_running():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:  # its test has failed
            process.terminate()
            process.kill()


def finish(process, code=0, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def tensors(value):
    """All that a checkpoint holds and that must agree bit for bit, flat."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in tensors(item)]
    return [value]


def assert_same_runs(a, b):
    one, two = load_checkpoint(a), load_checkpoint(b)
    for key in ("model", "optimizer", "scaler", "step", "best_val_loss", "losses"):
        for x, y in zip(tensors(one[key]), tensors(two[key]), strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, key
    for key in ("loss", "val_loss", "val_se", "lr", "grad_norm", "tokens"):
        assert rows(a, key) == rows(b, key) and len(rows(a, key)) > 1, key


STOP = """
def seed_for(seed, index):  # called once for every micro-batch
    if index == {index}:
        os.kill(os.getpid(), signal.{name})
    return real_seed_for(seed, index)
train.seed_for = seed_for
"""


@pytest.fixture
def small(data_dir):
    """Flags of a run of 60 steps of 8 sequences, whose log and validations do not fall on step 25."""
    return [
        *TINY_FLAGS,
        "--max_steps=60",
        "--eval_interval=20",
        "--log_interval=10",
        f"--data_dir={data_dir}",
    ]


# ---- resume


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["train", "sft_gsm8k"])
def test_60_steps_are_25_and_35(script, processes, small, tmp_path):
    """Losses, weights and optimizer bit for bit. Fine-tuning's 480 examples of 60 steps are more than the epoch's 400."""
    if script == "sft_gsm8k":
        prepare(PrepareConfig(data_dir=str(tmp_path / "data"), num_problems=200))
        small = [*small, "--dataset=arithmetic", "--block_size=64"]
    finish(start(tmp_path, script, *small, f"--out_dir={tmp_path / 'whole'}", processes=processes))
    hook = STOP.format(index=24 * 2 + 1, name="SIGTERM")  # the last micro-batch of step 25
    out, _ = finish(
        start(tmp_path, script, *small, f"--out_dir={tmp_path / 'cut'}", hook=hook, processes=processes)
    )
    assert "stopped at step 25 of 60" in out and load_checkpoint(tmp_path / "cut")["step"] == 25
    if script == "sft_gsm8k":
        assert "train: 400 examples" in out
    finish(
        start(tmp_path, script, "--init_from=resume", f"--out_dir={tmp_path / 'cut'}", processes=processes)
    )
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


KILL = """
events = 0
def event():
    global events
    events += 1
    if events == {target}:
        os.kill(os.getpid(), signal.SIGKILL)
def seed_for(seed, index):
    event()
    return real_seed_for(seed, index)
def save(obj, file):
    buffer = io.BytesIO()
    real_save(obj, buffer)
    file.write(buffer.getbuffer()[: len(buffer.getbuffer()) // 2])
    file.flush()
    event()  # half a checkpoint is on the disk
    file.write(buffer.getbuffer()[len(buffer.getbuffer()) // 2 :])
def fsync(file):
    event()
    real_fsync(file)
def replace(a, b):
    event()
    real_replace(a, b)
    event()
train.seed_for, torch.save, os.fsync, os.replace = seed_for, save, fsync, replace
"""


@pytest.mark.slow
def test_killed_20_times(small, tmp_path):
    """kill -9 at 20 random moments, half of them while something is written; each time it is started again."""
    small = [*small, "--max_steps=200", "--eval_interval=3"]
    finish(start(tmp_path, "train", *small, f"--out_dir={tmp_path / 'whole'}"))
    rng, out_dir, steps = random.Random(0), tmp_path / "cut", []
    for _ in range(20):
        begin = ["--init_from=resume"] if (out_dir / "ckpt.pt").exists() else small
        hook = KILL.format(target=rng.randint(1, 30))
        finish(start(tmp_path, "train", *begin, f"--out_dir={out_dir}", hook=hook), code=-signal.SIGKILL)
        if (out_dir / "ckpt.pt").exists():
            steps.append(load_checkpoint(out_dir)["step"])
    assert len(steps) > 15 and steps == sorted(steps) and 30 < steps[-1] < 200
    finish(start(tmp_path, "train", "--init_from=resume", f"--out_dir={out_dir}"))
    assert_same_runs(tmp_path / "whole", out_dir)
    assert (
        load_checkpoint(out_dir / "best.pt")["step"]
        == load_checkpoint(tmp_path / "whole" / "best.pt")["step"]
    )
    assert not list(out_dir.glob("*.tmp"))


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(small, tmp_path):
    """1 x 4 accumulation steps, 2 x 2, 4 x 1: the same losses and validation, and every micro-batch its own noise."""
    note = """
def seed_for(seed, index):
    found = real_seed_for(seed, index)
    with open(os.path.join(os.path.dirname(__file__), "seeds-" + os.environ.get("WORLD_SIZE", "1")), "a") as file:
        file.write(f"{index} {found}\\n")
    return found
train.seed_for = seed_for
"""
    flags = [*small, "--micro_batch_size=2", "--max_steps=20", "--log_interval=1", "--eval_interval=5"]
    for processes in (1, 2, 4):
        out, _ = finish(
            start(
                tmp_path,
                "train",
                *flags,
                f"--out_dir={tmp_path / str(processes)}",
                hook=note,
                processes=processes,
            )
        )
        assert f"a step is {4 // processes} x {processes} x 2 sequences" in out
        seeds = [line.split() for line in (tmp_path / f"seeds-{processes}").read_text().splitlines()]
        assert (
            sorted(int(index) for index, _ in seeds) == list(range(80))
            and len({seed for _, seed in seeds}) == 80
        )
        for key in ("loss", "val_loss", "val_se", "grad_norm"):
            (steps, ours), (one_steps, one) = (zip(*rows(tmp_path / str(n), key)) for n in (processes, 1))
            assert steps == one_steps and ours == pytest.approx(one, rel=1e-5 if "loss" in key else 1e-4), (
                processes,
                key,
            )


def test_the_same_command_gives_the_same_weights(data_dir, tmp_path):
    for name in "ab":
        finish(
            start(tmp_path, "train", *TINY_FLAGS, f"--data_dir={data_dir}", f"--out_dir={tmp_path / name}")
        )
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_data_are_the_same_on_any_number_of_threads(tmp_path, monkeypatch):
    """Byte for byte, also of the tokenizer and of files that are longer than one piece of work."""
    monkeypatch.setattr(prepare_data, "CHARS_AT_ONCE", 1000)
    made = {}
    for name, cpus in {"a": 1, "b": 7, "c": 7}.items():
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        prepare(PrepareConfig(data_dir=str(tmp_path / name), num_problems=300))
        made[name] = {path.name: path.read_bytes() for path in (tmp_path / name / "arithmetic").iterdir()}
    assert made["a"].keys() >= {"train.bin", "val.bin", "train_cuts.npy", "meta.json", "test.txt"}
    assert made["a"] == made["b"] == made["c"]


def test_the_log_tells_what_made_it(data_dir, tmp_path):
    run(data_dir, tmp_path / "a", "--seed=5")
    run(data_dir, tmp_path / "a", "--init_from=resume", "--seed=5", "--max_steps=8")
    lines = [json.loads(line) for line in open(tmp_path / "a" / "log.jsonl")]
    first, second = (line for line in lines if "config" in line)
    assert (first["step"], second["step"]) == (0, 6) and (
        first["config"]["seed"],
        second["config"]["max_steps"],
    ) == (5, 8)
    meta = load_meta(data_dir / "arithmetic")
    for line in (first, second):
        assert line["data_sha256"] == meta["sha256"] == load_checkpoint(tmp_path / "a")["meta"]["sha256"]
        assert line["torch"] == torch.__version__ and line["numpy"] == np.__version__ and "commit" in line
        assert (line["processes"], line["device"], line["python"]) == (1, "cpu", sys.version.split()[0])


# ---- signals


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError((text, process.stderr.read()))


LONG = ["--max_steps=20000", "--eval_interval=20000", "--log_interval=5"]


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_finishes_the_step_and_saves(name, code, small, tmp_path):
    process = start(tmp_path, "train", *small, *LONG, f"--out_dir={tmp_path / 'a'}")
    read_until(process, "step     10/")
    process.send_signal(signal.Signals[name])
    out, err = finish(process, code)
    step = load_checkpoint(tmp_path / "a")["step"]
    assert step >= 10 and err == ""
    where = f"go on with --init_from=resume --out_dir={tmp_path / 'a'}"
    assert f"stopped at step {step} of 20000; {tmp_path / 'a' / 'ckpt.pt'} is saved; {where}" in out


LONG_STEP = """
def seed_for(seed, index):
    if index == 50:
        print("long step", flush=True)
        end = time.time() + {seconds}
        while time.time() < end:
            time.sleep(0.05)
    return real_seed_for(seed, index)
train.seed_for = seed_for
"""


@pytest.mark.parametrize("name, pause, code", [("SIGTERM", 1, 0), ("SIGINT", 0.1, 130)])
def test_a_signal_that_comes_twice_is_one(name, pause, code, small, tmp_path):
    """SIGTERM always, as schedulers repeat it; Ctrl-C within half a second, as a launcher may pass it on."""
    process = start(
        tmp_path, "train", *small, f"--out_dir={tmp_path / 'a'}", hook=LONG_STEP.format(seconds=4)
    )
    read_until(process, "long step")
    for _ in range(2):
        process.send_signal(signal.Signals[name])
        time.sleep(pause)
    out, _ = finish(process, code)
    assert "stopped at step 26 of 60" in out and load_checkpoint(tmp_path / "a")["step"] == 26


def test_a_stop_is_saved_before_a_validation(small, tmp_path):
    """Which may take longer than whoever stops us waits. Step 20 is one of validation, here of two minutes."""
    hook = (
        STOP.format(index=39, name="SIGTERM")
        + """
real_evaluate, calls = train.evaluate, []
def evaluate(*args):
    calls.append(args)
    if len(calls) == 2:
        print("long validation", flush=True)
        time.sleep(120)
    return real_evaluate(*args)
train.evaluate = evaluate
"""
    )
    process = start(tmp_path, "train", *small, f"--out_dir={tmp_path / 'a'}", hook=hook)
    read_until(process, "long validation")
    assert load_checkpoint(tmp_path / "a")["step"] == 20
    process.kill()
    finish(process, -signal.SIGKILL)


def test_a_second_ctrl_c_leaves_at_once(small, tmp_path):
    """In the middle of a step that would take a minute."""
    hook = LONG_STEP.format(seconds=60)
    process = start(tmp_path, "train", *small, f"--out_dir={tmp_path / 'a'}", hook=hook)
    read_until(process, "long step")
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    start_time = time.time()
    _, err = finish(process, 130)
    assert time.time() - start_time < 10 and err == ""
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before and load_checkpoint(tmp_path / "a")[
        "step"
    ] == 20


EXIT_CODES = """
real_run = configurator.run
def run(main):
    code = 0
    try:
        real_run(main)
    except SystemExit as error:
        code = error.code
        raise
    finally:
        open(os.path.join(os.path.dirname(__file__), "code-" + os.environ["RANK"]), "w").write(str(code))
configurator.run = run
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [("SIGTERM", "0"), ("SIGINT", "130")])
def test_signals_under_torchrun(name, code, small, tmp_path):
    """torchrun starts processes in sessions of their own and passes signals on."""
    process = start(
        tmp_path, "train", *small, *LONG, f"--out_dir={tmp_path / 'a'}", hook=EXIT_CODES, processes=2
    )
    read_until(process, "step     10/")
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=60)
    step = load_checkpoint(tmp_path / "a")["step"]
    assert step >= 10 and f"stopped at step {step} of 20000" in out, err
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == [code, code]
    resume = ["--init_from=resume", f"--max_steps={step + 5}", f"--out_dir={tmp_path / 'a'}"]
    finish(start(tmp_path, "train", *resume, processes=2))
    assert load_checkpoint(tmp_path / "a")["step"] == step + 5


# ---- faults


def test_disk_full_by_a_limit(small, tmp_path):
    """No file may grow beyond 40 KB from here on: the checkpoint, which needs more, is named, and the old one stays."""
    out_dir = tmp_path / "a"
    finish(start(tmp_path, "train", *small, "--max_steps=0", f"--out_dir={out_dir}"))
    before = (out_dir / "ckpt.pt").read_bytes()
    assert len(before) > 80_000
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    resume = ["--init_from=resume", "--max_steps=5", f"--out_dir={out_dir}"]
    _, err = finish(start(tmp_path, "train", *resume, preexec_fn=limit), code=2)
    assert (
        err.count("\n") == 1 and err.startswith(f"error: cannot save {out_dir}/") and "File too large" in err
    )
    assert "make room, then --init_from=resume" in err
    assert (out_dir / "ckpt.pt").read_bytes() == before and not list(out_dir.glob("*.tmp"))
    finish(start(tmp_path, "train", *resume))
    assert load_checkpoint(out_dir)["step"] == 5


def test_disk_full_on_a_small_disk(small, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a small disk here; the limit of a file's size is tested")
    try:
        finish(start(tmp_path, "train", *small, "--max_steps=0", f"--out_dir={disk}"))
        (disk / "best.pt").unlink()  # room for one checkpoint, and not for a second beside it
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(0, free - 60_000)))
        before = (disk / "ckpt.pt").read_bytes()
        _, err = finish(
            start(tmp_path, "train", "--init_from=resume", "--max_steps=5", f"--out_dir={disk}"), code=2
        )
        assert err.count("\n") == 1 and "No space left on device" in err and f"cannot save {disk}/" in err
        assert (disk / "ckpt.pt").read_bytes() == before and load_checkpoint(disk)["step"] == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_room_for_the_log(tmp_path):
    report = Reporter(TrainConfig(out_dir=str(tmp_path)), 0, 10, False, {})
    report.file = open("/dev/full", "w")
    with pytest.raises(ValueError, match="cannot write /dev/full .*No space left on device.*; make room"):
        report.write({"step": 1})


def test_damaged_log(data_dir, tmp_path):
    run(data_dir, tmp_path / "a")
    with open(tmp_path / "a" / "log.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step"')  # a line that a crash cut off is left out
    run(data_dir, tmp_path / "a", "--init_from=resume", "--max_steps=7")
    (tmp_path / "a" / "log.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="log.jsonl is damaged .*; move it away"):
        run(data_dir, tmp_path / "a", "--init_from=resume", "--max_steps=8")


@pytest.fixture
def checkpoint(data_dir, tmp_path):
    run(data_dir, tmp_path / "a", "--max_steps=1")
    return tmp_path / "a" / "ckpt.pt"


def test_truncated_checkpoints(checkpoint):
    whole = checkpoint.read_bytes()
    for tenth in range(10):
        checkpoint.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ValueError, match="ckpt.pt cannot be read as a checkpoint"):
            load_checkpoint(checkpoint)
    checkpoint.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="ckpt.pt cannot be read as a checkpoint"):
        load_checkpoint(checkpoint)


def test_flipped_bytes_in_checkpoints(checkpoint):
    """Wherever a byte is flipped: refused by name, or (in padding, or a date) it changes nothing. Nine in ten bytes are weights."""
    whole, good = checkpoint.read_bytes(), load_checkpoint(checkpoint)
    rng, refused = random.Random(0), 0
    for _ in range(150):
        place = rng.randrange(len(whole))
        checkpoint.unlink()  # the good one is still mapped into memory
        checkpoint.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        )
        try:
            found = load_checkpoint(checkpoint)
        except ValueError as error:
            assert str(checkpoint) in str(error)
            refused += 1
            continue
        for a, b in zip(tensors(good), tensors(found), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert refused > 75


def test_weights_that_are_not_finite_write_no_text(checkpoint):
    content = load_checkpoint(checkpoint)
    content["model"]["ln_f.weight"][3] = math.nan
    save_checkpoint(checkpoint, content)
    with pytest.raises(
        ValueError,
        match="ckpt.pt holds weights that are not finite, in ln_f.weight; take an earlier checkpoint",
    ):
        load_trained(checkpoint.parent, "ckpt.pt", "cpu")


@pytest.mark.parametrize(
    "change", [{"step": "x"}, {"step": None}, {"meta": 5}, {"model_config": []}, {"model": None}]
)
def test_what_is_no_checkpoint_of_ours(checkpoint, change):
    torch.save({**load_checkpoint(checkpoint), **change}, checkpoint.parent / "other.pt")
    with pytest.raises(ValueError, match="other.pt is no checkpoint of train.py"):
        load_checkpoint(checkpoint.parent / "other.pt")


@pytest.mark.parametrize(
    "change",
    [{"pattern": "("}, {"ranks": ["!"]}, {"ranks": ["YQ=="]}, {"vocab_size": "x"}, {"vocab_size": 3}],
)
def test_damaged_tokenizers(data_dir, change):
    spec = load_meta(data_dir / "arithmetic")["tokenizer"]
    assert spec["name"] == "bpe"
    with pytest.raises(
        ValueError, match="the tokenizer's description is damaged .*; prepare the data set again"
    ):
        prepare_data.load_tokenizer({**spec, **change})


def test_checkpoints_of_before_can_be_resumed(checkpoint, data_dir, tmp_path):
    """They have no losses of the steps since the last log line."""
    content = load_checkpoint(checkpoint)
    content.pop("losses")
    content["meta"]["sha256"] = {split: content["meta"]["sha256"][split] for split in ("train", "val")}
    save_checkpoint(checkpoint, content)
    run(data_dir, checkpoint.parent, "--init_from=resume", "--max_steps=3")
    assert load_checkpoint(checkpoint)["step"] == 3


def test_checkpoints_of_another_shape(checkpoint, data_dir):
    meta, good = load_meta(data_dir / "arithmetic"), load_checkpoint(checkpoint)
    cfg = TrainConfig(**good["run_config"])
    for change in (
        {"model_config": {**good["model_config"], "n_embd": 32}},
        {"model_config": {**good["model_config"], "n_heads": 2}},
        {"model": {name: w for name, w in good["model"].items() if name != "sink"}},
        {"model": {**good["model"], "sink": torch.zeros(2, 16)}},
    ):
        with pytest.raises(ValueError, match="the checkpoint's weights are not those of its model_config"):
            start_model(cfg, {**good, **change, "run_config": good["run_config"]}, meta)


@pytest.mark.parametrize("in_place", [True, False])
def test_data_replaced_while_they_are_read(data_dir, tmp_path, in_place):
    """By other tokens of the same number, under the same name."""
    path = data_dir / "arithmetic" / "train.bin"

    def replace_at_9(get_batch):
        def batches(split, index):
            if (split, index) == ("train", 9):
                (path if in_place else path.with_suffix(".new")).write_bytes(path.read_bytes()[::-1])
                if not in_place:
                    os.replace(path.with_suffix(".new"), path)
            return get_batch(split, index)

        return batches

    with pytest.raises(
        ValueError, match="train.bin was replaced while it was read; prepare changed data under another"
    ):
        run(data_dir, tmp_path / "a", wrap=replace_at_9)
    assert load_checkpoint(tmp_path / "a")["step"] == 4
    with pytest.raises(ValueError, match=r"train.bin holds other data than meta.json says \(sha256\)"):
        run(data_dir, tmp_path / "a", "--init_from=resume")


def test_data_that_are_only_touched_are_no_reason_to_stop(data_dir, tmp_path):
    def touch(get_batch):
        def batches(split, index):
            (data_dir / "arithmetic" / f"{split}.bin").touch()
            return get_batch(split, index)

        return batches

    assert same(run(data_dir, tmp_path / "a", wrap=touch), run(data_dir, tmp_path / "b"))


def test_meta_of_another_tokenizer(data_dir, tmp_path):
    """Whether it goes with a checkpoint's vocabulary or not, it does not go with the tokens."""
    prepare(PrepareConfig(data_dir=str(tmp_path / "other"), num_problems=300, tokenizer="bytes"))
    shutil.copy(tmp_path / "other" / "arithmetic" / "meta.json", data_dir / "arithmetic" / "meta.json")
    with pytest.raises(
        ValueError, match="train.bin has .* bytes, meta.json says .*; prepare the data set again"
    ):
        run(data_dir, tmp_path / "a")
    meta = json.loads((data_dir / "arithmetic" / "meta.json").read_text())
    (data_dir / "arithmetic" / "meta.json").write_text(json.dumps({**meta, "tokenizer": None}))
    with pytest.raises(ValueError, match="meta.json is damaged"):
        run(data_dir, tmp_path / "a")


def poison(value, at):
    """diffusion_loss whose at-th call gives value; with a gradient that is not finite either, or, for inf, one that is."""
    real, calls = train_module.diffusion_loss, []

    def diffusion_loss(*args):
        calls.append(args)
        loss = real(*args)
        return loss if len(calls) - 1 != at else loss + value if math.isinf(value) else loss * value

    return diffusion_loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(data_dir, tmp_path, monkeypatch, value):
    """Micro-batch 9 is the second of step 5; the last checkpoint is of step 4, whatever is logged or saved when."""
    monkeypatch.setattr(train_module, "diffusion_loss", poison(value, 9))
    what = f"step 5: the loss of micro-batch 9 is {value}; the step was not made"
    stated = f"{what}. --init_from=resume repeats it; .*/a/ckpt.pt is a new run"
    with pytest.raises(ValueError, match=stated):
        run(data_dir, tmp_path / "a", "--log_interval=100")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "a")["step"] == 4
    resumed = run(data_dir, tmp_path / "a", "--init_from=resume", "--log_interval=100")
    assert same(resumed, run(data_dir, tmp_path / "b", "--log_interval=100"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(data_dir, tmp_path, monkeypatch, dtype):
    """But in float16, where GradScaler leaves that step out and halves its scale."""

    hooks, real = [], train_module.seed_for

    def seed_for(seed, index):
        if index == 7:
            hooks.append(model.sink.register_hook(lambda grad: grad * float("inf")))
        if index == 8:
            hooks.pop().remove()
        return real(seed, index)

    monkeypatch.setattr(train_module, "seed_for", seed_for)
    cfg, _ = parse(
        TrainConfig,
        [*TINY_FLAGS, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'a'}", f"--dtype={dtype}"],
    )
    meta = load_meta(data_dir / "arithmetic")
    model = start_model(cfg, None, meta)
    get_batch = train_module.token_batches(str(data_dir / "arithmetic"), meta, cfg)
    if dtype == "float32":
        with pytest.raises(
            ValueError,
            match="step 4: the gradient's norm is .*, the losses of micro-batches 6 to 7 are finite",
        ):
            train_module.train(cfg, model, get_batch, meta)
        assert load_checkpoint(tmp_path / "a")["step"] == 2
    else:
        train_module.train(cfg, model, get_batch, meta)
        assert (
            load_checkpoint(tmp_path / "a")["step"] == 6
            and load_checkpoint(tmp_path / "a")["scaler"]["scale"] == 2**15
        )
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_a_bad_loss_of_one_process_is_named_by_all(small, tmp_path):
    hook = """
real_loss, real_name = train.diffusion_loss, train.name_failure
def seed_for(seed, index):
    train.diffusion_loss = lambda *args: real_loss(*args) * (float("nan") if index == 23 else 1.0)
    return real_seed_for(seed, index)
def name_failure(*args):
    found = real_name(*args)
    open(os.path.join(os.path.dirname(__file__), "found-" + os.environ["RANK"]), "w").write(found)
    return found
train.seed_for, train.name_failure = seed_for, name_failure
"""
    process = start(
        tmp_path,
        "train",
        *small,
        "--micro_batch_size=2",
        f"--out_dir={tmp_path / 'a'}",
        hook=hook,
        processes=2,
    )
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode != 0
        and "error: step 6: the loss of micro-batch 23 is nan; the step was not made" in err
    )
    assert [(tmp_path / f"found-{rank}").read_text() for rank in (0, 1)] == [
        "the loss of micro-batch 23 is nan"
    ] * 2
    assert load_checkpoint(tmp_path / "a")["step"] == 0


# ---- hostile input


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused(checkpoint, tmp_path, how):
    content = {**load_checkpoint(checkpoint), "optimizer": Bomb(tmp_path / "bang")}
    if how == "pickle":
        buffer = io.BytesIO()
        pickle.dump({"model": {}, "optimizer": Bomb(tmp_path / "bang")}, buffer)
        (tmp_path / "evil.pt").write_bytes(buffer.getvalue())
    else:
        torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=how == "zip")
    assert not (tmp_path / "bang").exists()
    with pytest.raises(ValueError, match="evil.pt (is refused: it holds other things than|cannot be read)"):
        MDM.from_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "bang").exists()
    if how == "zip":  # it would have
        torch.load(tmp_path / "evil.pt", weights_only=False)
        assert (tmp_path / "bang").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        (b"import sys; sys.exit(3)", "config file .*x.py: SystemExit: 3"),
        (b"raise KeyError", "config file .*x.py: KeyError"),
        (b"\0\0", "config file .*x.py: "),
        (b"\xff\xfe = 1", "config file .*x.py: SyntaxError"),
        (b"batch_size = 10**400", "batch_size=.*: wanted int"),
        (b"out_dir = 'a\\0b'", "out_dir=.*: wanted str or None"),
        (b"import numpy\nbatch_size = numpy.arange(3)", "batch_size=.*: wanted int"),
        (b"class seed: pass\nbatch_size = seed()", "batch_size=.*: wanted int"),
        (b"steps = 3", "unknown key 'steps'"),
        (b"__import__('os').environ['learning_rate']", "config file .*x.py: KeyError"),
    ],
)
def test_config_files_outside_of_what_we_accept(tmp_path, text, message):
    (tmp_path / "x.py").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        parse(TrainConfig, [str(tmp_path / "x.py")])
    (tmp_path / "y.py").mkdir()
    with pytest.raises(ValueError, match="config file .*y.py not found"):
        parse(TrainConfig, [str(tmp_path / "y.py")])


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size > 500) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(str(b)) or replace(a, b))
    save_checkpoint(tmp_path / "ckpt.pt", {"step": 1})
    assert calls == [True, str(tmp_path / "ckpt.pt")]


def test_a_failed_write_leaves_no_half_file(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", {"step": 1})
    with pytest.raises(ValueError, match="cannot save"):
        save_checkpoint(tmp_path / "none" / "ckpt.pt", {"step": 2})
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "ckpt.pt", {"step": Interrupts()})
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"] and torch.load(tmp_path / "ckpt.pt") == {
        "step": 1
    }


class Interrupts:
    def __reduce__(self):
        raise KeyboardInterrupt
