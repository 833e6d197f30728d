"""Runs that are killed, stopped or meet a full disk or a damaged file lose nothing, and say why."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_train import TINY_FLAGS, assert_same_runs, go, rows, run

import configurator
from model import MDM, load_checkpoint
from train import write_file

# A script in which a test changes a thing: hook(*key) is called before train.seed_for.
WRAPPER = """
import io, os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import configurator, sft_gsm8k, train
def hook(*key):
    pass
{hook}
seed_for = train.seed_for
train.seed_for = lambda *key: hook(*key) or seed_for(*key)
main = sys.modules[sys.argv.pop(1)].main
try:
    configurator.run(main)
except SystemExit as end:
    open(__file__ + ".code" + os.environ.get("RANK", "0"), "w").write(str(end.code))
    raise
"""
SIXTY_STEPS = [*TINY_FLAGS, "--max_steps=60", "--eval_interval=20", "--log_interval=10"]
STOP = """
def hook(*key):
    if key == (0, 49):  # the last micro-batch of step 25
        os.kill(os.getpid(), signal.SIGTERM)
"""
LONG_STEP = """
def hook(*key):
    if key == (0, 50):
        print("long step", flush=True)
        time.sleep(600)
"""
NOT_A_NUMBER = """
real_loss = train.diffusion_loss
def hook(*key):
    factor = float("nan") if key == (0, 23) else 1.0
    train.diffusion_loss = lambda *args: real_loss(*args) * factor
"""


@pytest.fixture
def start(data_dir, tmp_path):
    """A process that trains 60 steps, or resumes. Ctrl-C is ignored at first, as with nohup."""
    started = []

    def start(script, out_dir, *flags, hook="", processes=1):
        path = tmp_path / f"hooked_{len(started)}.py"
        path.write_text(WRAPPER.format(root=str(ROOT), hook=hook))
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(path), script, f"--out_dir={out_dir}"]
        if "--init_from=resume" not in flags:
            command += [*SIXTY_STEPS, f"--data_dir={data_dir}"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
        options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([*command, *flags], start_new_session=True, **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def wait_for_step(process, out_dir, step):
    """Until log.jsonl has it."""
    while process.poll() is None:
        if (out_dir / "log.jsonl").exists() and step in dict(rows(out_dir, "loss")):
            return
        time.sleep(0.1)
    raise AssertionError(process.communicate())


def error_of(capsys, main):
    """The one line with which main ends, and nothing else."""
    with pytest.raises(SystemExit) as end:
        configurator.run(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---- resume


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["train", "sft_gsm8k"])
def test_60_steps_are_25_and_35(script, processes, start, tmp_path):
    """Fine-tuning takes two epochs. Of two processes only one gets the signal, and torchrun ends with 1."""
    flags = ["--init_from=scratch", "--dataset=arithmetic", "--batch_size=16", "--micro_batch_size=8"]
    flags += ["--block_size=64"] * (script == "sft_gsm8k")
    finish(start(script, tmp_path / "whole", *flags, processes=processes))
    process = start(script, tmp_path / "cut", *flags, hook=STOP, processes=processes)
    finish(process, 143 if processes == 1 else 1)
    assert load_checkpoint(tmp_path / "cut")["step"] == 25
    finish(start(script, tmp_path / "cut", "--init_from=resume", processes=processes))
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


KILL = """
events = 0
def event():
    global events
    events += 1
    if events == {target}:
        os.kill(os.getpid(), signal.SIGKILL)
def hook(*key):
    if len(key) == 2:
        event()
def save(state, file):
    real_save(state, half := io.BytesIO())
    file.write(half.getvalue()[:9999])
    file.flush()
    event()
    file.seek(0)
    real_save(state, file)
def fsync(file):
    event()
    real_fsync(file)
def replace(a, b):
    event()
    real_replace(a, b)
    event()
