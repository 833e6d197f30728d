"""sample.py: prompts, gaps, questions, what it prints."""

import io
import re
import sys

import pytest
import torch
from conftest import make_model, save_model

import sample
from model import seed_for
from prepare_data import load_tokenizer, make_tokenizer
from sample import SampleConfig, encode_prompt, show_steps

EOT, MASK = 256, 257  # ids of a model with the byte vocabulary
BYTES = {"name": "bytes", "pattern": r"[\s\S]", "vocab_size": 257}
TOKENIZER = load_tokenizer(BYTES)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the script with flags, on an untrained model over bytes, of a corpus of many documents."""
    meta = {"tokenizer": BYTES, "opens_with_eot": True}
    save_model(tmp_path, make_model(vocab_size=257, block_size=32), meta)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={tmp_path}", "--device=cpu", *flags])
        sample.main()
        return capsys.readouterr()

    return call


@pytest.fixture
def fake(monkeypatch):
    """Runs sample() with a generate that returns rows: the row and eot_id that it is given, and the texts."""

    def fake(rows, opens_with_eot=False, **settings):
        given = []

        def generate(model, x, eot_id, **options):
            given.extend([x[0].tolist(), eot_id])
            return torch.tensor(rows), torch.ones(len(x))

        monkeypatch.setattr(sample, "generate", generate)
        model = make_model(vocab_size=257, block_size=8)
        texts, _ = sample.sample(SampleConfig(**settings), model, TOKENIZER, opens_with_eot)
        return *given, texts

    return fake


def test_prompts_and_gaps():
    assert encode_prompt("ab", TOKENIZER, MASK) == [97, 98]
    assert encode_prompt("[MASK:3]a[MASK]b[MASK:1]", TOKENIZER, MASK) == [MASK] * 3 + [97, MASK, 98, MASK]
    assert encode_prompt("a<|endoftext|>b", TOKENIZER, MASK) == [97, EOT, 98]
    assert encode_prompt("[MASK:x]", TOKENIZER, MASK) == list(b"[MASK:x]")
    assert encode_prompt("a [MASK] ", TOKENIZER, MASK) == [97, 32, MASK, 32]  # bytes: a blank is a token


def test_a_blank_before_a_gap_belongs_to_the_token_that_follows():
    """Also at the end of a prompt that is continued. Of two blanks only the last one goes."""
    spec = make_tokenizer("words", texts=["a co 3 co a"] * 9)
    tokenizer, mask_id = load_tokenizer(spec), spec["vocab_size"]
    for before, after in (("a", " a"), ("a co", ""), ("a ", " 3")):
        whole = tokenizer.encode_ordinary(f"{before} co{after}")
        (i,) = [i for i, token in enumerate(whole) if tokenizer.decode([token]) == " co"][-1:]
        gapped = encode_prompt(f"{before} [MASK]{after}", tokenizer, mask_id)
        assert gapped == whole[:i] + [mask_id] + whole[i + 1 :]
        assert encode_prompt(f"{before} ", tokenizer, mask_id) == whole[:i]
    end = encode_prompt("[MASK] [MASK]a ", tokenizer, mask_id)
    assert end == [mask_id] * 2 + tokenizer.encode_ordinary("a ")


def test_a_text_opens_as_in_training_and_ends_at_its_first_end_of_text(fake):
    a, b, c = 97, 98, 99
    rows = [[EOT, a, b, c, EOT, c, EOT, EOT], [EOT, a, b, c, c, c, c, c], [EOT, a, b] + [EOT] * 5]
    start, eot_id, texts = fake(rows, opens_with_eot=True, prompt="ab")
    assert (start, eot_id) == ([EOT, a, b] + [MASK] * 5, EOT) and texts == ["abc", "abccccc", "ab"]
    assert fake([[a, EOT, b, EOT]], prompt="a<|endoftext|>", length=4)[2] == ["a<|endoftext|>b"]
    assert fake([[EOT, a, b, b]], opens_with_eot=True, prompt="a", length=3)[0] == [EOT, a, MASK, MASK]
    assert fake([[EOT] * 8]) == ([MASK] * 8, EOT, ["(empty)"])
    gaps = fake([[EOT, a, EOT, c, b]], opens_with_eot=True, prompt="a[MASK:2]b")
    assert gaps == ([EOT, a, MASK, MASK, b], None, ["a<|endoftext|>cb"])


@pytest.mark.parametrize("prompt, length", [("a" * 9, 0), ("a[MASK:8]", 0), ("", 9), ("abc", 2), ("abc", 3)])
def test_a_prompt_that_is_too_long_or_leaves_nothing_to_write_is_refused(fake, prompt, length):
    with pytest.raises(ValueError, match=r"prompt \d, text \d, room 8 tokens; shorten one of them"):
        fake([], prompt=prompt, length=length or None)


def test_a_prompt_in_a_file(tmp_path):
    (tmp_path / "x.txt").write_text("Tom has\n [MASK]\n\n")
    assert SampleConfig(prompt=f"FILE:{tmp_path}/x.txt").prompt == "Tom has\n [MASK]\n"  # an editor adds one


def test_texts_go_to_stdout_and_what_they_took_to_stderr(call):
    printed = call("--prompt=Tom [MASK:3] and [MASK].", "--steps=3")
    texts = printed.out.removesuffix("\n").split("\n---\n")
    assert len(texts) == 3 and SampleConfig().temperature == 0.7
    assert all(re.fullmatch(r"Tom (.|\n)+ and (.|\n)+\.", text) for text in texts)
    assert re.fullmatch(r"3 texts in [\d.]+ s, 3.0 forward passes each\n", printed.err)


def test_show_prints_a_line_for_each_step(call):
    flags = ["--prompt=ab", "--length=8", "--steps=5", "--num_samples=1"]
    shown, plain = call(*flags, "--show=True").out, call(*flags).out
    *lines, text = shown.removesuffix(plain).splitlines() + [plain]
    assert [line[:12] for line in lines] == [f"step   {step}  '∎" for step in range(1, 6)]
    assert [line.count("_") for line in lines] == [4, 3, 2, 1, 0]


def test_show_draws_in_place_in_a_terminal(monkeypatch):
    """Hidden tokens are dim, new ones bright, and the model's own control characters do nothing."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sys.stdout.isatty = lambda: True
    on_step = show_steps(TOKENIZER, MASK)
    on_step(torch.tensor([[97, MASK, 120, EOT], [1, 2, 3, 4]]))
    on_step(torch.tensor([[97, 27, 120, EOT], [1, 2, 3, 4]]))
    frames = sys.stdout.getvalue().split("\033[H\033[J")  # which clears the screen
    plain, dim, bright = "\033[0m{}\033[0m", "\033[2m{}\033[0m", "\033[92m{}\033[0m"
    assert frames[1] == "step 1\n" + (plain + dim + plain + plain).format("a", "_", "x", "∎") + "\n"
    assert frames[2] == "step 2\n" + (plain + bright + plain + plain).format("a", "�", "x", "∎") + "\n"


