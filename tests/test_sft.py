"""sft_gsm8k.py: which examples are seen, what of them is hidden, and how a trained model is asked."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import make_model
from test_sample import BYTES, EOT, TOKENIZER

import sft_gsm8k
from configurator import parse
from model import MDM, load_checkpoint, seed_for
from prepare_data import load_meta, load_tokenizer
from sft_gsm8k import SFTConfig, answer, example_batches, load_examples


def problem(i):
    """Question, thoughts and answer of problem i. Only the second example of problem 13 exceeds 64 tokens."""
    again = " (say again)" if i == 13 else ""
    question, thoughts = f"Question: What is {i} + {i + 1}{again}?", f" Answer: <<{i}+{i + 1}={2 * i + 1}>>"
    return question, thoughts, f" #### {2 * i + 1}"


def examples(numbers):
    """(prompt, response) of the first stage, then of the second."""
    problems = [problem(i) for i in numbers]
    to_answers = [(question + thoughts, end) for question, thoughts, end in problems]
    return [(question, thoughts) for question, thoughts, _ in problems] + to_answers


@pytest.fixture
def few(tmp_path):
    """The folder of a prepared data set: problems 10 to 20 to train on, and 21 to 25 to validate."""
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    meta = {"vocab_size": 257, "eot_id": EOT, "dtype": "uint16", "tokenizer": BYTES, "one_per_line": True}
    meta |= {"tokens": {}, "sha256": {}}
    for split, numbers in ("train", range(10, 21)), ("val", range(21, 26)):
        tokens, cuts = [], []
        for i in numbers:
            question, thoughts, end = (list(part.encode()) for part in problem(i))
            sizes = [len(tokens), len(question), len(thoughts), len(end) + 1]
            cuts.append(np.cumsum(sizes))
            tokens += question + thoughts + end + [EOT]
        np.array(tokens, np.uint16).tofile(folder / f"{split}.bin")
        np.save(folder / f"{split}_cuts.npy", np.array(cuts))
        meta["tokens"][split] = len(tokens)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def batches(few, **settings):
    settings = {"init_from": "scratch", "block_size": 64, "micro_batch_size": 4, **settings}
    cfg, meta = SFTConfig(**settings), load_meta(few)
    examples = {split: load_examples(few, meta, split, cfg.block_size) for split in ("train", "val")}
    return example_batches(examples, meta, cfg), examples


def texts_of(x0, maskable):
    """(prompt, response) of every row, from what is maskable."""
    texts = []
    for row, may_hide in zip(x0, maskable):
        response = row[may_hide].tolist()
        end = response.index(EOT)
        assert set(response[end:]) == {EOT} and may_hide.tolist() == sorted(may_hide.tolist())  # prompt first
        texts.append((TOKENIZER.decode(row[~may_hide].tolist()), TOKENIZER.decode(response[:end])))
    return texts


def test_a_problem_makes_the_examples_of_two_stages(few):
    get_batch, data = batches(few, micro_batch_size=10, eval_seqs=10)
    assert texts_of(*get_batch("val", 0)) == examples(range(21, 26))
    assert [(len(data[split][1]), data[split][2]) for split in ("train", "val")] == [(21, 1), (10, 0)]
    # An example that fills the length to its last token has no room for its end-of-text, and is left out.
    longest = max(len("".join(problem(i))) for i in range(10, 21))
    left_out = [load_examples(few, load_meta(few), "train", size)[2] for size in (longest, longest + 1)]
    assert left_out == [1, 0]


CHOSEN = {4: [0, 2, 6, 8], 8: [0, 1, 2, 3, 6, 7, 8, 9], 9: [0, 1, 2, 3, 4, 6, 7, 8, 9]}


@pytest.mark.parametrize("n", CHOSEN)
def test_validation_is_spread_over_both_stages(few, n):
    """As many of each, since train.bound_and_error takes each half alone; or every example once."""
    cuts = np.load(few / "val_cuts.npy")
    cuts[0, 3] = cuts[1, 3]  # a long answer
    np.save(few / "val_cuts.npy", cuts)
    get_batch, data = batches(few, micro_batch_size=n, eval_seqs=n)
    assert data["val"][1][:, 0].tolist() == [0] * 5 + [1] * 4
    assert texts_of(*get_batch("val", 0)) == [examples(range(21, 26))[i] for i in CHOSEN[n]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_example_once_an_epoch(few, world_size):
    """In any micro-batches, over the processes of a step and the end of an epoch, each in a new order."""
    runs = []
    for B in (2, 7):
        get_batch, _ = batches(few, micro_batch_size=B, seed=3)
        steps = zip(*(range(rank, 84 // B, world_size) for rank in range(world_size)))
        seen = [text for step in steps for index in step for text in texts_of(*get_batch("train", index))]
        epochs = [seen[i : i + 21] for i in range(0, 84, 21)]
        assert all(len(set(epoch)) == 21 and set(epoch) < set(examples(range(10, 21))) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        runs.append(seen)
    assert runs[0] == runs[1]
    other, _ = batches(few, micro_batch_size=21, seed=4)
    assert texts_of(*other("train", 0)) != runs[0][:21]


TINY = """init_from=scratch dataset=gsm8k device=cpu n_layer=2 n_head=2 n_embd=16 block_size=64 batch_size=8
micro_batch_size=4 eval_interval=4 eval_seqs=8 log_interval=100 learning_rate=1e-2"""


@pytest.fixture
def main(few, tmp_path, monkeypatch):
    """Runs the script. Returns the checkpoint that it leaves in out_dir."""

    def main(out_dir, settings, base=TINY):
        places = f"data_dir={few.parent} out_dir={tmp_path / out_dir}"
        flags = [f"--{setting}" for setting in f"{base} {places} {settings}".split()]
        monkeypatch.setattr(sys, "argv", ["sft_gsm8k.py", *flags])
        sft_gsm8k.main()
        return load_checkpoint(tmp_path / out_dir)

    return main


def test_epochs_set_the_length_unless_max_steps_is_set(main, capsys):
    """21 examples in batches of 8: two epochs are 5 steps. A resumed run equals an uninterrupted one."""
    whole = main("whole", "epochs=2 warmup=0 min_lr=1e-2")
    assert whole["step"] == 5 and "train: 21 examples; 1 left out" in capsys.readouterr().out
    assert main("cut", "max_steps=2 warmup=0 min_lr=1e-2")["step"] == 2
    resumed = main("cut", "max_steps=5", base="init_from=resume")
    assert resumed["step"] == 5
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    assert main("whole", "max_steps=6", base="init_from=resume")["step"] == 6
    assert main("both", "max_steps=3 epochs=2")["step"] == 3
    assert main("flops", "epochs=2 train_flops=3e6")["step"] == 0


def test_what_does_not_fit_is_refused(few):
    for flags in [], ["--init_from=auto"]:  # which would start from scratch
        with pytest.raises(ValueError, match="set --init_from=out/NAME, the model to fine-tune"):
            parse(SFTConfig, flags)
    meta = load_meta(few)
    with pytest.raises(ValueError, match="no example of .*train_cuts.npy fits into block_size 9; raise it"):
        load_examples(few, meta, "train", 9)
    with pytest.raises(ValueError, match="holds no problems; run: python prepare_data.py gsm8k"):
        load_examples(few, meta | {"one_per_line": False}, "train", 64)


# ---- asking


def test_an_answer_does_not_depend_on_the_batch():
    """Questions of many lengths in one batch, and each alone: the same texts, and as many forward passes."""
    model, questions = make_model(vocab_size=257, block_size=39), ["x" * (i % 30) for i in range(40)]
    for options in {"steps": 30, "temperature": 3.0}, {"steps": 9, "cfg_scale": 0.5, "remasking": "random"}:
        together = answer(model, TOKENIZER, questions, list(range(40)), **options)
        assert together[29] == (None, None, 0) and len({thoughts for thoughts, _, _ in together}) > 20
        for i in range(0, 40, 7):
            assert answer(model, TOKENIZER, questions[i : i + 1], [i], **options) == [together[i]]


def test_the_answer_follows_the_ids_that_the_model_wrote(monkeypatch):
    """The second prompt is the first and the response, id for id, though other ids spell the same text."""
    tokenizer = load_tokenizer({"name": "words", "pattern": r"\s|\S+", "vocab_size": 258, "words": ["AB"]})
    model, calls = make_model(vocab_size=258, block_size=99), []
    q, r, thoughts, eot, mask = list(b"Question: q"), list(b"Question: rrr"), [32, 65, 66], 257, 258
    assert tokenizer.encode_ordinary(" AB") == [32, 256]
    rows = [[q + thoughts + [eot, 0], r + [67, 68, 69]], [q + thoughts + [67, eot]]]

    def generate(model, x, seeds, eot_id, steps):
        calls.append((x.tolist(), seeds, eot_id, steps))
        return torch.tensor(rows[len(calls) - 1]), torch.tensor([3, 4][: len(x)])

    monkeypatch.setattr(sft_gsm8k, "generate", generate)
    answers = answer(model, tokenizer, ["q", " rrr ", "too long"], [8, 9, 10], length=16, steps=7)
    assert answers == [("AB", "C", 6), ("CDE", None, 4), (None, None, 0)]
    first = [q + [mask] * 5, r + [mask] * 3], [seed_for(8, 0), seed_for(9, 0)], eot, 7
    assert calls == [first, ([q + thoughts + [mask] * 2], [seed_for(8, 1)], eot, 7)]


@pytest.mark.slow
def test_what_is_learned_is_answered(main, tmp_path):
    """A model that has learned a few problems by heart answers them in both stages, and stops by itself."""
    size = "n_embd=64 max_steps=800 batch_size=12 micro_batch_size=12"
    main("a", f"{size} learning_rate=3e-3 stratified_t=True")
    problems = [problem(i) for i in (10, 15, 20)]
    questions = [question.removeprefix("Question: ") for question, _, _ in problems]
    answers = answer(MDM.from_checkpoint(tmp_path / "a"), TOKENIZER, questions, [0, 1, 2], steps=64)
    assert [texts[:2] for texts in answers] == [(a.strip(), b.strip()) for _, a, b in problems]
