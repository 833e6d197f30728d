"""eval.py's likelihood tasks from the command line: loss, files of items, lm-evaluation-harness.

python -m pytest tests/test_eval_tasks.py
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model

import bench
import eval as eval_module
from eval import encode_pair, score
from prepare_data import PrepareConfig, load_tokenizer, prepare
from sft_gsm8k import SFTConfig, example_batches
from train import TrainConfig, evaluate, load_meta, save_checkpoint, token_batches

BENCH = os.environ.get("BENCH_DIR", ROOT.parent / "shared" / "data" / "bench")
CHOICES = [
    {"context": "Question: Tom has 3 apples", "choices": ["and buys 4 more.", "and 2.", "é"], "gold": 1},
    {"context": "Mia has 2 books", "choices": ["and buys 2 more. How many now?", "eels"], "gold": 0},
    {"context": "", "choices": ["äöüß", "abcdefg"], "gold": 1},
    {"context": "Sam has 5 cards and loses 5. " * 8, "choices": ["4", "How many", "is", "that?"], "gold": 3},
    {"context": "Answer:", "choices": ["<<2+4=6>>", "<<2+4=7>>"], "gold": 0},
] * 3
TARGETS = [{"context": item["context"], "target": item["choices"][item["gold"]]} for item in CHOICES]


@pytest.fixture
def out_dir(data_dir):
    """A folder with a checkpoint of random weights on the built-in problems, and the two files of items beside it."""
    meta = load_meta(data_dir / "arithmetic")
    model = make_model(vocab_size=meta["vocab_size"], block_size=32)
    run = asdict(
        TrainConfig(data_dir=str(data_dir), block_size=32, eval_seqs=40, micro_batch_size=8, batch_size=8)
    )
    checkpoint = {
        "model": model.state_dict(),
        "model_config": vars(model.config),
        "run_config": run,
        "meta": meta,
        "step": 3,
    }
    folder = data_dir.parent / "out"
    folder.mkdir()
    save_checkpoint(folder / "ckpt.pt", checkpoint)
    for name, items in (("choices", CHOICES), ("targets", TARGETS)):
        (data_dir.parent / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def parts_of(out_dir):
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    model = make_model(vocab_size=checkpoint["meta"]["vocab_size"], block_size=32)
    return model, load_tokenizer(checkpoint["meta"]["tokenizer"]), checkpoint


def call(monkeypatch, out_dir, *argv):
    """results.json's new entries, without the times."""
    before = json.loads((out_dir / "results.json").read_text()) if (out_dir / "results.json").exists() else {}
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--out_dir={out_dir}", "--device=cpu", *argv])
    eval_module.main()
    results = json.loads((out_dir / "results.json").read_text())
    new = [
        {k: v for k, v in result.items() if k != "seconds"}
        for name, result in results.items()
        if name not in before
    ]
    return new if len(new) != 1 else new[0]


# ---- loss


def test_loss_agrees_with_training(out_dir, monkeypatch, capsys):
    """With one draw and as many sequences it is train.py's own validation; with more draws it is closer to the same value."""
    model, _, checkpoint = parts_of(out_dir)
    cfg = TrainConfig(**checkpoint["run_config"])
    folder = os.path.join(cfg.data_dir, "arithmetic")
    mean, se = evaluate(cfg, model, token_batches(folder, checkpoint["meta"], cfg))
    one = call(monkeypatch, out_dir, "--task=loss", "--limit=40", "--mc_num=1")
    assert (one["nats_per_token"], one["nats_per_token_se"]) == (
        pytest.approx(mean, rel=1e-6),
        pytest.approx(se, rel=1e-6),
    )
    many = call(monkeypatch, out_dir, "--task=loss", "--limit=40", "--mc_num=16")
    assert abs(many["nats_per_token"] - mean) < 3 * se and many["nats_per_token_se"] < se / 2
    assert many["perplexity_bound"] == pytest.approx(math.exp(many["nats_per_token"]))
    for value in ("perplexity_bound", "bits_per_byte"):  # to first order; d exp(x) = exp(x) dx
        scale = (
            many["perplexity_bound"]
            if value == "perplexity_bound"
            else many["bits_per_byte"] / many["nats_per_token"]
        )
        assert many[f"{value}_se"] == pytest.approx(scale * many["nats_per_token_se"])
    out = capsys.readouterr().out
    value = f"{many['nats_per_token']:.4f} ± {many['nats_per_token_se']:.4f}"
    assert re.search(
        rf"40 items; limit=40, dtype=auto, mc_num=16\n  nats_per_token +{value}\n  perplexity_bound ", out
    )
    # the levels are evenly spread, so the mean over ten equal parts of them is the bound
    parts = [part["nats_per_hidden_token"] for part in many["over_t"]]
    assert len(parts) == 10 and np.mean(parts) == pytest.approx(many["nats_per_token"], rel=0.01)
    assert many["step"] == 3 and len(many["data_sha256"]) > 0


