"""eval.py: the answer rule, tasks and their settings, results that do not depend on how the work is cut, stopped or spread.

python -m pytest tests/test_eval.py
"""

import json
import re
import subprocess
import sys
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_model

import configurator
import eval as eval_module
from eval import EvalConfig, final_number, plan, read_problems, settings_of
from prepare_data import PrepareConfig, load_tokenizer, prepare
from train import load_meta, save_checkpoint


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 18", "18"),
        ("He makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### 2.50", "2.5"),
        ("#### .75", "0.75"),
        ("#### 18.", "18"),  # the rule takes a full stop with it
        ("#### 007", "7"),
        ("#### $18", None),  # as OpenAI's grader: no number stands where it must
        ("####18", None),
        ("the answer is 18", None),
        ("#### none", None),
        ("#### 1.2.3", None),
        ("#### -,", None),
        ("#### 3 #### 4", "3"),  # the first of two, as OpenAI's grader
        ("#### 12 apples", "12"),
        ("", None),
    ],
)
def test_answers_are_read_as_openai_reads_them(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


class Oracle(torch.nn.Module):
    """Completes any problem that it knows. Surer the further right: the filling comes first, and thoughts are whole only when
    their row is complete, so that whole thoughts in an open row tell it that the answer is asked for."""

    def __init__(self, problems, tokenizer, block_size):
        super().__init__()
        self.config = SimpleNamespace(mask_id=257, block_size=block_size)
        self.lm_head = torch.nn.Linear(1, 1)
        self.device, self.sink_keys_values = torch.device("cpu"), lambda: None
        parts = [[tokenizer.encode_ordinary(text) for text in problem] for problem in problems]
        self.prompts = [len(question + thoughts) for question, thoughts, _ in parts]
        fill = lambda ids: torch.tensor(ids + [256] * (block_size - len(ids)))  # noqa: E731
        self.thoughts = [fill(question + thoughts) for question, thoughts, _ in parts]
        self.answers = [fill(sum(problem, [])) for problem in parts]
        self.n_rows = []

    def forward(self, x, only, **where):
        self.n_rows.append(len(x))
        logits = torch.zeros(*x.shape, 257)
        for row, tokens in enumerate(x):
            for i, length in enumerate(self.prompts):
                visible = tokens[:length] != 257
                if torch.equal(tokens[:length][visible], self.thoughts[i][:length][visible]):
                    text = (self.answers[i] if visible.all() else self.thoughts[i])[: len(tokens)]
                    logits[row, torch.arange(len(text)), text] = torch.arange(len(text)) / 10.0 + 9
                    break
        return logits.flatten(0, 1)[only]


def problem(i, result):
    return f"Question: What is {i} + 7?", f" Answer: <<{i}+7={result}>>", f" #### {result}"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """20 problems of which the oracle knows the right answer to all but numbers 3, 8 and 13, to which it adds 1. The checkpoint
    is there for its tokenizer."""
    lines = [f"What is {i} + 7?||<<{i}+7={i + 7}>> #### {i + 7}" for i in range(10, 30)]
    (tmp_path / "test.txt").write_text("\n".join(lines))
    prepare(
        PrepareConfig(
            name="gsm8k", tokenizer="bytes", source=str(tmp_path / "test.txt"), data_dir=str(tmp_path)
        )
    )
    meta = load_meta(tmp_path / "gsm8k")
    model = make_model(vocab_size=257, block_size=64)
    checkpoint = {"model": model.state_dict(), "model_config": vars(model.config), "meta": meta, "step": 7}
    (tmp_path / "out").mkdir()
    save_checkpoint(tmp_path / "out" / "ckpt.pt", {**checkpoint, "run_config": {"data_dir": str(tmp_path)}})
    tokenizer = load_tokenizer(meta["tokenizer"])
    oracle = Oracle([problem(i, i + 7 + (i in (13, 18, 23))) for i in range(10, 30)], tokenizer, 64)
    monkeypatch.setattr(
        eval_module, "load_trained", lambda out_dir, name, device: (oracle, tokenizer, checkpoint_of(out_dir))
    )
    return tmp_path / "out", oracle


def checkpoint_of(out_dir):
    return torch.load(f"{out_dir}/ckpt.pt", weights_only=True)


def call(monkeypatch, out_dir, *flags):
    data = f"--data={out_dir.parent / 'test.txt'}"
    monkeypatch.setattr(
        sys, "argv", ["eval.py", "--task=gsm8k", f"--out_dir={out_dir}", "--device=cpu", data, *flags]
    )
    eval_module.main()
    results = json.loads((out_dir / "results.json").read_text())
    name = list(results)[-1]
    return results[name], (out_dir / f"{name}.jsonl").read_text()


def records_of(lines):
    """Without the time they took."""
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in lines.splitlines()
    ]


