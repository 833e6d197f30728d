"""sample.py: prompts, gaps, what it prints.

python -m pytest tests/test_sample.py
"""

import base64
import io
import re
import sys

import pytest
import torch
from conftest import make_model

import sample
from model import MDM, generate
from prepare_data import load_tokenizer
from sample import SampleConfig, Show, encode_prompt, start_of_text
from train import save_checkpoint

MASK = 257  # mask_id of a model with the byte vocabulary
forward = MDM.forward


@pytest.fixture
def tokenizer():
    return load_tokenizer({"name": "bytes", "pattern": r"[\s\S]", "vocab_size": 257})


@pytest.fixture
def out_dir(tmp_path):
    """A checkpoint of an untrained model over bytes, of a corpus of many documents."""
    model = make_model(vocab_size=257, block_size=32)
    meta = {
        "tokenizer": {"name": "bytes", "pattern": r"[\s\S]", "vocab_size": 257},
        "eot_id": 256,
        "documents": 9,
    }
    checkpoint = {"model": model.state_dict(), "model_config": vars(model.config), "meta": meta, "step": 0}
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    return tmp_path


def call(monkeypatch, capsys, out_dir, *flags):
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={out_dir}", "--device=cpu", *flags])
    sample.main()
    return capsys.readouterr()


def test_prompts_and_gaps(tokenizer):
    assert encode_prompt("ab", tokenizer, MASK) == ([97, 98], False)
    assert encode_prompt("[MASK:3]a[MASK]b[MASK:1]", tokenizer, MASK) == (
        [MASK] * 3 + [97, MASK, 98, MASK],
        True,
    )
    assert encode_prompt("a<|endoftext|>b", tokenizer, MASK) == ([97, 256, 98], False)
    assert encode_prompt("", tokenizer, MASK) == ([], False)
    assert encode_prompt("[MASK:x]", tokenizer, MASK) == ([ord(c) for c in "[MASK:x]"], False)


def test_start_of_text(tokenizer):
    config = make_model(vocab_size=257, block_size=8).config
    many, one = {"eot_id": 256, "documents": 2}, {"eot_id": 256, "documents": 1}
    start, opening, end = start_of_text(SampleConfig(prompt="ab"), many, tokenizer, config)
    assert start.tolist() == [[256, 97, 98] + [MASK] * 5] and (opening, end) == (1, 3)
    start, opening, end = start_of_text(SampleConfig(prompt="ab", length=4), one, tokenizer, config)
    assert start.tolist() == [[97, 98, MASK, MASK]] and (opening, end) == (0, 2)
    start, opening, end = start_of_text(SampleConfig(prompt="a[MASK:2]b"), one, tokenizer, config)
    assert start.tolist() == [[97, MASK, MASK, 98]] and (opening, end) == (0, None)
    for options, message in {
        "prompt=abcdefghi": r"the prompt and its gaps \(9 tokens\) exceeds the model's 8 tokens",
        "prompt=a[MASK:8]": r"the prompt and its gaps \(9 tokens\) exceeds the model's 8 tokens",
        "prompt=abcdefgh": "nothing to write: the prompt has 8 tokens, length is 8",
        "prompt=a[MASK:0]": "nothing to write: the prompt has 1 tokens",
        "length=9": "length 9 exceeds the model's 8 tokens",
        "length=0": "nothing to write: the prompt has 0 tokens, length is 0",
    }.items():
        key, value = options.split("=")
        cfg = SampleConfig(**{key: int(value) if key == "length" else value})
        with pytest.raises(ValueError, match=message):
            start_of_text(cfg, one, tokenizer, config)


def test_output(monkeypatch, capsys, out_dir):
    printed = call(
        monkeypatch, capsys, out_dir, "--prompt=Tom has ", "--num_samples=4", "--length=20", "--steps=5"
    )
    samples = printed.out.split("---\n")
    assert len(samples) == 4 and all(s.startswith("Tom has ") and "<|endoftext|>" not in s for s in samples)
    assert re.fullmatch(r"48 tokens in [\d.]+ s, [\d,]+ tokens/s, 5 forward passes of 4 rows\n", printed.err)