def test_error_of_the_loss_is_the_spread_over_texts(out_dir, monkeypatch):
    """The standard error agrees with what other noise does to the mean, for a given set of texts no more than that."""
    result = call(monkeypatch, out_dir, "--task=loss", "--mc_num=2")
    records = [json.loads(line) for line in open(result["items"])]
    means = np.array([np.mean(r["nll"]) / r["tokens"] for r in records])
    assert result["n"] == len(records) == torch.load(out_dir / "ckpt.pt")["meta"]["tokens"]["val"] // 32
    assert (
        result["nats_per_token"] == pytest.approx(means.mean())
        and 0.5 < result["nats_per_token_se"] / (means.std() / math.sqrt(len(means))) < 1.1
    )
    t = np.sort(np.ravel([r["t"] for r in records]))
    np.testing.assert_allclose(t, (np.arange(len(t)) + 0.5) / len(t))


def test_bits_per_byte(out_dir, monkeypatch):
    """Over the bytes of the text; end-of-text has none."""
    _, tokenizer, checkpoint = parts_of(out_dir)
    result = call(monkeypatch, out_dir, "--task=loss", "--mc_num=1")
    cfg = TrainConfig(**checkpoint["run_config"] | {"micro_batch_size": 1, "eval_seqs": result["n"]})
    get_batch = token_batches(os.path.join(cfg.data_dir, "arithmetic"), checkpoint["meta"], cfg)
    texts = [tokenizer.decode(get_batch("val", row)[0][0].tolist()) for row in range(result["n"])]
    n_bytes = sum(len(text.replace("<|endoftext|>", "").encode()) for text in texts)
    assert result["bits_per_byte"] == pytest.approx(
        result["nats_per_token"] * 32 * result["n"] / n_bytes / math.log(2)
    )


def test_loss_of_a_fine_tuned_model_is_that_of_responses(out_dir, monkeypatch):
    _, _, checkpoint = parts_of(out_dir)
    data_dir = checkpoint["run_config"]["data_dir"]
    cfg = SFTConfig(
        dataset="arithmetic", data_dir=data_dir, block_size=48, eval_seqs=30, micro_batch_size=5, batch_size=5
    )
    model = make_model(vocab_size=checkpoint["meta"]["vocab_size"], block_size=48)
    checkpoint.update(run_config=asdict(cfg), model=model.state_dict(), model_config=vars(model.config))
    save_checkpoint(out_dir / "ckpt.pt", checkpoint)
    get_batch, data = example_batches(os.path.join(data_dir, "arithmetic"), checkpoint["meta"], cfg)
    mean, se = evaluate(cfg, model, get_batch)
    result = call(monkeypatch, out_dir, "--task=loss", "--limit=30", "--mc_num=1")
    assert (result["nats_per_token"], result["nats_per_token_se"]) == (
        pytest.approx(mean, rel=1e-6),
        pytest.approx(se, rel=1e-6),
    )
    text, batches = (
        load_tokenizer(checkpoint["meta"]["tokenizer"]),
        [get_batch("val", index) for index in range(6)],
    )
    responses = [x0[m][x0[m] != text.eot_token].tolist() for batch in batches for x0, m in zip(*batch)]
    n_tokens = sum(int(maskable.sum()) for _, maskable in batches)
    n_bytes = sum(len(text.decode(ids).encode()) for ids in responses)  # of the responses alone
    assert result["bits_per_byte"] == pytest.approx(mean * n_tokens / n_bytes / math.log(2), rel=1e-6)
    assert call(monkeypatch, out_dir, "--task=loss", "--mc_num=1")["n"] == len(data["val"][1])