def test_a_question_is_answered_in_two_stages(call, monkeypatch):
    asked = []

    def answer(model, tokenizer, questions, length, on_step, **options):
        asked.append((questions, options | {"length": length}))
        return [("Answer: <<1+1=2>>", "#### 2", 9), ("", None, 3)][: len(questions)]

    monkeypatch.setattr(sample, "answer", answer)
    printed = call("--question=How many?")
    assert printed.out == "Answer: <<1+1=2>>\n#### 2\n" and printed.err.endswith("9.0 forward passes each\n")
    assert printed.err.startswith("note: this model was not fine-tuned")
    flags = "--steps=5 --temperature=0.4 --remasking=random --cfg_scale=2 --length=30 --seed=7".split()
    printed = call("--question=How many?", "--num_samples=2", *flags)
    assert printed.out == "Answer: <<1+1=2>>\n#### 2\n---\n(empty)\n(no room left)\n"
    assert printed.err.endswith(" 6.0 forward passes each\n")
    (once, default), (twice, options) = asked
    assert once == ["How many?"] and twice == once * 2 and default["temperature"] == 0.1
    wanted = {"steps": 5, "length": 30, "temperature": 0.4, "remasking": "random", "cfg_scale": 2.0}
    assert options == wanted | {"threshold": None, "seeds": [seed_for(7, 0), seed_for(7, 1)]}


def test_a_question_to_a_model_that_knows_nothing(call):
    """Through the real thing: whatever it writes, it ends, the same each time, and can be watched."""
    plain, shown = call("--question=How many?").out, call("--question=How many?", "--show=True").out
    assert shown.startswith("step   1  'Question: How many?") and shown.endswith(plain)
    assert plain != call("--question=How many?", "--temperature=1", "--seed=3").out
    assert call("--question=" + "long " * 10).out == "(no room left)\n(no room left)\n"
    with pytest.raises(ValueError, match="got a prompt and a question"):
        call("--question=q", "--prompt=p")
