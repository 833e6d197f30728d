"""Fine-tuning on problems: which examples are seen, what of them is hidden, and how a trained model is asked.

python -m pytest tests/test_sft.py
"""

import base64
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model

import sft_gsm8k
from configurator import parse
from model import MDM, diffusion_loss, generate, load_checkpoint, mask_tokens
from prepare_data import PrepareConfig, load_tokenizer, prepare
from sft_gsm8k import SFTConfig, example_batches, load_examples, respond, solve
from train import TrainConfig, load_meta, settle

TINY = {
    "dataset": "arithmetic", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64, "batch_size": 8, "micro_batch_size": 4,
    "eval_interval": 4, "eval_seqs": 8, "log_interval": 1, "device": "cpu",
}  # fmt: skip


TINY_FLAGS = [f"--{key}={value}" for key, value in TINY.items()]


def main(monkeypatch, data_dir, out_dir, *flags):
    monkeypatch.setattr(
        sys, "argv", ["sft_gsm8k.py", *TINY_FLAGS, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags]
    )
    sft_gsm8k.main()


@pytest.fixture
def few(tmp_path):
    """11 problems to train on and 5 to validate, one of the former too long for 64 tokens in its second example only."""
    lines = [f"What is {i} + {i + 1}?||<<{i}+{i + 1}={2 * i + 1}>> #### {2 * i + 1}" for i in range(10, 26)]
    lines[3] = "What is 13 + 14 (say again)?||<<13+14=27>> #### 27"
    (tmp_path / "train.txt").write_text("\n".join(lines[:11]))
    (tmp_path / "valid.txt").write_text("\n".join(lines[11:]))
    source = {
        "source": str(tmp_path / "train.txt"),
        "val_source": str(tmp_path / "valid.txt"),
        "data_dir": str(tmp_path / "few"),
    }
    prepare(PrepareConfig(name="gsm8k", tokenizer="bytes", **source))
    return tmp_path / "few" / "gsm8k"


def texts_of(get_batch, split, indices, tokenizer, eot):
    """(prompt, response) of every row, from what is maskable."""
    found = []
    for index in indices:
        for x0, maskable in zip(*get_batch(split, index)):
            response = x0[maskable].tolist()
            assert maskable.tolist() == sorted(
                maskable.tolist()
            )  # the prompt comes first, all else may be hidden
            end = response.index(eot)
            assert set(response[end:]) == {eot}
            found.append((tokenizer.decode(x0[~maskable].tolist()), tokenizer.decode(response[:end])))
    return found