def test_accuracy_of_an_oracle(asked, monkeypatch, capsys):
    out_dir, oracle = asked
    result, lines = call(monkeypatch, out_dir, "--batch_size=8")
    assert (result["accuracy"], result["n"], result["right"]) == (0.85, 20, 17)
    assert result["accuracy_se"] == pytest.approx((0.85 * 0.15 / 20) ** 0.5)
    records = [json.loads(line) for line in lines.splitlines()]
    assert [r["index"] for r in records if not r["correct"]] == [3, 8, 13]
    wanted = {
        "question": "What is 13 + 7?",
        "thoughts": "Answer: <<13+7=21>>",
        "answer": "#### 21",
        "gold": "20",
    }
    rest = {key: records[3][key] for key in ("forward_passes", "seconds")}
    assert records[3] == {"index": 3, **wanted, "correct": False, **rest} and rest["seconds"] > 0
    # one token a forward pass: 64 - 25 of the prompt; then those that thoughts (20) and answer (8) leave
    assert sum(oracle.n_rows) == result["forward_passes"] == sum(r["forward_passes"] for r in records)
    assert records[3]["forward_passes"] == (64 - 25) + (64 - 25 - 20)
    out = capsys.readouterr().out
    assert re.search(
        r"accuracy 85.0% ± 8.0% \(standard error\): 17 of 20 right; 58.0 forward passes a problem; [\d.]+ s\n",
        out,
    )
    assert result["settings"]["steps"] == 256 and result["step"] == 7
    assert (
        len(result["weights_sha256"]) == len(result["data_sha256"]) == 64
        and result["torch"] == torch.__version__
    )
    assert result["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", result["commit"])


def test_interrupted_equals_uninterrupted(asked, monkeypatch, capsys):
    """Stopped after two batches of three, with half a line in the file besides."""
    out_dir, oracle = asked
    whole, lines = call(monkeypatch, out_dir, "--batch_size=20")
    for path in out_dir.glob("gsm8k-*"):
        path.unlink()
    solve, calls = eval_module.solve, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(eval_module, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, out_dir, "--batch_size=3")
    assert "interrupted; the same command goes on where it stopped" in capsys.readouterr().out
    (path,) = out_dir.glob("gsm8k-*")
    assert records_of(path.read_text()) == records_of(lines)[:6]
    with open(path, "a") as file:
        file.write('{"index": 6, "ques')
    monkeypatch.setattr(eval_module, "solve", solve)
    oracle.n_rows.clear()
    resumed, again = call(monkeypatch, out_dir, "--batch_size=4")
    assert "holds 6 of 20 items; going on behind them" in capsys.readouterr().out
    assert records_of(again) == records_of(lines) and sum(oracle.n_rows) == sum(
        r["forward_passes"] for r in records_of(lines)[6:]
    )
    for key in whole.keys() - {"seconds", "batch_size"}:
        assert resumed[key] == whole[key], key
    assert resumed["seconds"] == sum(json.loads(line)["seconds"] for line in again.splitlines())
    assert call(monkeypatch, out_dir, "--batch_size=4") == (
        resumed,
        again,
    )  # complete: nothing is done, or lost