def test_loss_on_other_data(out_dir, monkeypatch, tmp_path):
    prepare(PrepareConfig(data_dir=str(tmp_path / "other"), num_problems=400, seed=1))
    with pytest.raises(ValueError, match="other.arithmetic has another vocabulary than the checkpoint"):
        call(monkeypatch, out_dir, f"--data={tmp_path / 'other' / 'arithmetic'}")
    with pytest.raises(ValueError, match="data set .*none is not prepared"):
        call(monkeypatch, out_dir, f"--data={tmp_path / 'none'}")


def test_plot(out_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="plot=True needs matplotlib; pip install matplotlib"):
        call(monkeypatch, out_dir, "--task=loss", "--plot=True")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    call(monkeypatch, out_dir, "--task=loss", "--plot=True", "--mc_num=1")
    (picture,) = out_dir.glob("loss-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


# ---- files of items


def log_p(model, tokenizer, context, continuation):
    before, after = encode_pair(tokenizer, context, continuation)
    return -score(model, [(before[-(32 - len(after)) :], after)], "chain_rule")[0]


def test_choices(out_dir, monkeypatch, capsys):
    """acc, acc_norm over characters, acc_bytes over bytes, from each choice scored by itself."""
    model, tokenizer, _ = parts_of(out_dir)
    file = out_dir.parent / "choices.jsonl"
    result = call(monkeypatch, out_dir, f"--task={file}", "--nll_type=chain_rule", "--batch_size=4")
    right = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for item in CHOICES:
        values = np.array(
            [log_p(model, tokenizer, item["context"], " " + choice) for choice in item["choices"]]
        )
        right["acc"].append(values.argmax() == item["gold"])
        right["acc_norm"].append(
            (values / [len(choice) for choice in item["choices"]]).argmax() == item["gold"]
        )
        right["acc_bytes"].append(
            (values / [len(choice.encode()) for choice in item["choices"]]).argmax() == item["gold"]
        )
    for name, values in right.items():
        assert result[name] == np.mean(values)
        assert result[f"{name}_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(15))
    assert result["n"] == 15 and result["contexts_cut"] == 3
    records = [json.loads(line) for line in open(result["items"])]
    assert [r["index"] for r in records] == list(range(15)) and records[0]["context"] == CHOICES[0]["context"]
    assert [r["acc"] for r in records] == right["acc"]
    assert records[0]["log_p"][1] == pytest.approx(
        log_p(model, tokenizer, CHOICES[0]["context"], " and 2."), abs=1e-5
    )
    assert "3 contexts were cut from the left to fit" in capsys.readouterr().out
    wanted = {"limit": None, "dtype": "auto", "nll_type": "chain_rule", "cfg_scale": 0.0, "seed": 0}
    assert result["settings"] == {"task": str(file), "checkpoint": "ckpt.pt", **wanted}


def test_characters_are_not_bytes(out_dir, monkeypatch):
    """log p -30 and -50 over 4 and 7 characters or 8 and 7 bytes: the first is better by either, until bytes are counted."""
    (out_dir.parent / "two.jsonl").write_text(
        json.dumps({"context": "a", "choices": ["äöüß", "abcdefg"], "gold": 0}) + "\n"
    )
    monkeypatch.setattr(eval_module, "score", lambda model, pairs, **options: np.array([40.0, 50.0]))
    result = call(monkeypatch, out_dir, f"--task={out_dir.parent / 'two.jsonl'}")
    assert (result["acc"], result["acc_norm"], result["acc_bytes"]) == (1, 0, 1)
    assert result["acc_se"] is None  # of one item


def test_fields_of_an_item_are_kept(out_dir, monkeypatch):
    """But for those that are ours; and a file may begin with the mark of some editors."""
    text = json.dumps({"context": "a", "choices": ["b", "c"], "gold": 0, "index": 77, "source": "me"})
    (out_dir.parent / "own.jsonl").write_text("\ufeff" + text + "\n" + text + "\n", encoding="utf-8")
    result = call(monkeypatch, out_dir, f"--task={out_dir.parent / 'own.jsonl'}")
    assert [(r["index"], r["source"]) for r in map(json.loads, open(result["items"]))] == [
        (0, "me"),
        (1, "me"),
    ]


def test_targets(out_dir, monkeypatch):
    """Three targets are made what the model itself would write."""
    model, tokenizer, _ = parts_of(out_dir)
    values = [log_p(model, tokenizer, item["context"], " " + item["target"]) for item in TARGETS]
    file = out_dir.parent / "targets.jsonl"
    result = call(monkeypatch, out_dir, f"--task={file}", "--nll_type=chain_rule")
    assert result["perplexity"] == pytest.approx(math.exp(-np.mean(values)), rel=1e-4)
    assert result["perplexity_se"] == pytest.approx(
        result["perplexity"] * np.std(values, ddof=1) / math.sqrt(15), rel=1e-4
    )
    assert result["acc"] == 0
    scales = []

    def fake(model, pairs, cfg_scale, *_):
        scales.append(cfg_scale)
        return np.arange(len(pairs)) % 5 == 0

    monkeypatch.setattr(eval_module, "greedy_matches", fake)
    assert call(monkeypatch, out_dir, f"--task={file}", "--nll_type=mc", "--cfg_scale=0.4")[
        "acc"
    ] == 0.2 and scales == [0.4]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"context": "a", "choices": ["b"]', "line 2: wanted"),
        ('{"context": "a", "choices": ["b", "c"]}', "line 2: wanted"),
        ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "line 2: wanted"),
        ('{"context": "a", "choices": ["b", "c"], "gold": true}', "line 2: wanted"),
        ('{"context": "a", "choices": [], "gold": 0}', "line 2: wanted"),
        ('{"context": "a", "choices": ["b", ""], "gold": 0}', "line 2: wanted"),
        ('{"context": 5, "choices": ["b"], "gold": 0}', "line 2: wanted"),
        ('{"context": "a", "choices": ["\\ud800"], "gold": 0}', "line 2: wanted"),
        ('{"context": "a", "target": "b"}', "line 2: wanted .* the same kind in all lines"),
        ("[1]", "line 2: wanted"),
        ("", "line 2: wanted"),
    ],
)
def test_bad_lines(out_dir, monkeypatch, line, message):
    path = out_dir.parent / "bad.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "gold": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        call(monkeypatch, out_dir, f"--task={path}")


