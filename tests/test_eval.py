"""eval.py: its three tasks, and results that do not depend on how the work is cut or interrupted."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from decimal import Decimal
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, save_model

import configurator
import eval as eval_module
import sft_gsm8k
import train
from eval import EvalConfig, encode_item, encode_pair, final_number, log_likelihood, read_items, read_problems
from prepare_data import EOT, PrepareConfig, load_tokenizer, make_tokenizer, prepare
from sample import load_trained

CHOICES = [
    {"context": "Question: Tom has 3 apples", "choices": ["and buys 4 more.", "and 2.", "é"], "gold": 1},
    {"context": "Mia has 2 books", "choices": ["and buys 2 more. How many now?", "eels"], "gold": 0},
    {"context": "", "choices": ["ä" * 12, "abc"], "gold": 0},
    {"context": "Sam has 5 cards and loses 5. " * 8, "choices": ["4", "How many", "is", "that?"], "gold": 3},
]
PROBLEMS = [(f"What is {i} + 7?", str(i + 7)) for i in range(10, 30)]
GSM8K = ["--task=gsm8k", "--steps=6", "--temperature=0.7"]  # where a model of random weights answers
LOSS = ["--task=loss", "--mc_num=1"]


def write_problems(path, problems):
    path.write_text("".join(f"{question}||so #### {gold}\n" for question, gold in problems))
    return f"--data={path}"


def write_items(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return f"--task={path}"


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def records_of(folder, name):
    lines = [line for path in folder.glob(f"{name}.*.jsonl") for line in path.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda record: record["index"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The built-in problems, prepared, with PROBLEMS to test."""
    folder = tmp_path_factory.mktemp("data")
    prepare(PrepareConfig(data_dir=str(folder), num_problems=300))
    write_problems(folder / "arithmetic" / "test.txt", PROBLEMS)
    return folder


@pytest.fixture
def out_dir(data, tmp_path):
    """A checkpoint of random weights."""
    meta = train.load_meta(data / "arithmetic")
    model = make_model(vocab_size=meta["vocab_size"], block_size=40)
    run = train.TrainConfig(data_dir=str(data), block_size=40, micro_batch_size=5)
    return save_model(tmp_path, model, meta, **asdict(run))


@pytest.fixture
def evaluate(out_dir, monkeypatch):
    """Runs eval.py on the checkpoint. Returns the last entry of results.json, and its records."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", f"--out_dir={out_dir}", "--device=cpu", *flags])
        eval_module.main()
        name, result = list(results_of(out_dir).items())[-1]
        return result, records_of(out_dir, name)

    return run


# ---- GSM8K

ANSWERS = """
#### 18 = 18          #### 1,234 = 1234    #### -5 = -5           #### 2.50 = 2.5      #### .75 = 0.75
#### 18. = 18         #### 007 = 7         #### 12 apples = 12    #### 3 #### 4 = 3    is 9. #### 9 = 9
it is 18 = None       #### $18 = None      ####18 = None          #### none = None     #### 1.2.3 = None
#### -, = None        ####  = None"""


def test_answers_are_read_as_openai_reads_them():
    """But they compare spellings, and we compare numbers."""
    for text, number in re.findall(r"(\S.*?) = (\S+)", ANSWERS):
        assert final_number(text) == (None if number == "None" else Decimal(number)), text
    assert final_number("") is None and final_number(None) is None


class Oracle(torch.nn.Module):
    """Ends a row as endings says, {tokens it begins with: tokens that follow}; surer the further right."""

    def __init__(self, config, endings, eot_id):
        super().__init__()
        self.config, self.endings, self.eot_id = config, endings, eot_id
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def trunk(self, x):
        logits, T = torch.zeros(*x.shape, self.config.vocab_size), x.size(1)
        for row, tokens in enumerate(x.tolist()):
            begun = max((key for key in self.endings if tokens[: len(key)] == [*key]), key=len)
            ids = [*begun, *self.endings[begun]] + [self.eot_id] * T
            logits[row, range(T), ids[:T]] = 9 + torch.arange(T) / 10
        return logits

    def head(self, x):
        return x