def test_two_processes_and_any_batch_find_the_same(asked, monkeypatch, tmp_path):
    """With a model whose draws are random: 20 problems in one batch, in batches of 3, and 19 on two processes, one of which has
    none in the end."""
    out_dir, _ = asked
    monkeypatch.undo()
    flags = ["--temperature=0.7", "--steps=12", "--remasking=random"]
    _, one = call(monkeypatch, out_dir, "--batch_size=20", *flags)
    for path in out_dir.glob("gsm8k-*"):
        path.rename(tmp_path / path.name)
    _, three = call(monkeypatch, out_dir, "--batch_size=3", *flags)
    for path in out_dir.glob("gsm8k-*"):
        path.unlink()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "eval.py"),
    ]
    rest = [
        "--task=gsm8k",
        f"--out_dir={out_dir}",
        "--device=cpu",
        f"--data={out_dir.parent / 'test.txt'}",
        "--batch_size=3",
        "--limit=19",
    ]
    done = subprocess.run([*command, *rest, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = out_dir.glob("gsm8k-*")
    assert records_of(path.read_text()) == records_of(three)[:19] and records_of(three) == records_of(one)
    assert len({record["thoughts"] for record in records_of(one)}) == 20


@pytest.mark.parametrize(
    "flag",
    "steps=5 length=60 temperature=1 cfg_scale=2 answer_steps=5 answer_length=50 answer_temperature=4 answer_cfg_scale=2 "
    "remasking=random seed=1 limit=19 checkpoint=best.pt dtype=bfloat16 threshold=0.1 block_length=4 "
    "block_length=4,prefix_cache=True".split(),
)
def test_every_option_changes_the_answers(asked, monkeypatch, flag):
    """The answers' own options with the oracle, whose thoughts are sure to end; the others with a model of random weights."""
    out_dir, _ = asked
    flags = ["--steps=12", "--temperature=0.5"]
    if not flag.startswith("answer_"):
        monkeypatch.undo()
        checkpoint = checkpoint_of(out_dir)
        checkpoint["model"] = make_model(seed=1, vocab_size=257, block_size=64).state_dict()
        save_checkpoint(out_dir / "best.pt", checkpoint)
    *base, flag = flag.split(",")  # what the option is an option of
    flags += [f"--{key}" for key in base]
    (_, plain), (_, other) = (
        call(monkeypatch, out_dir, *flags),
        call(monkeypatch, out_dir, *flags, f"--{flag}"),
    )
    assert records_of(plain) != records_of(other)
    if flag.startswith("answer_"):  # the thoughts are what they were
        assert [record["thoughts"] for record in records_of(plain)] == [
            record["thoughts"] for record in records_of(other)
        ]
    assert len(json.loads((out_dir / "results.json").read_text())) == 2  # neither has taken the other's place


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefix_cache": True}, "prefix_cache needs a block_length"),
        (
            {"prefix_cache": True, "block_length": 4, "answer_cfg_scale": 1.0},
            "without cfg_scale only",
        ),  # not after the thoughts
        ({"threshold": 2.0}, "wanted threshold in 0..1"),
        ({"remasking": "greddy"}, "remasking is 'greddy'"),
    ],
)
def test_options_that_do_not_go_together_are_told_before_the_work(options, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)


def test_questions_and_thoughts_without_room(asked, monkeypatch):
    """Counted as wrong, and told apart from wrong answers."""
    out_dir, _ = asked
    result, lines = call(monkeypatch, out_dir, "--length=25")
    assert (result["accuracy"], result["without_room"], result["without_number"]) == (0, 20, 20)
    assert json.loads(lines.splitlines()[0])["answer"] is None
    result, _ = call(monkeypatch, out_dir, "--answer_length=45")
    assert (result["without_room"], result["n"]) == (20, 20)