def test_bad_files(out_dir, monkeypatch):
    (out_dir / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="results.json is damaged"):
        eval_module.read_results(out_dir / "results.json")
    (out_dir / "results.json").unlink()
    with pytest.raises(ValueError, match="task file .*none.jsonl not found"):
        call(monkeypatch, out_dir, f"--task={out_dir / 'none.jsonl'}")
    (out_dir / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl holds no items; wanted"):
        call(monkeypatch, out_dir, f"--task={out_dir / 'empty.jsonl'}")
    (out_dir / "long.jsonl").write_text(json.dumps({"context": "a", "target": "b c " * 40}) + "\n")
    with pytest.raises(ValueError, match="a continuation of [0-9]+ tokens exceeds the model's block_size 32"):
        call(monkeypatch, out_dir, f"--task={out_dir / 'long.jsonl'}")


def test_any_batch_and_interrupted(out_dir, monkeypatch, capsys):
    """In rounds of 4, stopped in the third; the rest in rounds of 5: the numbers of one round."""
    file = out_dir.parent / "choices.jsonl"
    whole = call(monkeypatch, out_dir, f"--task={file}", "--batch_tokens=100000")
    os.remove(whole["items"])
    os.remove(out_dir / "results.json")
    score_, calls = eval_module.score, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_(*args, **options)

    monkeypatch.setattr(eval_module, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, out_dir, f"--task={file}", "--batch_size=4")
    assert "interrupted; the same command goes on where it stopped" in capsys.readouterr().out
    assert len(open(whole["items"]).readlines()) == 8
    again = call(monkeypatch, out_dir, f"--task={file}", "--batch_size=5", "--batch_tokens=64")
    assert len(calls) == 5 and again == whole


def test_two_processes_find_the_same(out_dir, monkeypatch):
    files = f"{out_dir.parent / 'choices.jsonl'},{out_dir.parent / 'targets.jsonl'}"
    argv = [f"--task=loss:mc_num=2,{files}", "--batch_size=3", "--limit=14"]
    one = call(monkeypatch, out_dir, *argv)
    records = [[json.loads(line) for line in open(result["items"])] for result in one]
    for result in one:
        os.remove(result["items"])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "eval.py"),
    ]
    done = subprocess.run(
        [*command, f"--out_dir={out_dir}", "--device=cpu", *argv], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    two = list(json.loads((out_dir / "results.json").read_text()).values())
    for a, b, old in zip(one, two, records):
        assert b["processes"] == 2
        for key in [key for key in a if f"{key}_se" in a]:
            assert a[key] == pytest.approx(b[key], rel=1e-6), key
        for old_record, line in zip(old, open(b["items"]), strict=True):
            new = json.loads(line)
            assert new["index"] == old_record["index"]
            key = "nll" if "nll" in new else "log_p"
            np.testing.assert_allclose(new[key], old_record[key], rtol=1e-5)


def test_errors_end_all_processes(out_dir):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "eval.py"),
    ]
    argv = [f"--out_dir={out_dir}", "--device=cpu", f"--task={out_dir / 'none.jsonl'}"]
    done = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "error: task file" in done.stderr