def test_a_text_that_has_ended_is_not_computed_any_further(monkeypatch, capsys, out_dir, tokenizer):
    """The same texts as when every place is filled and what is behind the end is cut off, and only what is printed is counted."""
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    checkpoint["model"]["lm_head.weight"][256] *= 4  # makes end-of-text likely in some places
    save_checkpoint(out_dir / "ckpt.pt", checkpoint)
    model, x = MDM.from_checkpoint(str(out_dir)), torch.tensor([[256, 97, 98] + [MASK] * 29]).expand(40, -1)
    torch.manual_seed(0)
    filled, _ = generate(model, x, steps=32, temperature=5.0)
    rows = [row[1 : row.index(256, 1)] if 256 in row[1:] else row[1:] for row in filled.tolist()]
    assert 2 < sum(len(row) < 31 for row in rows) < 40
    rows_computed = []
    monkeypatch.setattr(
        MDM, "forward", lambda self, x, **where: rows_computed.append(len(x)) or forward(self, x, **where)
    )
    flags = ["--prompt=ab", "--num_samples=40", "--steps=32", "--temperature=5"]
    printed = call(monkeypatch, capsys, out_dir, *flags)
    assert printed.out == "---\n".join(tokenizer.decode(row) + "\n" for row in rows)
    assert printed.err.startswith(f"{sum(len(row) - 2 for row in rows)} tokens in ")
    assert rows_computed[0] == 40 and rows_computed[-1] < 40


def test_infilling_keeps_what_is_given(monkeypatch, capsys, out_dir):
    out = call(monkeypatch, capsys, out_dir, "--prompt=Tom [MASK:3] and [MASK].", "--num_samples=1").out
    assert re.fullmatch(r"Tom (.|\n)+ and (.|\n)+\.\n", out)


@pytest.mark.parametrize(
    "flag",
    "steps=3 temperature=0 remasking=random cfg_scale=3 seed=1 length=9 prompt=x num_samples=2 threshold=0.01 block_length=4 "
    "steps=30,num_samples=9,block_length=9,prefix_cache=True".split(),
)
def test_every_option_changes_the_text(monkeypatch, capsys, out_dir, flag):
    *more, flag = flag.split(",")  # what the option is an option of
    base = [
        "--prompt=ab",
        "--num_samples=1",
        "--length=30",
        "--steps=10",
        "--temperature=0.9",
        *(f"--{key}" for key in more),
    ]
    plain = call(monkeypatch, capsys, out_dir, *base).out
    assert plain == call(monkeypatch, capsys, out_dir, *base).out
    assert plain != call(monkeypatch, capsys, out_dir, *base, f"--{flag}").out


def test_best_checkpoint(monkeypatch, capsys, out_dir):
    with pytest.raises(ValueError, match="no checkpoint at .*best.pt"):
        call(monkeypatch, capsys, out_dir, "--checkpoint=best.pt")
    (out_dir / "ckpt.pt").rename(out_dir / "best.pt")
    assert call(monkeypatch, capsys, out_dir, "--checkpoint=best.pt").out


def test_show_where_the_output_is_no_terminal(monkeypatch, capsys, out_dir):
    out = call(
        monkeypatch,
        capsys,
        out_dir,
        "--prompt=ab",
        "--length=8",
        "--steps=5",
        "--num_samples=1",
        "--show=True",
    ).out
    lines = out.splitlines()
    assert lines[0].startswith("step   1  ab") and not any("\033" in line for line in lines[:5])
    show = Show(
        torch.tensor([[97, MASK]]),
        load_tokenizer({"name": "bytes", "pattern": r"[\s\S]", "vocab_size": 257}),
        MASK,
        0,
    )
    show(torch.tensor([[97, 256]]))
    assert capsys.readouterr().out == "step   1  a∎\n"
    hidden = [line.count("_") for line in lines[:5]]
    assert hidden == sorted(hidden, reverse=True) and hidden[-1] == 0