@pytest.fixture
def oracle(out_dir, monkeypatch):
    """Knows the answers to all problems but 3 and 8, to which it adds 1, and 13, to which it gives none."""
    model, tokenizer, checkpoint = load_trained(out_dir, "cpu")
    endings = {}
    for i, (question, gold) in enumerate(PROBLEMS):
        answer = "" if i == 13 else f" #### {int(gold) + (i in (3, 8))}"
        texts = f"Question: {question}", f" Answer: <<{i + 10}+7>>", answer
        question, thoughts, answer = map(tokenizer.encode_ordinary, texts)
        endings |= {tuple(question): thoughts, tuple(question + thoughts): answer}
    oracle = Oracle(model.config, endings, tokenizer.eot_token)
    monkeypatch.setattr(eval_module, "load_trained", lambda path, device: (oracle, tokenizer, checkpoint))
    return oracle


def test_accuracy_of_an_oracle(oracle, evaluate):
    result, records = evaluate("--task=gsm8k", "--batch_size=8")
    assert (result["acc"], result["n"], result["wrong"], result["wrong_and_empty"]) == (0.85, 20, 3, 1)
    assert result["acc_se"] == pytest.approx(math.sqrt(0.85 * 0.15 / 19))
    assert [record["index"] for record in records if not record["acc"]] == [3, 8, 13]
    texts = {"question": "What is 13 + 7?", "gold": "20", "thoughts": "Answer: <<13+7>>", "answer": "#### 21"}
    # one token a forward pass: what the question leaves of 40 tokens, and then what the thoughts leave
    n_question, n_both = list(map(len, oracle.endings))[6:8]
    assert records[3] == {"index": 3, **texts, "acc": False, "forward_passes": 80 - n_question - n_both}
    assert result["forward_passes"] == np.mean([record["forward_passes"] for record in records])


def test_no_room(oracle, evaluate):
    """For thoughts: the question is not asked, and counts apart. For an answer: that is wrong and empty."""
    n_question, n_both = list(map(len, oracle.endings))[:2]
    for length, thoughts in ((n_question, None), (n_both, "Answer: <<10+7>>")):
        result, (record,) = evaluate("--task=gsm8k", f"--length={length}", "--limit=1")
        assert (record["thoughts"], record["answer"]) == (thoughts, None)
        asked = thoughts is not None
        assert [result[key] for key in ("n", "wrong_and_empty", "no_room")] == [asked, asked, not asked]
        assert result["acc"] == 0 if asked else math.isnan(result["acc"])


def test_every_option_changes_the_answers(out_dir, evaluate):
    """And no result takes another's place."""
    _, plain = evaluate(*GSM8K, "--limit=3")
    flags = "steps=5 length=38 temperature=1 cfg_scale=2 remasking=random threshold=0.01 seed=1 limit=2"
    for flag in flags.split() + ["dtype=bfloat16"]:
        assert evaluate(*GSM8K, "--limit=3", f"--{flag}")[1] != plain, flag
    assert len(results_of(out_dir)) == 10


def test_problems_are_read(tmp_path, capsys):
    answers = "1,000 many -2.50 2/5 3:30 1.5.2 7apples 1-2 5|4".split()
    rows = [f"q{i}||t #### {answer.replace('|', ' and ')}\n" for i, answer in enumerate(answers)]
    path = tmp_path / "a.txt"
    path.write_text("".join(rows) + "no problem\n" + rows[0] * 100)
    numbers = [("q0", "1000"), ("q2", "-2.50"), ("q6", "7")]
    assert read_problems(str(path)) == numbers + [("q0", "1000")] * 100
    out = capsys.readouterr().out
    assert "1 of 110 rows do not fit" in out and "left out 6 problems whose answer is no number" in out


def test_of_a_prepared_folder_the_test_problems_are_read(data, tmp_path):
    """Also where it was moved to."""
    assert read_problems(str(data / "arithmetic")) == PROBLEMS
    moved = shutil.copytree(data / "arithmetic", tmp_path / "moved")
    write_problems(moved / "test.txt", PROBLEMS[:3])
    assert read_problems(str(moved)) == PROBLEMS[:3]
    meta = json.loads((moved / "meta.json").read_text())
    meta["settings"]["test_source"] = None
    (moved / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="moved has no test problems"):
        read_problems(str(moved))


# ---- interrupted, repeated, in parallel