# ---- lm-evaluation-harness


def test_without_the_harness(out_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ValueError,
        match="task 'piqa' is none of loss, gsm8k, sinks, sink_changes, runs, file.jsonl, .* pip install lm-eval",
    ):
        call(monkeypatch, out_dir, "--task=piqa")


YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list: [{metrics}]
"""


def define(folder, name, file, kind, text="{{context}}", target="{{gold}}", more="", metrics="{metric: acc}"):
    (folder / f"{name}.yaml").write_text(
        YAML.format(name=name, file=file, kind=kind, text=text, target=target, more=more, metrics=metrics)
    )


def run_harness(out_dir, *argv):
    env = {**os.environ, "HF_HOME": str(out_dir.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        str(ROOT / "eval.py"),
        f"--out_dir={out_dir}",
        "--device=cpu",
        f"--include_path={out_dir.parent}",
        *argv,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    results = json.loads((out_dir / "results.json").read_text())
    return {result["settings"]["task"]: result for result in results.values()}, done.stdout


CHOICE_METRICS = "{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}"
TARGET = "{{' ' + target}}"


def test_harness_finds_what_we_find(out_dir):
    """The harness's own requests and metrics over the same items; rolling likelihood and generation besides."""
    pytest.importorskip("lm_eval")
    folder = out_dir.parent
    choices, targets = folder / "choices.jsonl", folder / "targets.jsonl"
    define(
        folder,
        "h_choices",
        choices,
        "multiple_choice",
        more='doc_to_choice: "{{choices}}"',
        metrics=CHOICE_METRICS,
    )
    define(
        folder,
        "h_targets",
        targets,
        "loglikelihood",
        target=TARGET,
        metrics="{metric: perplexity}, {metric: acc}",
    )
    define(
        folder,
        "h_rolling",
        targets,
        "loglikelihood_rolling",
        "",
        "{{context}}",
        metrics="{metric: byte_perplexity}",
    )
    more = (
        'generation_kwargs: {until: ["."], max_new_tokens: 5, do_sample: true, temperature: 1.0}\nrepeats: 2'
    )
    define(
        folder,
        "h_generate",
        targets,
        "generate_until",
        target=TARGET,
        more=more,
        metrics="{metric: exact_match}",
    )
    tasks = f"h_choices:seed=3,{choices}:seed=3,h_targets:cfg_scale=0.5,{targets}:cfg_scale=0.5,h_rolling,h_generate"
    results, out = run_harness(out_dir, f"--task={tasks}", "--mc_num=4")
    for metric in ("acc", "acc_norm", "acc_bytes", "acc_se", "acc_norm_se"):
        assert results["h_choices"][metric] == pytest.approx(results[str(choices)][metric]), metric
    assert results["h_choices"]["contexts_cut"] == 12  # choices here, items there
    for metric in ("perplexity", "acc", "contexts_cut"):
        assert results["h_targets"][metric] == pytest.approx(results[str(targets)][metric], rel=1e-5), metric
    records = [json.loads(line) for line in open(next(out_dir.glob("h_rolling-rolling-*.jsonl")))]
    n_bytes = sum(len(item["context"].encode()) for item in TARGETS)
    wanted = math.exp(-sum(record["log_p"] for record in records) / n_bytes)
    assert results["h_rolling"]["byte_perplexity"] == pytest.approx(wanted)
    texts = [json.loads(line)["text"] for line in open(next(out_dir.glob("h_generate-generate-*.jsonl")))]
    assert (
        len(texts) == 30 and not any("." in text for text in texts) and len(set(texts)) > 15
    )  # a repeat is another draw
    assert len({result["data_sha256"] for result in results.values()}) == 6
    assert "|h_choices|" in out and "h_generate" in out  # the harness's tables
    saved = json.loads(next(out_dir.glob("h_choices-????????.json")).read_text())
    assert (
        saved["results"]["h_choices"]["acc,none"] == results["h_choices"]["acc"]
        and len(saved["samples"]["h_choices"]) == 15
    )