def test_problems_are_read(tmp_path, capsys):
    lines = ["q||t #### 1,000", "no problem", "r||t #### many", "s||t #### -2.50"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert read_problems(str(tmp_path / "a.txt"), "") == [("q", Decimal(1000)), ("s", Decimal("-2.5"))]
    out = capsys.readouterr().out
    assert (
        "left out 1 lines" in out
        and "a.txt, line 2" in out
        and "left out 1 problems whose answer is no number" in out
    )
    (tmp_path / "b.txt").write_text("nothing\n")
    with pytest.raises(ValueError, match="b.txt holds no problems; wanted question||thoughts #### answer"):
        read_problems(str(tmp_path / "b.txt"), "")
    with pytest.raises(ValueError, match="source .*c.txt not found"):
        read_problems(str(tmp_path / "c.txt"), "")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must not be negative"),
        ({"cfg_scale": -0.5}, "cfg_scale is -0.5; it must not be negative"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan; it must not be negative"),
        ({"nll_type": "left"}, "nll_type is 'left'; it must be 'mc' or 'chain_rule'"),
        ({"mc_masking": "fair"}, "mc_masking is 'fair'; it must be 'exact' or 'coins'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)


def planned(*argv):
    return plan(*configurator.parse(EvalConfig, argv))


def test_tasks_have_settings_of_their_own():
    tasks = planned(
        "--task=loss,a.jsonl:nll_type=chain_rule:cfg_scale=1.5, piqa", "--mc_num=7", "--cfg_scale=0.5"
    )
    assert [(t.task, t.mc_num, t.nll_type, t.cfg_scale) for t in tasks] == [
        ("loss", 7, "mc", 0.5),
        ("a.jsonl", 7, "chain_rule", 1.5),
        ("piqa", 7, "mc", 0.5),
    ]
    tasks = planned(
        "--task=loss,sink_changes,a.jsonl", "--nll_type=chain_rule", "--mc_num=7"
    )  # which two of them make use of
    assert ["mc_num" in settings_of(task) for task in tasks] == [True, True, False]


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--task=loss", "--cfg_scale=0.5"],
            r"--task=loss makes no use of cfg_scale \(command line\); leave it out",
        ),
        (
            ["--task=a.jsonl,gsm8k", "--plot=True"],
            r"--task=a.jsonl,gsm8k makes no use of plot \(command line\)",
        ),
        (["--task=loss:steps=4"], "task loss:steps=4 makes no use of steps; leave it out"),
        (["--task=loss:task=x"], "task loss:task=x makes no use of task; leave it out"),
        (["--task=a.jsonl:mc_num=2", "--mc_num=9"], "makes no use of mc_num"),  # every task has its own
        ([str(ROOT / "config" / "eval_paper.py"), "--mc_masking=exact"], "makes no use of mc_masking"),
        (
            ["--task=a.jsonl:nll_type=chain_rule:mc_num=4"],
            "chain_rule:mc_num=4 makes no use of mc_num",
        ),
        (
            ["--task=a.jsonl", "--nll_type=chain_rule", "--mc_masking=coins"],
            "--task=a.jsonl makes no use of mc_masking",
        ),
        (["--task=a.jsonl:mc_mum=4"], r"unknown key 'mc_mum' \(task a.jsonl\); did you mean 'mc_num'"),
        (["--task=a.jsonl:mc_num=many"], r"mc_num='many' \(task a.jsonl\): wanted int"),
        (["--task=a.jsonl:mc_num=0"], "mc_num is 0"),
        (["--task=loss,"], "task '' has no name"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        planned(*argv)


def test_the_papers_settings():
    """PAPER.md's table: estimator and guidance of each task."""
    tasks = {t.task: t for t in planned(str(ROOT / "config" / "eval_paper.py"), "--out_dir=out/x")}
    chain = {"lambada_standard": 1.1, "openbookqa": 1.6, "boolq": 1.6, "piqa": 0.6}
    mc = {"arc_easy": 0.6, "arc_challenge": 0.6, "social_iqa": 0.6, "race": 0.7, "hellaswag": 0.7}
    assert {name: t.cfg_scale for name, t in tasks.items()} == chain | mc
    assert {name for name, t in tasks.items() if t.nll_type == "chain_rule"} == set(chain)
    assert {(t.mc_num, t.mc_masking) for name, t in tasks.items() if name in mc} == {(1024, "coins")}


def test_damaged_files_are_told_before_the_work(asked, monkeypatch):
    out_dir, oracle = asked
    call(monkeypatch, out_dir)
    oracle.n_rows.clear()
    (path,) = out_dir.glob("gsm8k-*")
    path.write_text(path.read_text().replace('"index": 4', '"index" 4'))
    with pytest.raises(ValueError, match="jsonl is damaged .*; move it away to answer all problems anew"):
        call(monkeypatch, out_dir)
    (out_dir / "results.json").write_text('{"a":')
    with pytest.raises(ValueError, match="results.json is damaged .*; move it away"):
        call(monkeypatch, out_dir)
    (out_dir / "results.json").unlink()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--task=gsm8k", f"--out_dir={out_dir}", "--device=cpu"])
    monkeypatch.setattr(eval_module, "CORPORA", {"gsm8k": SimpleNamespace(test_source=None)})
    with pytest.raises(
        ValueError, match="data set gsm8k has no test problems at .*test.txt; name some with --data=file"
    ):
        eval_module.main()
    assert oracle.n_rows == []