def test_show_in_a_terminal(monkeypatch, tokenizer):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    show = Show(torch.tensor([[97, MASK, MASK, MASK, 98]]), tokenizer, MASK, opening=0)
    show(torch.tensor([[97, MASK, 120, MASK, 98]]))
    show(torch.tensor([[97, MASK, 120, 121, 98]]))
    _, first, second = sys.stdout.getvalue().split("\033[H\033[J")  # each step clears the screen
    dim, bright, end = "\033[2m", "\033[1;32m", "\033[0m"
    assert first == f"step 1\na{dim}_{end}{bright}x{end}{dim}_{end}b\n"
    assert second == f"step 2\na{dim}_{end}x{bright}y{end}b\n"  # x is no longer new


def test_the_tokenizer_comes_from_the_checkpoint(monkeypatch, capsys, out_dir):
    """With the same ids under other names, the same model writes the same tokens as other text."""
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    shifted = [base64.b64encode(bytes([(byte + 1) % 256])).decode() for byte in range(256)]
    checkpoint["meta"]["tokenizer"] = {
        "name": "bpe",
        "pattern": r"[\s\S]",
        "vocab_size": 257,
        "ranks": shifted,
    }
    flags = ["--temperature=0", "--num_samples=1", "--length=9", "--steps=8"]
    plain = call(monkeypatch, capsys, out_dir, "--prompt=abc", *flags).out
    save_checkpoint(out_dir / "ckpt.pt", checkpoint)
    other = call(monkeypatch, capsys, out_dir, "--prompt=bcd", *flags).out
    assert other[:3] == "bcd" and other != plain
    readable = [(p, o) for p, o in zip(plain[:-1], other[:-1]) if p.isascii() and o.isascii() and p != "\x7f"]
    assert len(readable) > 3 and all(ord(o) == ord(p) + 1 for p, o in readable)


# ---- questions


def test_a_question_is_answered_in_two_stages(monkeypatch, capsys, out_dir):
    calls = []

    def fake(model, tokenizer, questions, seeds, for_thoughts, for_answer, on_step):
        calls.append((questions, seeds, for_thoughts, for_answer))
        return [("Answer: <<1+1=2>>", "#### 2", 9), ("Answer: <<", None, 3)][: len(questions)]

    monkeypatch.setattr(sample, "solve", fake)
    printed = call(monkeypatch, capsys, out_dir, "--question=How many?")
    assert printed.out == "Answer: <<1+1=2>>\n#### 2\n" and printed.err.startswith(
        "9 forward passes an answer"
    )
    flags = [
        "--num_samples=2",
        "--steps=5",
        "--temperature=0.4",
        "--remasking=random",
        "--cfg_scale=2",
        "--length=30",
    ]
    printed = call(monkeypatch, capsys, out_dir, "--question=How many?", *flags)
    assert printed.out.endswith("#### 2\n---\nAnswer: <<\n(no room left)\n")
    (one, _, default, _), (two, seeds, first, second) = calls
    assert one == ["How many?"] and two == one * 2 and len(set(seeds)) == 2 and default["temperature"] == 0.1
    wanted = {"steps": 5, "length": 30, "temperature": 0.4, "remasking": "random", "cfg_scale": 2.0}
    assert first == second == wanted | {"threshold": None, "block_length": None, "prefix_cache": False}


def test_a_question_to_a_model_that_knows_nothing(monkeypatch, capsys, out_dir):
    """Through the real thing: whatever it writes, it ends, the same each time, and can be watched."""
    plain = call(monkeypatch, capsys, out_dir, "--question=How many?").out
    shown = call(monkeypatch, capsys, out_dir, "--question=How many?", "--show=True").out
    assert plain == call(monkeypatch, capsys, out_dir, "--question=How many?").out and shown.endswith(plain)
    assert shown.startswith("step   1  Question: How many?")
    assert (
        plain != call(monkeypatch, capsys, out_dir, "--question=How many?", "--temperature=1", "--seed=3").out
    )
    with pytest.raises(ValueError, match="a prompt and a question are both set; leave out one of them"):
        call(monkeypatch, capsys, out_dir, "--question=q", "--prompt=p")
    with pytest.raises(ValueError, match="the question leaves no room for thoughts; shorten it"):
        call(monkeypatch, capsys, out_dir, "--question=" + "long " * 10)
    for flag in ("num_samples=0", "seed=-1"):
        with pytest.raises(ValueError, match="wanted num_samples >= 1 and seed >= 0"):
            call(monkeypatch, capsys, out_dir, f"--{flag}")