def test_interrupted_equals_uninterrupted(out_dir, evaluate, monkeypatch, capsys):
    """Two processes got so far: item 6 is there twice, and each was ended in the middle of a line."""
    _, whole = evaluate(*GSM8K)
    assert "items are in" not in capsys.readouterr().out
    (path,) = out_dir.glob("gsm8k-*.0.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:9:2]) + lines[1][:-9])
    path.with_name(path.name.replace(".0.", ".1.")).write_text("".join(lines[3:7:3]) + lines[9][:20])
    spy = mock.Mock(wraps=eval_module.answer_problems)
    monkeypatch.setattr(eval_module, "answer_problems", spy)
    for n_done in (6, 20):  # and called again when all is done
        result, records = evaluate(*GSM8K, "--batch_size=5")
        assert result["n"] == 20 and {record["index"]: record for record in records} == dict(enumerate(whole))
        assert f"{n_done} of 20 items are in {str(path)[:-8]}.*.jsonl" in capsys.readouterr().out
    measured = [index for call in spy.call_args_list for index in call.args[2]]
    assert measured == [1, 5, 7, *range(9, 20)]


def test_two_processes_and_any_batch_size_find_the_same(out_dir, evaluate):
    """All three tasks, of which 2 of 7 problems are there already."""
    targets = write_items(out_dir / "targets.jsonl", [{"context": q, "target": a} for q, a in PROBLEMS[:5]])
    tasks = [[*GSM8K, "--limit=7"], [targets, "--mc_num=4"], [*LOSS, "--limit=22"]]
    wanted = [evaluate(*flags) for flags in tasks]
    for path in [*out_dir.glob("*-*.jsonl"), out_dir / "results.json"]:
        lines = path.read_text().splitlines(keepends=True)
        path.unlink()
        if path.name.startswith("gsm8k"):
            path.write_text("".join(lines[:2]))
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport eval\nfor flags in {tasks}:\n"
    code += f"    sys.argv = ['eval.py', '--out_dir={out_dir}', '--device=cpu', '--batch_size=2', *flags]\n"
    (out_dir / "three.py").write_text(code + "    eval.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(out_dir / "three.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for (result, records), (name, again) in zip(wanted, results_of(out_dir).items(), strict=True):
        for key in result.keys() - {"settings", "commit", "torch"}:
            assert again[key] == pytest.approx(result[key], rel=1e-5), (name, key)
        if name.startswith("gsm8k"):
            assert records_of(out_dir, name) == records


def test_second_evaluation_into_a_folder_is_told_so(out_dir, evaluate, monkeypatch):
    """It has another task, starts while the first one works, and changes nothing."""
    answer_problems, second = eval_module.answer_problems, []

    def while_working(*args):
        command = [sys.executable, str(ROOT / "eval.py"), *sys.argv[1:], "--task=loss", "--limit=2"]
        second.append(subprocess.run(command, capture_output=True, text=True, timeout=300))
        return answer_problems(*args)

    monkeypatch.setattr(eval_module, "answer_problems", while_working)
    result, records = evaluate(*GSM8K)
    assert second[0].returncode == 2 and "is locked by another run" in second[0].stderr
    assert result["n"] == len(records) == 20 and len(results_of(out_dir)) == 1


def test_problems_are_identified_by_question_and_gold(out_dir, oracle, evaluate):
    """With the oracle's wrong answer to problem 3 as its gold, that answer is right."""
    changed = [(question, "21" if i == 3 else gold) for i, (question, gold) in enumerate(PROBLEMS)]
    for problems, acc in ((PROBLEMS, 0.85), (changed, 0.9)):
        flag = write_problems(out_dir / "problems.txt", problems)
        assert evaluate("--task=gsm8k", flag)[0]["acc"] == acc


def test_results_are_kept_with_their_settings(out_dir, evaluate):
    os.link(out_dir / "ckpt.pt", out_dir / "best.pt")
    loss, _ = evaluate("--task=loss", "--limit=2", "--seed=5")
    best, _ = evaluate(write_items(out_dir / "c.jsonl", CHOICES), f"--out_dir={out_dir / 'best.pt'}")
    assert list(results_of(out_dir).values()) == [loss, best]
    assert loss["settings"] == asdict(EvalConfig(out_dir=str(out_dir), device="cpu", limit=2, seed=5))
    assert best["settings"]["out_dir"].endswith("best.pt") and (loss["step"], best["n"]) == (3, 4)


def test_results_elsewhere(out_dir, evaluate, monkeypatch):
    """And of a checkpoint in the current folder."""
    monkeypatch.chdir(out_dir)
    for where, folder in (("--out_dir=ckpt.pt", "."), ("--results=elsewhere", "elsewhere")):
        evaluate(*LOSS, "--limit=4", where)
        assert len(results_of(out_dir)) == len(results_of(out_dir / folder)) == 1


# ---- loss


@pytest.mark.parametrize("script", [train, sft_gsm8k])
def test_loss_agrees_with_training(data, out_dir, evaluate, monkeypatch, script):
    """With one draw and as many sequences. No limit: as many as the tokens fill, or all examples."""
    (out_dir / "ckpt.pt").unlink()
    flags = ["--dataset=arithmetic", f"--data_dir={data}", f"--out_dir={out_dir}", "--device=cpu"]
    flags += ["--init_from=scratch", "--n_layer=1", "--n_embd=16", "--block_size=48", "--eval_seqs=30"]
    flags += ["--max_steps=3", "--batch_size=8", "--micro_batch_size=8"]
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    script.main()
    log = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    row = [row for row in log if "val_loss" in row][-1]
    checkpoint = torch.load(out_dir / "ckpt.pt")
    checkpoint["run_config"]["eval_seqs"] = 7  # has no influence; --limit has
    torch.save(checkpoint, out_dir / "ckpt.pt")
    result, _ = evaluate(*LOSS, "--limit=30")
    assert result["nats_per_token"] == pytest.approx(row["val_loss"], rel=1e-6)
    assert result["nats_per_token_se"] == pytest.approx(row["val_se"], rel=1e-6)
    assert result["perplexity_bound"] == pytest.approx(math.exp(result["nats_per_token"]))
    many, _ = evaluate("--task=loss", "--mc_num=9", "--limit=30")
    assert abs(many["nats_per_token"] - row["val_loss"]) < 3 * row["val_se"]
    assert many["nats_per_token_se"] < row["val_se"] * 0.7
    n_tokens = train.load_meta(data / "arithmetic")["tokens"]["val"]
    n_problems = len(np.load(data / "arithmetic" / "val_cuts.npy"))
    assert evaluate(*LOSS)[0]["n"] == (n_tokens // 48 if script is train else 2 * n_problems)


def test_loss_on_other_data(data, evaluate, tmp_path):
    """Half of the validation set is measured. Another vocabulary, be it of the same size, is refused."""
    other = tmp_path / "other"
    shutil.copytree(data / "arithmetic", other)
    tokens, meta = np.fromfile(other / "val.bin", np.uint16), json.loads((other / "meta.json").read_text())
    n = meta["tokens"]["val"] = len(tokens) // 2
    tokens[:n].tofile(other / "val.bin")
    (other / "meta.json").write_text(json.dumps(meta))
    assert evaluate(*LOSS, f"--data={other}")[0]["n"] == n // 40
    meta["tokenizer"]["words"][-2:] = meta["tokenizer"]["words"][:-3:-1]
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="other has another vocabulary than the checkpoint"):
        evaluate(*LOSS, f"--data={other}")


# ---- files of items


def chain_rule(out_dir, context, texts):
    """log p of each text behind the context, from functions that test_likelihood.py checks."""
    model, tokenizer, _ = load_trained(out_dir, "cpu")
    pairs = [encode_pair(tokenizer, context.rstrip(" "), " " + text, 40)[:2] for text in texts]
    return np.array([log_likelihood(model, *pair, EvalConfig(nll_type="chain_rule")) for pair in pairs])


def test_choices(out_dir, evaluate):
    """acc by log p, acc_norm by log p over characters, acc_bytes over bytes."""
    result, records = evaluate(write_items(out_dir / "c.jsonl", CHOICES), "--nll_type=chain_rule")
    right = []
    for item, record in zip(CHOICES, records, strict=True):
        log_p = chain_rule(out_dir, item["context"], item["choices"])
        assert record["log_p"] == pytest.approx(log_p) and record["context"] == item["context"]
        sizes = 1, [len(text) for text in item["choices"]], [len(text.encode()) for text in item["choices"]]
        right.append([np.argmax(log_p / size) == item["gold"] for size in sizes])
    for name, values in zip(("acc", "acc_norm", "acc_bytes"), np.transpose(right)):
        assert [record[name] for record in records] == values.tolist() and result[name] == np.mean(values)
        assert result[f"{name}_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))
    assert result["n"] == 4 and result["contexts_cut"] == 1


def test_characters_are_not_bytes(out_dir, monkeypatch):
    """-10 for 4 characters of 2 bytes, -6 for 3 of one. The blank before a text does not count."""
    model, tokenizer, _ = load_trained(out_dir, "cpu")
    log_p = iter([-10.0, -6.0])
    monkeypatch.setattr(eval_module, "log_likelihood", lambda *args: next(log_p))
    item = {"context": "a", "choices": [" " + "ä" * 4, "abc"], "gold": 0}
    record = eval_module.score_item(model, tokenizer, item, EvalConfig())
    assert (record["acc"], record["acc_norm"], record["acc_bytes"]) == (False, False, True)


def test_targets(out_dir, evaluate):
    """The model always writes spaces, so one target is what it would write."""
    checkpoint = torch.load(out_dir / "ckpt.pt")
    checkpoint["model"]["wte.weight"][:, 0] = 99.0
    checkpoint["model"]["lm_head.weight"][32, 0] = 9.0
    torch.save(checkpoint, out_dir / "ckpt.pt")
    items = [{"context": item["context"], "target": item["choices"][0]} for item in CHOICES]
    items += [{"context": "Tom ", "target": "   "}]
    result, records = evaluate(write_items(out_dir / "t.jsonl", items), "--nll_type=chain_rule")
    log_p = [chain_rule(out_dir, item["context"], [item["target"]])[0] for item in items]
    assert [record["acc"] for record in records] == [False] * 4 + [True] and result["acc"] == 0.2
    assert [record["log_p"] for record in records] == pytest.approx(log_p)
    assert result["log_p"] == pytest.approx(np.mean(log_p))
    assert result["log_p_se"] == pytest.approx(np.std(log_p, ddof=1) / math.sqrt(5))


BLANKS = [("Tom has", "3 apples"), ("Tom has ", "3 apples"), ("Tom has", " 3 apples")]
BLANKS += [("Tom has ", " 3 apples"), ("Tom has\n", "3 apples"), ("", "3 apples")]


def test_one_blank_between_context_and_text():
    """Not a second one, on either side, nor one behind a new line; or what --delimiter says."""
    tokenizer, joined = load_tokenizer(make_tokenizer("bytes")), []
    for context, text in BLANKS:
        (target,) = encode_item(tokenizer, {"context": context, "target": text}, " ", 99)
        joined.append(tokenizer.decode(target[0] + target[1]).removeprefix(EOT))
    one = "Tom has 3 apples"
    assert joined == [one, one, one, "Tom has  3 apples", "Tom has\n3 apples", " 3 apples"]
    ((context, target, _),) = encode_item(tokenizer, {"context": "東", "target": "京"}, "", 99)
    assert tokenizer.decode(context + target) == "東京"


BAD_LINES = """
{"context": "a", "choices": ["b", "c"]}
{"context": "a", "choices": ["b", "c"], "gold": 2}
{"context": "a", "choices": ["b", ""], "gold": 0}
{"context": "a", "choices": ["b", 5], "gold": 0}
{"context": "a", "choices": "bc", "gold": 0}
{"context": "a", "target": "not the kind of the line before"}
[1]"""


@pytest.mark.parametrize("line", BAD_LINES.split("\n")[1:])
def test_bad_lines_are_named(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(json.dumps(CHOICES[0]) + f"\n{line}\n")
    with pytest.raises(ValueError, match='bad.jsonl, line 2: wanted {"context": ..., "choices"'):
        read_items(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="bad.jsonl is empty; wanted"):
        read_items(str(tmp_path / "bad.jsonl"))


def test_a_text_that_is_too_long_is_told_before_the_work(out_dir, evaluate):
    task = write_items(out_dir / "c.jsonl", [*CHOICES, {"context": "a", "choices": ["c " * 40], "gold": 0}])
    with pytest.raises(ValueError, match="a continuation of [0-9]+ tokens exceeds block_size 40"):
        evaluate(task)
    assert not list(out_dir.glob("c-*"))


def test_bad_options_are_refused():
    for flag in "limit=0 length=0 batch_size=0 nll_type=left mc_masking=fair task=piqa".split():
        with pytest.raises(ValueError, match=flag.split("=")[0]):
            configurator.parse(EvalConfig, [f"--{flag}"])
