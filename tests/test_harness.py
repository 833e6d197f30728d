"""extras/harness.py: lm-evaluation-harness finds what eval.py finds, offline, on tasks of our own."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, save_model

import extras.harness
from eval import EvalConfig, score_item
from extras.harness import Harness
from prepare_data import make_tokenizer
from sample import load_trained

lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
METRICS = {"choices": ["acc", "acc_norm", "acc_bytes"], "targets": ["acc", "perplexity"]}
SETTINGS = {"mc_num": 4, "cfg_scale": 0.5, "seed": 3}
LIMIT = 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights that writes few letters, so that some targets are right; two tasks."""
    path = tmp_path_factory.mktemp("harness")
    model = make_model(3, vocab_size=257, block_size=32)
    model.lm_head.weight.data[~torch.isin(torch.arange(257), torch.tensor(list(b" abc")))] = 0
    save_model(path, model, {"tokenizer": make_tokenizer("bytes")})
    rng, items = np.random.default_rng(1), {"choices": [], "targets": []}
    letters = (rng.choice(list("abcé "), size=size) for size in rng.integers(1, 9, size=100))
    words = ["".join(word).strip() or "a" for word in letters]
    for i in range(LIMIT + 1):
        context = "".join(words[i : i + 1 + i % 7]) if i else "a" * 31  # some are too long, the first by one
        items["choices"].append({"context": context, "choices": words[3 * i : 3 * i + 3], "gold": i % 3})
        items["targets"].append({"context": context, "target": "c "[i % 2]})
    choices = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    target = "{{target if target == ' ' else ' ' + target}}"
    targets = {"output_type": "loglikelihood", "doc_to_target": target}
    for name, task in (("choices", choices), ("targets", targets)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items[name]))
        task |= {"task": name, "dataset_path": "json", "test_split": "test", "doc_to_text": "{{context}}"}
        data = {"data_files": {"test": f"{path}/{name}.jsonl"}, "cache_dir": str(path)}
        task |= {"dataset_kwargs": data, "metric_list": [{"metric": metric} for metric in METRICS[name]]}
        (path / f"{name}.yaml").write_text(json.dumps(task))
    return path, items


@pytest.fixture
def lm(folder):
    return Harness(out_dir=folder[0], device="cpu", steps=8, remasking="random", cfg_scale=0.5)