real_save, real_fsync, real_replace = torch.save, os.fsync, os.replace
torch.save, os.fsync, os.replace = save, fsync, replace
"""


@pytest.mark.slow
def test_killed_20_times(start, tmp_path):
    """kill -9 at random moments, half of them while something is written, the first after a checkpoint."""
    out_dir, flags = tmp_path / "cut", ["--max_steps=200", "--eval_interval=3"]
    whole, rng, steps = start("train", tmp_path / "whole", *flags), random.Random(0), []
    for i in range(20):
        hook = KILL.format(target=rng.randint(1, 30) if i else 15)
        finish(start("train", out_dir, *(["--init_from=resume"] if i else flags), hook=hook), -signal.SIGKILL)
        steps.append(load_checkpoint(out_dir)["step"])
    assert steps == sorted(steps) and 20 < steps[-1] < 200
    finish(start("train", out_dir, "--init_from=resume"))
    finish(whole)
    assert_same_runs(tmp_path / "whole", out_dir)


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(start, tmp_path):
    """1 x 4 accumulation steps, 2 x 2, 4 x 1: the same losses and validations, each micro-batch once."""
    for processes in (1, 2, 4):
        out_dir = tmp_path / str(processes)
        hook = "def hook(*key):\n    if len(key) == 2:\n        "
        hook += f"print(key[1], file=open('{out_dir}.txt', 'a'))"
        flags = ["--micro_batch_size=2", "--max_steps=20", "--log_interval=1", "--eval_interval=5"]
        out, _ = finish(start("train", out_dir, *flags, hook=hook, processes=processes))
        assert f"a step is {4 // processes} x {processes} x 2 x 16 tokens" in out
        seen = (tmp_path / f"{processes}.txt").read_text().split()
        assert sorted(int(index) for index in seen) == list(range(80))
        for key, rel in {"loss": 1e-5, "val_loss": 1e-5, "val_se": 1e-4, "grad_norm": 1e-4}.items():
            assert dict(rows(out_dir, key)) == pytest.approx(dict(rows(tmp_path / "1", key)), rel=rel), key


# ---- signals


def test_a_second_ctrl_c_leaves_at_once(start, tmp_path):
    """In the middle of a step that would take ten minutes. ckpt.pt stays as it was."""
    process = start("train", tmp_path / "a", hook=LONG_STEP)
    while "long step" not in process.stdout.readline():
        assert process.poll() is None
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 130)
    assert err == "" and (tmp_path / "a" / "ckpt.pt").read_bytes() == before
    assert load_checkpoint(tmp_path / "a")["step"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_under_torchrun(signum, code, start, tmp_path):
    """torchrun passes them on. Both processes stop at the same step, or one would wait for the other."""
    process = start("train", tmp_path / "a", "--max_steps=99999", processes=2)
    wait_for_step(process, tmp_path / "a", 10)
    process.send_signal(signum)
    process.communicate(timeout=300)
    assert [(tmp_path / f"hooked_0.py.code{rank}").read_text() for rank in range(2)] == [str(code)] * 2
    step = load_checkpoint(tmp_path / "a")["step"]
    assert step >= 10
    finish(start("train", tmp_path / "a", "--init_from=resume", f"--max_steps={step + 5}", processes=2))
    assert load_checkpoint(tmp_path / "a")["step"] == step + 5


@pytest.mark.slow
def test_a_loss_of_one_process_that_is_not_finite_stops_all(start, tmp_path):
    _, err = finish(start("train", tmp_path / "a", hook=NOT_A_NUMBER, processes=2), 1)
    assert err.count("error: step 12 was not made") == 2 and load_checkpoint(tmp_path / "a")["step"] == 0


# ---- two at a time, full disks


def test_a_second_run_into_one_out_dir(start, data_dir, tmp_path, capsys):
    """It gets one line, and the first does not notice."""
    out_dir = tmp_path / "a"
    process = start("train", out_dir, "--max_steps=99999")
    wait_for_step(process, out_dir, 10)
    assert "ckpt.pt exists; continue with" in error_of(capsys, lambda: run(data_dir, out_dir, "--seed=1"))
    err = error_of(capsys, lambda: go("--init_from=resume", f"--out_dir={out_dir}"))
    assert err.startswith(f"error: {out_dir}/log.jsonl is locked by another run") and "; wait, or set" in err
    process.terminate()
    finish(process, 143)
    assert len(rows(out_dir, "config")) == 1 and load_checkpoint(out_dir)["run_config"]["seed"] == 0


def test_disk_full(data_dir, tmp_path, capsys):
    """No file may grow beyond 40 KB: ckpt.pt, which needs more, is named, and stays as it was."""
    run(data_dir, tmp_path, "--max_steps=0")
    before, resume = (tmp_path / "ckpt.pt").read_bytes(), ["--init_from=resume", f"--out_dir={tmp_path}"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        err = error_of(capsys, lambda: go(*resume, "--max_steps=5"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert err.startswith(f"error: cannot write {tmp_path}/") and "; make room, or" in err
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    go(*resume, "--max_steps=5")
    assert load_checkpoint(tmp_path)["step"] == 5 and not list(tmp_path.glob("*.tmp"))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(b) or replace(a, b))
    path = f"{tmp_path}/x"
    write_file(path, lambda file: file.write(b"new"))
    assert calls == [3, path] and open(path).read() == "new"


# ---- hostile input


class Bomb:
    def __reduce__(self):
        return open, ("bang", "w")


@pytest.mark.parametrize("zip", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, zip):
    monkeypatch.chdir(tmp_path)
    state = {"model": {}, "model_config": {}, "optimizer": Bomb()}
    torch.save(state, "evil.pt", _use_new_zipfile_serialization=zip)
    with pytest.raises(ValueError, match="evil.pt is damaged or no checkpoint"):
        MDM.from_checkpoint("evil.pt")
    assert os.listdir(tmp_path) == ["evil.pt"]