@pytest.mark.skipif(not os.path.exists(BENCH), reason="no folder of benchmark items (set BENCH_DIR)")
def test_harness_on_real_items(out_dir):
    pytest.importorskip("lm_eval")
    _, _, checkpoint = parts_of(out_dir)
    model = make_model(vocab_size=checkpoint["meta"]["vocab_size"], block_size=512)
    save_checkpoint(
        out_dir / "ckpt.pt", checkpoint | {"model": model.state_dict(), "model_config": vars(model.config)}
    )
    tasks = []
    for name in ("piqa", "arc_easy", "hellaswag", "lambada"):
        file = f"{BENCH}/{name}.jsonl"
        if name == "lambada":
            define(
                out_dir.parent,
                "my_lambada",
                file,
                "loglikelihood",
                target=TARGET,
                metrics="{metric: perplexity}, {metric: acc}",
            )
        else:
            more = 'doc_to_choice: "{{choices}}"'
            define(out_dir.parent, f"my_{name}", file, "multiple_choice", more=more, metrics=CHOICE_METRICS)
        tasks += [f"my_{name}", file]
    results, _ = run_harness(out_dir, f"--task={','.join(tasks)}", "--mc_num=2", "--limit=25")
    for theirs, ours in zip(tasks[::2], tasks[1::2]):
        for metric in (
            ("acc", "perplexity") if "lambada" in ours else ("acc", "acc_norm", "acc_bytes", "acc_se")
        ):
            assert results[theirs][metric] == pytest.approx(results[ours][metric], rel=1e-5), (theirs, metric)
        assert results[theirs]["n"] == results[ours]["n"] == 25


def test_unknown_harness_task(out_dir, monkeypatch):
    pytest.importorskip("lm_eval")
    with pytest.raises(
        ValueError, match="lm-evaluation-harness has no task 'hellaswagg'; did you mean 'hellaswag'"
    ):
        call(monkeypatch, out_dir, "--task=hellaswagg")
    with pytest.raises(ValueError, match="include_path nowhere is no folder"):
        call(monkeypatch, out_dir, "--task=hellaswag", "--include_path=nowhere")


# ---- bench.py


def test_bench_eval(out_dir, monkeypatch, capsys):
    """The table of a small run: four ways, the first one the yardstick, estimates that agree, and less spread of exact counts."""
    argv = [
        "bench.py",
        "eval",
        f"--data={out_dir.parent / 'choices.jsonl'}",
        f"--out_dir={out_dir}",
        "--mc_num=16",
        "--requests=12",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--n_parts=2", "--n_seeds=40", "--device=cpu"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()[-4:]
    numbers = np.array([[float(number) for number in re.findall(r"(\d+\.\d+)x? *", line)] for line in lines])
    assert numbers.shape == (4, 4) and numbers[0, 1] == 1
    sd, mean = numbers[:, 2], numbers[:, 3]
    assert sd[2] < sd[0] / 2 and sd[1] == pytest.approx(sd[0], rel=0.5)
    np.testing.assert_allclose(mean, mean[0], rtol=0.1)
    with pytest.raises(ValueError, match="eval needs items with choices"):
        monkeypatch.setattr(sys, "argv", ["bench.py", "eval"])
        bench.main()