def test_examples_are_the_two_stages(few):
    meta = load_meta(few)
    cfg = SFTConfig(block_size=64, micro_batch_size=3, eval_seqs=10)
    get_batch, data = example_batches(few, meta, cfg)
    tokenizer = load_tokenizer(meta["tokenizer"])
    sizes = {split: (len(examples), too_long) for split, (_, examples, too_long) in data.items()}
    assert sizes == {"train": (21, 1), "val": (10, 0)}
    found = texts_of(get_batch, "val", range(4), tokenizer, meta["eot_id"])[:10]
    first = [
        (f"Question: What is {i} + {i + 1}?", f" Answer: <<{i}+{i + 1}={2 * i + 1}>>") for i in range(21, 26)
    ]
    second = [
        (question + thoughts, f" #### {2 * i + 1}") for i, (question, thoughts) in zip(range(21, 26), first)
    ]
    assert found == first + second
    # An example that fills the length to its last token has no room for its end-of-text, and is left out.
    longest = max(int(e[2] - e[0]) for e in data["train"][1])
    assert (
        load_examples(few, meta, "train", longest)[2] > 1 == load_examples(few, meta, "train", longest + 1)[2]
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_example_once_an_epoch(few, world_size):
    """In any micro-batches, over the processes of a step and over the end of an epoch; in another order in the next."""
    meta = load_meta(few)
    orders = []
    for micro_batch_size in (2, 7):
        cfg = SFTConfig(block_size=64, micro_batch_size=micro_batch_size, seed=3)
        get_batch, data = example_batches(few, meta, cfg)
        by_rank = [
            [get_batch("train", i) for i in range(rank, 84 // micro_batch_size, world_size)]
            for rank in range(world_size)
        ]
        rows = [
            x0 for step in zip(*by_rank) for batch, _ in step for x0 in batch
        ]  # in the order of the steps
        maskable = [m for step in zip(*by_rank) for _, batch in step for m in batch]
        examples = [(tuple(x0.tolist()), tuple(m.tolist())) for x0, m in zip(rows, maskable)]
        epochs = [examples[i : i + 21] for i in range(0, 84, 21)]
        assert all(len(set(epoch)) == 21 and set(epoch) == set(epochs[0]) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        orders.append(examples)
    assert orders[0] == orders[1]
    other, _ = example_batches(few, meta, SFTConfig(block_size=64, micro_batch_size=21, seed=4))
    assert (
        tuple(other("train", 0)[0][0].tolist()) != orders[0][0][0]
        or tuple(other("train", 0)[0][1].tolist()) != orders[0][1][0]
    )


def test_the_prompt_is_never_hidden_and_never_in_the_loss(few, monkeypatch, tmp_path):
    """Through the training loop: what the model is shown, and what a model that errs on prompts alone is charged."""
    seen = []

    def record(x0, p_mask, maskable, mask_id, noise=None):
        xt, masked = mask_tokens(x0, p_mask, maskable, mask_id, noise)
        seen.append((x0, xt, masked, maskable))
        return xt, masked

    monkeypatch.setattr("model.mask_tokens", record)
    main(monkeypatch, few.parent, tmp_path / "out", "--dataset=gsm8k", "--max_steps=6")
    assert len(seen) == 12 and sum(int(masked.sum()) for _, _, masked, _ in seen) > 500
    for x0, xt, masked, maskable in seen:
        assert torch.equal(xt[~maskable], x0[~maskable]) and not (masked & ~maskable).any()
        assert (~maskable).sum(1).min() > 5 and (masked == (xt != x0)).all()
    get_batch, _ = example_batches(few, load_meta(few), SFTConfig(block_size=64, micro_batch_size=8))
    x0, maskable = get_batch("train", 0)
    model = make_model(vocab_size=load_meta(few)["vocab_size"], block_size=64, n_sink=0)
    losses = []
    for where in (torch.zeros_like(maskable), ~maskable, maskable):
        errs = lambda module, args, x: x + 5 * where[:, :, None] * torch.randn(1, 1, 16)  # noqa: E731, B023
        with model.blocks[-1].register_forward_hook(errs):
            torch.manual_seed(1)
            losses.append(diffusion_loss(model, x0, maskable).item())
    assert losses[0] == losses[1] != losses[2]


def weights(out_dir):
    return load_checkpoint(out_dir)["model"]


def test_epochs_set_the_length_and_a_resumed_run_equals_an_uninterrupted_one(
    few, tmp_path, monkeypatch, capsys
):
    """22 examples less one in batches of 8: two epochs are 5 steps, with the end of the first one inside the third."""
    flags = ["--dataset=gsm8k", "--epochs=2", "--learning_rate=1e-2"]
    main(monkeypatch, few.parent, tmp_path / "whole", *flags)
    out = capsys.readouterr().out
    assert (
        "train: 21 examples, and 1 left out: longer than 64 tokens" in out and "stopped at step 5 of 5" in out
    )
    main(
        monkeypatch,
        few.parent,
        tmp_path / "cut",
        *flags,
        "--max_steps=2",
        "--epochs=None",
        "--warmup=0",
        "--min_lr=1e-2",
    )
    main(monkeypatch, few.parent, tmp_path / "long", *flags, "--warmup=0", "--min_lr=1e-2")
    monkeypatch.setattr(
        sys, "argv", ["sft_gsm8k.py", f"--out_dir={tmp_path / 'cut'}", "--init_from=resume", "--epochs=2"]
    )
    sft_gsm8k.main()
    whole, resumed = weights(tmp_path / "long"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], weights(tmp_path / "whole")[name]) for name in whole)


def test_two_processes_do_the_work_of_one(few, tmp_path, monkeypatch):
    flags = ["--dataset=gsm8k", "--max_steps=4", "--micro_batch_size=2"]
    main(monkeypatch, few.parent, tmp_path / "one", *flags)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "sft_gsm8k.py"),
    ]
    place = [f"--data_dir={few.parent}", f"--out_dir={tmp_path / 'two'}"]
    done = subprocess.run(
        [*command, *TINY_FLAGS, *place, *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for (name, a), b in zip(weights(tmp_path / "one").items(), weights(tmp_path / "two").values()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("variant", ["--n_sink=0", "--n_sink=1", "--gated_attention=True"])
def test_a_pretrained_checkpoint_keeps_its_variant_and_may_change_its_length(
    few, tmp_path, monkeypatch, variant
):
    main(
        monkeypatch,
        few.parent,
        tmp_path / "a",
        "--dataset=gsm8k",
        "--max_steps=1",
        "--block_size=70",
        variant,
    )
    pretrained = [
        f"--init_from={tmp_path / 'a'}",
        f"--out_dir={tmp_path / 'b'}",
        f"--data_dir={few.parent}",
        "--dataset=gsm8k",
    ]
    flags = [
        "--max_steps=1",
        "--batch_size=4",
        "--micro_batch_size=4",
        "--eval_seqs=4",
        "--device=cpu",
        "--block_size=64",
    ]
    monkeypatch.setattr(sys, "argv", ["sft_gsm8k.py", *pretrained, *flags])
    sft_gsm8k.main()
    a, b = (load_checkpoint(tmp_path / name)["model_config"] for name in "ab")
    assert (a.pop("block_size"), b.pop("block_size")) == (70, 64) and a == b


@pytest.mark.parametrize("flag", ["epochs=1", "block_size=63", "dataset=arithmetic"])
def test_every_option_changes_the_result(few, tmp_path, monkeypatch, flag):
    """The others are TrainConfig's, and tested there; but align_documents, which is refused."""
    prepare(PrepareConfig(data_dir=str(few.parent), num_problems=50, tokenizer="bytes"))
    plain = ["--dataset=gsm8k", "--epochs=2", "--block_size=120"]
    main(monkeypatch, few.parent, tmp_path / "a", *plain)
    main(monkeypatch, few.parent, tmp_path / "b", *plain, f"--{flag}")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_lengths_exclude_each_other():
    assert SFTConfig().out_dir == "out/sft-gsm8k"
    with pytest.raises(ValueError, match="max_steps and train_flops and epochs are all None"):
        parse(SFTConfig, ["--epochs=None"])
    for flag, message in {
        "epochs=-1": "epochs is -1.0; it must be a number above 0",
        "epochs=inf": "epochs is inf; it must be a number above 0",
        "align_documents=True": "align_documents is for pretraining",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse(SFTConfig, [f"--{flag}"])
    with pytest.raises(
        ValueError, match=r"max_steps \(command line\) and epochs \(command line\) all set the length"
    ):
        settle(*parse(SFTConfig, ["--epochs=3", "--max_steps=5"]))
    papers = [str(ROOT / "config" / "sft_gsm8k.py"), "--init_from=scratch"]
    for flags in ([], papers):
        cfg, _ = settle(*parse(SFTConfig, [*flags, "--max_steps=5"]))
        assert (cfg.max_steps, cfg.epochs, cfg.train_flops) == (5, None, None)
    cfg, _ = settle(*parse(SFTConfig, papers))
    assert (cfg.max_steps, cfg.epochs, cfg.batch_size, cfg.block_size) == (None, 10, 256, 256)
    assert (cfg.learning_rate, cfg.min_lr, cfg.warmup) == (2e-4, 2e-5, 0.01)  # the paper's


def test_what_does_not_fit_is_refused(few, tmp_path, monkeypatch, data_dir):
    main(monkeypatch, few.parent, tmp_path / "a", "--dataset=gsm8k", "--max_steps=1")
    with pytest.raises(ValueError, match="has other settings than this script: resume it with the script"):
        settle(*parse(TrainConfig, ["--init_from=resume", f"--out_dir={tmp_path / 'a'}"]))
    meta = load_meta(few)
    with pytest.raises(
        ValueError, match="none of the 22 examples of .*train_cuts.npy fits into block_size 9; raise it"
    ):
        load_examples(few, meta, "train", 9)
    with pytest.raises(
        ValueError, match="0.1 epochs of 21 examples are less than one batch of 8; raise epochs"
    ):
        main(monkeypatch, few.parent, tmp_path / "b", "--dataset=gsm8k", "--epochs=0.1")
    tokens, cuts = (few / "train.bin").read_bytes(), (few / "train_cuts.npy").read_bytes()
    for bad_tokens, bad_cuts in (
        (bytes(len(tokens)), cuts),
        (tokens[:-20], cuts),
        (tokens, cuts[:200]),
        (tokens, b""),
    ):
        (few / "train.bin").write_bytes(bad_tokens)
        (few / "train_cuts.npy").write_bytes(bad_cuts)
        with pytest.raises(
            ValueError,
            match="train_cuts.npy and train.bin do not belong together; prepare the data set again",
        ):
            load_examples(few, meta, "train", 64)
    (few / "train_cuts.npy").unlink()
    with pytest.raises(
        ValueError, match="train_cuts.npy not found: fine-tuning takes problems; prepare them with"
    ):
        load_examples(few, meta, "train", 64)


# ---- asking


def test_responses_do_not_depend_on_the_batch():
    """64 prompts of 1 to 15 tokens in one batch, and each alone: the same tokens, and as many forward passes as it needs."""
    model = make_model(block_size=20)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 11, (1 + i % 15,), generator=generator).tolist() for i in range(64)]
    random = {"remasking": "random", "temperature": 0.5, "cfg_scale": 0.5, "steps": 12}
    waiting = {
        "block_length": 4,
        "prefix_cache": True,
        "steps": 20,
    }  # rows wait for each other, but that is no pass
    for length, options in (
        (20, {"temperature": 0.8, "steps": 256}),
        (20, random),
        (17, {"steps": 5}),
        (20, waiting),
    ):
        together, passes = respond(model, prompts, 3, list(range(64)), length=length, **options)
        assert len({len(response) for response in together}) > 5
        for i in range(0, 64, 5):
            assert respond(model, prompts[i : i + 1], 3, [i], length=length, **options) == (
                [together[i]],
                [passes[i]],
            )
            x = torch.full((1, length), 11)
            x[0, : len(prompts[i])] = torch.tensor(prompts[i])
            filled, n_forward = generate(model, x, seeds=[i], eot_id=3, **options)
            whole = filled[0, len(prompts[i]) :].tolist()
            assert n_forward == passes[i] and together[i] == whole[: whole.index(3) if 3 in whole else None]


def test_prompts_without_room():
    responses, passes = respond(make_model(), [[1] * 16, None, [1] * 15, [1] * 17], 3, [0, 1, 2, 3])
    assert (
        responses[0] is responses[1] is responses[3] is None
        and len(responses[2]) <= 1
        and passes == [0, 0, 1, 0]
    )
    assert respond(make_model(), [None], 3, [0]) == ([None], [0])


def test_a_row_ends_with_its_first_end_of_text():
    """Stopped early or not, the same response, for fewer forward passes; an end-of-text in the prompt ends nothing."""
    model = make_model(block_size=20)
    x = torch.full((40, 20), 11)
    x[:, :2] = torch.tensor([3, 5])
    seeds, options = list(range(40)), {"steps": 18, "temperature": 1.0}
    full, n_full = generate(model, x, seeds=seeds, **options)
    states = []
    short, n_short = generate(model, x, seeds=seeds, eot_id=3, on_step=states.append, **options)
    ends = [(row[2:] == 3).nonzero()[:, 0].tolist() for row in full]
    assert n_full == 18 >= n_short and sum(bool(end) for end in ends) > 20
    early = 0
    for row, end in enumerate(ends):
        end = 2 + end[0] if end else 20
        assert torch.equal(short[row, :end], full[row, :end]) and (short[row] != 11).all()
        steps = sum(bool((state[row] == 11).any()) for state in states)
        early += steps < 17
        for state in states:  # no row is closed while something before its end-of-text is hidden
            assert (state[row] == 11).any() or not (state[row, :end] == 11).any()
    assert early > 10


def test_solve_goes_on_with_the_ids_it_wrote(monkeypatch):
    """The second prompt is the first one and the response, id for id, though other ids spell the same text."""
    ranks = [bytes([byte]) for byte in range(256)] + [b"AB"]
    spec = {
        "name": "bpe",
        "pattern": r"\s|\S+",
        "vocab_size": 258,
        "ranks": [base64.b64encode(token).decode() for token in ranks],
    }
    tokenizer = load_tokenizer(spec)
    assert tokenizer.encode_ordinary(" AB") == [32, 256]
    calls = []

    def fake(model, prompts, eot_id, seeds, on_step=None, **options):
        calls.append((prompts, seeds, options))
        return ([[32, 65, 66], None], [3, 4]) if len(calls) == 1 else ([[32, 67], None], [5, 0])

    monkeypatch.setattr(sft_gsm8k, "respond", fake)
    solved = solve(None, tokenizer, ["q", " r "], [8, 9], {"steps": 2}, {"steps": 7})
    assert solved == [("AB", "C", 8), (None, None, 4)]
    (first, seeds_1, options_1), (second, seeds_2, options_2) = calls
    assert first == [list(b"Question: q"), list(b"Question: r")] and second == [list(b"Question: q AB"), None]
    assert (options_1, options_2) == ({"steps": 2}, {"steps": 7}) and len({*seeds_1, *seeds_2}) == 4


def test_what_is_learned_is_answered(few, tmp_path, monkeypatch):
    """A model that has learned a few problems by heart answers them through both stages, and stops by itself."""
    flags = ["--dataset=gsm8k", "--n_embd=64", "--max_steps=500", "--batch_size=12", "--micro_batch_size=12"]
    flags += ["--learning_rate=3e-3", "--stratified_t=True", "--eval_interval=500"]
    main(monkeypatch, few.parent, tmp_path / "a", *flags)
    model, meta = MDM.from_checkpoint(tmp_path / "a"), load_meta(few)
    solved = solve(
        model, load_tokenizer(meta["tokenizer"]), [f"What is {i} + {i + 1}?" for i in (10, 15, 20)], [0, 1, 2]
    )
    assert [(thoughts, answer) for thoughts, answer, _ in solved] == [
        (f"Answer: <<{i}+{i + 1}={2 * i + 1}>>", f"#### {2 * i + 1}") for i in (10, 15, 20)
    ]
