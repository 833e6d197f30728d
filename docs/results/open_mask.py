"""What does opening its causal mask do to a causal model? The experiment of docs/open_mask.md; no training.

    python -m docs.results.open_mask out/smollm2-vanilla data/stories data/wikitext2

The model is a converted one without a sink, the texts are the beginnings of held-out documents. It measures
the next-token cross-entropy of clean text, with a share of the edges to later tokens open, drawn anew for
each text, and with the first row as it is or self-only. docs/results/open_mask/losses.jsonl gets a row for
each condition: a run that was stopped goes on. At the end it prints the table and draws the picture."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import configurator
from model import seed_for
from prepare_data import load_meta
from sample import load_trained
from train import made_by, open_locked, whole_lines, write_file

FOLDER = "docs/results/open_mask"
T, N = 128, 64  # tokens of a text, texts of a kind
SHARES = [0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2]
ROWS = [("nothing", "as it is"), ("nothing", "self-only"), ("eot", "as it is"), ("eot", "self-only")]
CONTROL = ("nothing", "second row causal")
INITS = ["another token", "mean", "noise"]  # in place of end-of-text, self-only


def read_texts(folder):
    """(N, T) tokens: the first T of each document, then the next T of each, until there are N."""
    meta = load_meta(folder)
    tokens = np.memmap(f"{folder}/val.bin", meta["dtype"], mode="r").astype(np.int64)
    documents = np.split(tokens, np.flatnonzero(tokens == meta["eot_id"]) + 1)
    longest = max(map(len, documents))
    pieces = [document[start : start + T] for start in range(0, longest, T) for document in documents]
    return torch.from_numpy(np.stack([piece for piece in pieces if len(piece) == T][:N]))


def front_vector(model, tokenizer, front):
    """The embedding that stands in front of a text, (1, C); none for nothing."""
    wte = model.wte.weight[: model.config.vocab_size]
    eot = wte[tokenizer.eot_token]
    noise = torch.randn(eot.shape, generator=torch.Generator().manual_seed(0))
    return {
        "nothing": wte[:0],
        "eot": eot[None],
        "another token": wte[tokenizer.encode(" the")],
        "mean": wte.mean(dim=0, keepdim=True),
        "noise": (noise * eot.norm() / noise.norm())[None],
    }[front]


@torch.no_grad()
def losses(model, texts, vector, share, row, seed):
    """Mean cross-entropy of tokens 1, 2, ... of each text, (N,): nothing stands before token 0 that could
    predict it. Equal seeds open equal edges among the tokens, with or without a vector in front."""
    n, nll = len(vector), []
    for number, text in enumerate(tqdm(texts, leave=False, disable=None)):
        draw = torch.rand(T + 1, T + 1, generator=torch.Generator().manual_seed(seed_for(seed, number)))
        mask = torch.ones(T + n, T + n, dtype=torch.bool).tril() | (draw[1 - n :, 1 - n :] < share)
        kept = {"self-only": 0, "second row causal": 1}.get(row)  # it sees no later token
        if kept is not None:
            mask[kept, kept + 1 :] = False
        x = torch.cat((vector, model.wte(text)))[None]
        for block in model.blocks:
            x = block(x, model.rope_cos[: T + n], model.rope_sin[: T + n], mask)
        nll.append(F.cross_entropy(model.head(x[0, n:-1]), text[1:]).item())
    return nll


def show(rows):
    """Prints means, and differences on the same texts ± standard errors: to the causal mask with the same
    token in front; of other vectors, to end-of-text with the same share open. Draws the means."""
    results = {(r["texts"], r["front"], r["row"], r["share"]): np.array(r["nll"]) for r in rows if "nll" in r}
    kinds = list(dict.fromkeys(key[0] for key in results))
    Figure = configurator.need("matplotlib.figure", "matplotlib").Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for (kind, front, row, share), nll in results.items():
        if share == 0 and (front, row) == ROWS[0]:
            title = f"{kind}, in front; first row"
            print(f"\n{title:<40}{'share open':>10}{'nats per token':>17}{'more':>18}")
        other = (kind, front, "as it is", 0) if front not in INITS else (kind, "eot", "self-only", share)
        more, se = (nll - results[other]).mean(), (nll - results[other]).std(ddof=1) / len(nll) ** 0.5
        print(f"{front + '; ' + row:<40}{share:>10.1%}{nll.mean():>17.3f}{f'{more:.3f} ± {se:.3f}':>18}")
    percent = 100 * np.array(SHARES)
    for kind, axes in zip(kinds, panels):
        for front, row in ROWS:
            nll = np.array([results[kind, front, row, share] for share in SHARES])  # (shares, texts)
            errors = (nll - results[kind, front, row, 0]).std(axis=1, ddof=1) / nll.shape[1] ** 0.5
            color, name = ("tab:red", "open") if row == "as it is" else ("tab:green", "self-only")
            style, before = (".-", "nothing") if front == "nothing" else (".--", "end-of-text")
            label = f"{before} in front, first row {name}"
            axes.errorbar(percent, nll.mean(axis=1), errors, fmt=style, color=color, label=label)
        for key in results:
            if key[:3] == (kind, *CONTROL):
                label = "nothing in front, second row causal" if key[3] == 0.01 else None
                axes.plot(100 * key[3], results[key].mean(), "kx", label=label)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xticks(percent, [f"{share:g}" for share in percent])
        axes.set(title=kind, xlabel="% of the edges to later tokens that are open")
        axes.set_ylabel("next-token cross-entropy (nats per token)")
    axes.legend(fontsize="small")
    write_file(f"{FOLDER}/open_mask.png", figure.savefig)


def main():
    path, *folders = sys.argv[1:] or [None]
    if not folders:
        raise ValueError("wanted: python -m docs.results.open_mask CHECKPOINT DATA [DATA ...]")
    model, tokenizer, checkpoint = load_trained(path, "cpu")
    conditions = [(*front_row, share) for share in SHARES for front_row in ROWS]
    conditions += [(front, "self-only", share) for share in (0, 0.05) for front in INITS]
    conditions += [(*CONTROL, share) for share in (0.01, 0.05, 0.2)]
    with open_locked(f"{FOLDER}/losses.jsonl") as file:
        rows = [json.loads(line) for line in whole_lines(file.buffer).splitlines()]
        done = {(row["texts"], row["front"], row["row"], row["share"]) for row in rows if "nll" in row}
        rows.append(made_by() | {"model": checkpoint["meta"]["name"], **checkpoint["meta"]["source"]})
        print(json.dumps(rows[-1]), file=file, flush=True)
        for folder in folders:
            kind, texts = Path(folder).name, read_texts(folder)
            for front, row, share in tqdm(conditions, desc=kind, disable=None):
                if (kind, front, row, share) not in done:
                    vector = front_vector(model, tokenizer, front)
                    nll = losses(model, texts, vector, share, row, seed=0)
                    rows.append({"texts": kind, "front": front, "row": row, "share": share, "nll": nll})
                    print(json.dumps(rows[-1]), file=file, flush=True)
    show(rows)


if __name__ == "__main__":
    configurator.run(main)