def requests_of(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def check(results, folder):
    """The harness's metrics are those of eval.score_item. Returns how many contexts of targets are cut."""
    path, items = folder
    model, tokenizer, _ = load_trained(path, torch.device("cpu"))
    for name, metrics in METRICS.items():
        records = [score_item(model, tokenizer, item, EvalConfig(**SETTINGS)) for item in items[name][:LIMIT]]
        wanted = {metric: np.mean([r[metric] for r in records]) for metric in metrics if metric in records[0]}
        assert 0 < wanted["acc"] < 1
        if name == "targets":
            wanted["perplexity"] = math.exp(-np.mean([record["log_p"] for record in records]))
        assert {metric: results[name][f"{metric},none"] for metric in metrics} == pytest.approx(wanted)
    return sum(record["cut"] > 0 for record in records)


def test_the_harness_finds_what_eval_finds(folder, capsys):
    lm = Harness(out_dir=folder[0], device="cpu", **SETTINGS)
    manager = tasks.TaskManager(include_path=str(folder[0]), include_defaults=False)
    options = {"task_manager": manager, "limit": LIMIT, "bootstrap_iters": 0}
    results = lm_eval.simple_evaluate(lm, tasks=["targets"], **options)["results"]
    results |= lm_eval.simple_evaluate(lm, tasks=["choices"], **options)["results"]
    n_cut = check(results, folder)
    assert 0 < n_cut < LIMIT and f"{n_cut} of {LIMIT} contexts are cut on the left" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_command_line(folder, tmp_path, processes):
    """Two processes share the 13 items of each task; the one with fewer repeats its last requests."""
    launcher = "torch.distributed.run --standalone --nproc_per_node=2 -m" if processes == 2 else ""
    path = str(folder[0])
    settings = ",".join(f"{key}={value}" for key, value in SETTINGS.items())
    command = [sys.executable, "-m", *launcher.split(), "extras.harness", "--model", "mdm", "--device", "cpu"]
    command += ["--model_args", f"out_dir={path},{settings}", "--tasks", "choices,targets"]
    command += ["--limit", str(LIMIT), "--include_path", path, "--output_path", str(tmp_path)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("**/results_*.json")
    check(json.loads(file.read_text())["results"], folder)
    assert done.stdout.count("|choices|") == 1
    n_requests = [int(n) for n in re.findall(r"of (\d+) contexts", done.stdout)]
    assert n_requests == ([13 * 3 + 13] if processes == 1 else [7 * 3 + 7] * 2)


def test_rolling_windows_hold_every_token_once(lm, monkeypatch):
    """Of 70 tokens and block_size 32: 31 behind end-of-text, 31 behind the token before, 8 behind 24."""
    pairs = []
    fake = lambda _, context, target, cfg: pairs.append((context, target)) or -len(target)  # noqa: E731
    monkeypatch.setattr(extras.harness, "log_likelihood", fake)
    text = "".join(chr(33 + i) for i in range(70))
    assert lm.loglikelihood_rolling(requests_of((text,), ("",))) == [-70, 0]
    ids = [256, *range(33, 103)]
    assert pairs == [(ids[:1], ids[1:32]), (ids[31:32], ids[32:63]), (ids[39:63], ids[63:])]


def fake_generate(text, seen):
    """A generate that writes text, end-of-text and more, and notes in seen what it was given."""

    def fake(model, x, eot_id, **options):
        seen.append((x[0].tolist(), options))
        prompt, ids = x[x != 257].tolist(), [*text.encode(), *[eot_id, 97] * 16]
        return torch.tensor([[*prompt, *ids[: x.numel() - len(prompt)]]]), None

    return fake


def test_text_ends_at_end_of_text_or_the_first_stop(lm, monkeypatch):
    monkeypatch.setattr(extras.harness, "generate", fake_generate("one. two; three", []))
    ends = [([], "one. two; three"), ([""], "one. two; three"), ("; ", "one. two")]
    ends += [(["#", ".", ";"], "one"), ([";", "."], "one")]
    texts = lm.generate_until(requests_of(*[("ab", {"until": until}) for until, _ in ends]))
    assert texts == [text for _, text in ends]


def test_what_generate_gets(lm, monkeypatch, capsys):
    """block_size 32: a long context leaves the text what it asks for, at most half; a short one the rest."""
    seen, ids = [], list(range(33, 83))
    monkeypatch.setattr(extras.harness, "generate", fake_generate("", seen))
    contexts = [bytes(ids).decode(), bytes(ids).decode(), "abc", ""]
    args = [(context, {"max_gen_toks": n}) for context, n in zip(contexts, (5, 99, 99, 7))]
    args[0][1]["temperature"] = 0.3
    args[1][1].update(temperature=0.3, do_sample=False)
    assert lm.generate_until(requests_of(*args)) == [""] * 4
    assert capsys.readouterr().out == "2 of 4 contexts were cut on the left\n"
    prompts = [ids[-27:] + [257] * 5, ids[-16:] + [257] * 16, [97, 98, 99] + [257] * 29, [256] + [257] * 7]
    assert [row for row, _ in seen] == prompts
    assert [options["temperature"] for _, options in seen] == [0.3, 0, 0, 0]
    wanted = {"steps": 8, "remasking": "random", "threshold": None, "cfg_scale": 0.5}
    assert wanted.items() <= seen[0][1].items()


def test_a_text_follows_from_its_request_alone(lm):
    """Not from the other requests. But equal ones, at a temperature, are different draws."""
    a, b = (("ab", {"temperature": 1.0}), ("cab", {"temperature": 1.0, "do_sample": True}))
    first, second, third = lm.generate_until(requests_of(a, a, b))
    assert lm.generate_until(requests_of(b, a)) == [third, first] and first != second


def test_finished_requests_go_to_the_cache_at_once(lm):
    """So that --use_cache continues an interrupted evaluation."""
    seen, wanted = [], []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *entry: seen.append(entry))
    for kind, args in ("loglikelihood", "ab"), ("loglikelihood_rolling", "a"), ("generate_until", ("a", {})):
        wanted += [(kind, args, result) for result in getattr(lm, kind)(requests_of(args))]
    assert seen == wanted and len(seen) == 3


def test_model_args(folder):
    """They go before the harness's options, whose defaults (1, cuda:0) count as not set."""
    args = {"out_dir": folder[0], "mc_num": 2}
    defaults = {"batch_size": 1, "device": "cuda:0", "max_batch_size": None}
    cfg = Harness.create_from_arg_obj(args | {"device": "cpu"}, defaults).cfg
    assert (cfg.batch_size, cfg.device, cfg.mc_num) == (64, "cpu", 2)
    options = {"batch_size": 4, "max_batch_size": 8, "device": "cpu"}
    assert Harness.create_from_arg_obj(args | {"trust_remote_code": True}, options).cfg.batch_size == 4
    for key, message in {"mcnum": "did you mean --mc_num", "limit": "limit is no model_arg"}.items():
        with pytest.raises(ValueError, match=message):
            Harness(**args, **{key: 2})


def test_missing_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "extras.harness")
    with pytest.raises(ValueError, match="pip install lm-eval"):
        runpy.run_module("extras.harness")["main"]()
