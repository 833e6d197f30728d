"""Turns a corpus into token files: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                                   # arithmetic: generated word problems, no network
    python prepare_data.py shakespeare --tokenizer=bytes     # downloads 1 MB of text
    python prepare_data.py text --source=my_folder           # .txt and .jsonl ("text" field) files, also .gz and .xz
    python prepare_data.py fineweb_edu --max_tokens=1e9      # streams from the hub (pip install datasets)

A .bin file is the tokens of all documents, one after another as uint16 (uint32 for a vocabulary over 65,536), each document
closed by the end-of-text token. Files are read as streams and encoded on all cores, so a corpus may be larger than memory: what
must fit is a document of a .jsonl or hub source, and some megabytes of text. Word problems (arithmetic, gsm8k) become documents
"Question: ... Answer: <<3+4=7>> #### 7"; train_cuts.npy and val_cuts.npy tell sft_gsm8k.py where their parts begin.
"""

import base64
import collections
import gzip
import hashlib
import heapq
import http.client
import io
import json
import lzma
import operator
import os
import random
import sys
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

import configurator

EOT = "<|endoftext|>"
CHARS_AT_ONCE = 1 << 20  # text encoded as one piece of work; longer documents are cut at the end of a line


@dataclass
class PrepareConfig:
    name: str = (
        "arithmetic"  # data set: arithmetic, shakespeare, wikitext2, tinystories, openwebtext, ... or text
    )
    source: str | None = (
        None  # file, folder, URL or hub:ID[@CONFIG][:SPLIT]; None: the public source of the data set
    )
    val_source: str | None = (
        None  # the same for validation; None: the public one, or the last val_fraction of source
    )
    val_fraction: float | None = None  # share of the tokens held out from the end; None: as the data set says
    tokenizer: str | None = None  # gpt2, bytes, or bpe (trained on the corpus); None: as the data set says
    vocab_size: int | None = None  # of a bpe tokenizer, end-of-text included; None: 4096 (arithmetic: 512)
    split_digits: bool | None = None  # every digit its own token; None: for arithmetic and gsm8k
    max_tokens: int | None = None  # stop after so many tokens of source
    data_dir: str = "data"  # the files go to data_dir/name
    num_problems: int = 50000  # arithmetic: training problems (1,000 more each for validation and test)
    seed: int = 0  # arithmetic: seed of the generator

    def __post_init__(self):
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}; wanted at least 2")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


@dataclass
class Corpus:
    source: str | None
    val_source: str | None = None
    val_fraction: float = 0.01
    documents: str = "marked"  # 'marked' by <|endoftext|>, wikitext 'articles', or 'problems', one a line
    tokenizer: str = "gpt2"
    test_source: str | None = None  # problems for eval.py; None: test.txt beside the prepared data


GITHUB, HF = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"
ICOT = "https://media.githubusercontent.com/media/da03/implicit_chain_of_thought/main/data/gsm8k"  # resolves Git LFS
WIKITEXT2 = f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2"
TINYSTORIES = f"{HF}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4"
CORPORA = {
    "arithmetic": Corpus(None, documents="problems", tokenizer="bpe"),
    "gsm8k": Corpus(
        f"{ICOT}/train.txt",
        f"{GITHUB}/da03/implicit_chain_of_thought/main/data/gsm8k/valid.txt",  # 500 lines of GSM8K's training set
        val_fraction=0.02,
        documents="problems",
        test_source=f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
    ),
    "shakespeare": Corpus(
        f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        val_fraction=0.1,
        tokenizer="bytes",
    ),
    "wikitext2": Corpus(f"{WIKITEXT2}/train.txt", f"{WIKITEXT2}/valid.txt", documents="articles"),
    "tinystories": Corpus(f"{TINYSTORIES}-train.txt", f"{TINYSTORIES}-valid.txt"),
    "openwebtext": Corpus("hub:Skylion007/openwebtext:train", val_fraction=0.0005),
    "fineweb_edu": Corpus("hub:HuggingFaceFW/fineweb-edu@sample-10BT:train", val_fraction=0.0005),
    "slimpajama": Corpus("hub:cerebras/SlimPajama-627B:train", "hub:cerebras/SlimPajama-627B:validation"),
    "text": Corpus(None),
}

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: tiktoken encodings, described by a small dict that meta.json and every checkpoint carry

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
TOKENIZERS = ("gpt2", "bytes", "bpe")
DIGIT_PATTERN = PATTERN.replace(r" ?\p{N}+", r"\p{N}")


def load_tokenizer(spec: dict) -> tiktoken.Encoding:
    """The encoding of a tokenizer dict: name (gpt2, bytes, bpe), pattern, vocab_size, and for bpe its ranks in base64."""
    if spec["name"] == "gpt2":
        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except OSError as error:
            raise ValueError(
                f"the gpt2 vocabulary could not be downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder "
                f"that holds it, or choose --tokenizer=bytes or --tokenizer=bpe"
            ) from error
    elif spec["name"] == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
    else:
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
    try:
        special = {EOT: spec["vocab_size"] - 1}
        return tiktoken.Encoding(
            spec["name"],
            pat_str=spec["pattern"],
            mergeable_ranks=ranks,
            special_tokens=special,
            explicit_n_vocab=spec["vocab_size"],
        )
    except Exception as error:  # tiktoken has no error of its own for ranks and patterns that are none
        raise ValueError(
            f"the tokenizer's description is damaged ({error!r}); prepare the data set again"
        ) from error


def make_tokenizer(name: str, split_digits: bool, vocab_size: int, texts) -> dict:
    """A tokenizer dict. vocab_size and texts, what it is trained on, count only for bpe."""
    spec = {"name": name, "pattern": DIGIT_PATTERN if split_digits else PATTERN}
    if name != "bpe":
        return {**spec, "vocab_size": 50257 if name == "gpt2" else 257}
    if vocab_size < 258:
        raise ValueError(
            f"vocab_size is {vocab_size}; bpe needs at least 258: 256 bytes, one merge, end-of-text"
        )
    ranks = train_bpe(texts, spec["pattern"], vocab_size - 1)
    return {
        **spec,
        "vocab_size": len(ranks) + 1,
        "ranks": [base64.b64encode(token).decode() for token in ranks],
    }


def train_bpe(texts, pattern: str, n_tokens: int, max_chars: int = 50_000_000) -> dict[bytes, int]:
    """Byte pair encoding: starting from the 256 bytes, merge the most frequent neighbours into a new token until there are
    n_tokens. Learned from the first max_chars characters. Ties go to the smaller bytes, so the result is reproducible."""
    counts = collections.Counter()
    for text in texts:
        counts.update(regex.findall(pattern, text))
        max_chars -= len(text)
        if max_chars <= 0:
            break
    words = [
        ([bytes([byte]) for byte in word.encode("utf-8", "replace")], count)
        for word, count in sorted(counts.items())
    ]
    ranks = {bytes([byte]): byte for byte in range(256)}
    pairs = collections.Counter()  # two neighbouring tokens, joined -> how often
    where = collections.defaultdict(set)  # ... -> the words that hold them

    def count_pairs(index, sign):
        parts, count = words[index]
        for left, right in zip(parts, parts[1:]):
            pairs[left + right] += sign * count
            where[left + right].add(index)

    for index in range(len(words)):
        count_pairs(index, +1)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < n_tokens:
        count, pair = heapq.heappop(heap)
        if pairs[pair] < 2 or pair in ranks:
            continue
        if pairs[pair] != -count:  # the count has changed since it was pushed
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        ranks[pair] = len(ranks)
        for index in sorted(where.pop(pair)):
            parts, count = words[index]
            before = set(zip(parts, parts[1:]))
            count_pairs(index, -1)
            merged = []
            for part in parts:
                if merged and merged[-1] + part == pair:
                    merged[-1] = pair
                else:
                    merged.append(part)
            words[index] = (merged, count)
            count_pairs(index, +1)
            for left, right in set(zip(merged, merged[1:])) - before:
                heapq.heappush(heap, (-pairs[left + right], left + right))
    return ranks


# ---------------------------------------------------------------------------------------------------------------------
# Reading: a source is a stream of documents in pieces (text, is_end_of_document), whatever its size


class Source:
    """Documents of a file, folder, URL or hub data set. bytes_read / bytes_total (None if unknown) tell how far it is."""

    def __init__(self, address: str, documents: str, download_dir: str):
        self.address, self.documents = address, documents
        self.bytes_read, self.bytes_total = 0, None
        self.malformed, self.first_malformed = 0, None
        self.paths = []
        if address.startswith("hub:"):
            if documents == "problems":
                raise ValueError(
                    f"{address}: problems are read from files; give a .txt, a .jsonl, a folder or a URL of one"
                )
            return
        path = download(address, download_dir) if "://" in address else address
        if not os.path.exists(path):
            raise ValueError(f"source {path} not found")
        files = [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names] or [path]
        self.paths = sorted(file for file in files if file_kind(file) is not None)
        if not self.paths:
            raise ValueError(
                f"{path}: wanted .txt or .jsonl files (also as .gz or .xz), a folder or one of them"
            )
        self.bytes_total = sum(os.path.getsize(p) for p in self.paths)

    def __iter__(self):
        self.bytes_read, self.malformed = 0, 0
        if not self.paths:
            yield from read_hub(self.address)
        for path in self.paths:
            yield from self.read_file(path)

    def read_file(self, path):
        base = self.bytes_read
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(path)[1], lambda raw: raw)
        with open(path, "rb") as raw:
            if raw.peek(40).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{path} is a Git LFS pointer of a few lines, not the file itself; fetch it with git lfs pull"
                )
            lines = io.TextIOWrapper(opener(raw), encoding="utf-8", newline="\n")
            try:
                for piece in self.split(lines, path):
                    self.bytes_read = base + raw.tell()
                    yield piece
            except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"{path} cannot be read as UTF-8 text ({error}); convert or unpack it anew"
                ) from error

    def split(self, lines, path):
        """Lines of one file -> (text, is_end_of_document)."""
        is_json = file_kind(path) == ".jsonl"
        if self.documents == "problems":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from self.split_problem(line, is_json, f"{path}, line {number}")
        elif is_json:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield json_text(line, path, number), True
        else:
            yield from self.split_text(
                iter(lambda: lines.readline(CHARS_AT_ONCE), "")
            )  # a longer line comes in parts

    def split_problem(self, line, is_json, place):
        """The three parts of a problem. A part begins with a space, where every tokenizer begins a new word: so its tokens are
        the same alone, as an evaluation meets them, and in the middle of the text."""
        problem = parse_problem(line, is_json)
        if problem is None:
            self.malformed += 1
            self.first_malformed = self.first_malformed or place
            return
        for text, begins in zip(problem, ("Question: ", " Answer: ", " #### ")):
            yield (begins + text).rstrip(), begins == " #### "

    def report_malformed(self):
        if self.malformed:
            print(
                f"{self.address}: left out {self.malformed:,} lines that are neither 'question||thoughts #### answer' nor JSON "
                f"with 'question' and 'answer #### number'; the first is {self.first_malformed}"
            )

    def split_text(self, lines):
        text, size = [], 0
        for line in lines:
            if self.documents == "articles" and regex.fullmatch(r" = [^=\s].* = \n", line):
                yield "".join(text), True
                text, size = [], 0
            *ended, rest = line.split(EOT)
            for end in ended:
                yield ("".join(text) + end).removesuffix("\n"), True
                text, size, rest = [], 0, rest.removeprefix("\n")
            # A long document is cut where one line end stands between two other characters: no tokenizer pattern reads
            # across. Only where there is no such place for long is it cut anywhere.
            lone_line_end = text and regex.search(r"\S\n$", text[-1]) and not rest[:1].isspace()
            if size > (CHARS_AT_ONCE if lone_line_end else 16 * CHARS_AT_ONCE):
                yield "".join(text), False
                text, size = [], 0
            text.append(rest)
            size += len(rest)
        yield "".join(text), True


def file_kind(path):
    stem, suffix = os.path.splitext(path.lower())
    kind = os.path.splitext(stem)[1] if suffix in (".gz", ".xz") else suffix
    return kind if kind in (".txt", ".jsonl") else None


def json_text(line, path, number):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{path}, line {number}: wanted an object with a 'text' field, got {found}")
    return row["text"]


def parse_problem(line, is_json):
    """(question, thoughts, answer) of a line; None if it has no question or no answer. Two forms are known:

    question||thoughts #### answer                     the augmented GSM8K; thoughts are equations, <<3+4=7>> <<7*2=14>>
    {"question": ..., "answer": "... #### answer"}     OpenAI's files; the equations are picked out of the prose"""
    if is_json:
        try:
            row = json.loads(line)
            question, solution = row["question"] + "", row["answer"] + ""  # texts, or a TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    else:
        question, _, solution = line.partition("||")
    thoughts, hashes, answer = solution.rpartition("####")
    if is_json:
        thoughts = " ".join(regex.findall(r"<<.*?>>", thoughts))
    if not (hashes and question.strip() and answer.strip()):
        return None
    return question.strip(), thoughts.strip(), answer.strip()


def read_hub(address):
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "a hub data set needs the datasets package: pip install datasets (or give --source=path)"
        ) from error
    rest, _, split = address.removeprefix("hub:").partition(":")
    name, _, config = rest.partition("@")
    for row in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
        yield row["text"], True


def download(url, folder):
    """Local path of a URL's file, fetched once into folder. Raises ValueError if it cannot be had whole."""
    name = os.path.basename(url.split("?")[0].split("#")[0])
    path = os.path.join(folder, f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        print(f"downloading {url}")
        try:
            with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
                urllib.request.urlretrieve(
                    url, path + ".tmp", lambda blocks, size, total: bar.update(blocks * size - bar.n)
                )
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(
                f"cannot download {url} ({error}); give the path of a local copy instead"
            ) from error
        os.replace(path + ".tmp", path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def encode(pieces, tokenizer, dtype):
    """(text, is_end_of_document) pairs -> their tokens, each document closed by end-of-text; and how many tokens each pair gave."""
    arrays = []
    for text, is_end in pieces:
        text = text.encode(
            "utf-8", "replace"
        ).decode()  # half a surrogate pair, which JSON may hold, becomes a question mark
        tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        arrays.append(np.append(tokens, tokenizer.eot_token) if is_end else tokens)
    return np.concatenate(arrays).astype(dtype), [len(tokens) for tokens in arrays]


def group(source):
    """Documents that hold anything, in lists of about CHARS_AT_ONCE characters."""
    pieces, size, is_open = [], 0, False
    for text, is_end in source:
        if not text.strip() and not is_open:
            continue
        is_open = not is_end
        pieces.append((text, is_end))
        size += len(text)
        if size >= CHARS_AT_ONCE:
            yield pieces
            pieces, size = [], 0
    if pieces:
        yield pieces


def write_tokens(path, source, tokenizer, dtype, max_tokens):
    """Writes a source's tokens to path. Returns the number of tokens and of documents; and of problems, for each one, where its
    question, thoughts and answer begin and where it ends: (documents, 4)."""
    n_tokens, n_documents, start, last_line = 0, 0, time.time(), time.time()
    sizes = []  # of the parts of problems
    workers = os.cpu_count() or 1
    waiting = collections.deque()  # work under way, in order; its length bounds the memory
    groups = group(source)
    bar = tqdm(
        desc=os.path.basename(path).removesuffix(".tmp"),
        unit="tok",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    )
    with open(path, "wb") as file, ThreadPoolExecutor(workers) as pool, bar:  # tiktoken releases the GIL
        while max_tokens is None or n_tokens < max_tokens:
            while len(waiting) < 2 * workers and (pieces := next(groups, None)):
                waiting.append(pool.submit(encode, pieces, tokenizer, dtype))
            if not waiting:
                break
            tokens, new_sizes = waiting.popleft().result()
            if source.documents == "problems":
                sizes += new_sizes
            if max_tokens is not None:
                tokens = tokens[: max_tokens - n_tokens]
            tokens.tofile(file)
            n_tokens, n_documents = (
                n_tokens + len(tokens),
                n_documents + int((tokens == tokenizer.eot_token).sum()),
            )
            if source.bytes_total and source.bytes_read:
                bar.total = max(n_tokens, int(n_tokens * source.bytes_total / source.bytes_read))
            bar.update(len(tokens))
            if bar.disable and time.time() - last_line > 30:
                last_line = time.time()
                print(f"{n_tokens:,} tokens, {n_tokens / (last_line - start):,.0f} tokens/s", flush=True)
        file.flush()
        os.fsync(file.fileno())
    bounds = np.cumsum([0, *sizes])
    cuts = bounds[np.arange(0, len(sizes) - 2, 3)[:, None] + np.arange(4)]
    return n_tokens, n_documents, cuts[cuts[:, 3] <= n_tokens]


def split_tail(train_path, val_path, dtype, fraction, eot_id, problem_starts):
    """Moves about the last fraction of train_path's tokens to val_path, from the start of a document where there is one; or the
    last fraction of the problems, if that is what the file holds."""
    tokens = np.memmap(train_path, dtype, mode="r")
    if len(problem_starts):
        cut = int(problem_starts[-max(1, round(len(problem_starts) * fraction))])
    else:
        size = max(1, round(len(tokens) * fraction))
        cut = len(tokens) - size
        ends = np.flatnonzero(tokens[cut:-1] == eot_id)
        if len(ends) and ends[0] < size / 2:  # else the rest would be too small; then cut within a document
            cut += int(ends[0]) + 1
    with open(val_path, "wb") as file:
        for start in range(cut, len(tokens), 1 << 24):
            tokens[start : start + (1 << 24)].tofile(file)
    n_train, n_val = cut, len(tokens) - cut
    del tokens
    os.truncate(train_path, n_train * dtype.itemsize)
    return n_train, n_val


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(cfg: PrepareConfig) -> dict:
    """Writes data_dir/name/{train.bin,val.bin,meta.json} and returns the meta. The files appear only when all is complete,
    meta.json last. Raises ValueError for a source that cannot be read or is too short."""
    if cfg.name not in CORPORA:
        raise ValueError(f"unknown data set {cfg.name!r}; there are {', '.join(CORPORA)}")
    if cfg.tokenizer not in (None, *TOKENIZERS):
        raise ValueError(f"unknown tokenizer {cfg.tokenizer!r}; there are {', '.join(TOKENIZERS)}")
    corpus = CORPORA[cfg.name]
    folder = os.path.join(cfg.data_dir, cfg.name)
    address, val_address = (
        cfg.source or corpus.source,
        cfg.val_source or (None if cfg.source else corpus.val_source),
    )
    stated = address, val_address
    if cfg.name == "arithmetic":
        if cfg.source or cfg.val_source:
            raise ValueError(
                "arithmetic is generated and takes no source; for your own problems use gsm8k --source=..."
            )
        address, val_address = write_arithmetic(folder, cfg.num_problems, cfg.seed)
        stated = f"generated, seed {cfg.seed}", f"generated, seed {cfg.seed}"
    if address is None:
        raise ValueError(f"data set {cfg.name!r} has no public source; give --source=file-or-folder")
    fraction = corpus.val_fraction if cfg.val_fraction is None else cfg.val_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction is {fraction}; it must lie between 0 and 1")
    has_problems = corpus.documents == "problems"
    download_dir = os.path.join(folder, "download")
    source = Source(address, corpus.documents, download_dir)
    val_source = Source(val_address, corpus.documents, download_dir) if val_address else None

    split_digits = has_problems if cfg.split_digits is None else cfg.split_digits
    vocab_size = (512 if cfg.name == "arithmetic" else 4096) if cfg.vocab_size is None else cfg.vocab_size
    spec = make_tokenizer(
        cfg.tokenizer or corpus.tokenizer, split_digits, vocab_size, (text for text, _ in source)
    )
    tokenizer = load_tokenizer(spec)
    dtype = np.dtype("uint16" if spec["vocab_size"] <= 1 << 16 else "uint32")

    os.makedirs(folder, exist_ok=True)
    names = ["train.bin", "val.bin"] + (["train_cuts.npy", "val_cuts.npy"] if has_problems else [])
    partial = {name: os.path.join(folder, f"{name}.tmp") for name in names}
    try:
        n_tokens, n_documents, cuts = write_tokens(
            partial["train.bin"], source, tokenizer, dtype, cfg.max_tokens
        )
        if n_tokens < 2:
            raise ValueError(f"{address} is empty: it gives {n_tokens} tokens")
        if val_source:
            n_val, _, val_cuts = write_tokens(partial["val.bin"], val_source, tokenizer, dtype, None)
            if n_val == 0:
                raise ValueError(f"{val_address} is empty: it gives no tokens")
        else:
            paths = partial["train.bin"], partial["val.bin"]
            n_tokens, n_val = split_tail(*paths, dtype, fraction, tokenizer.eot_token, cuts[:, 0])
            cuts, val_cuts = cuts[cuts[:, 3] <= n_tokens], cuts[cuts[:, 0] >= n_tokens] - n_tokens
        if has_problems:
            if not (len(cuts) and len(val_cuts)):
                raise ValueError(
                    f"{address} has too few problems to train on some and hold out others; wanted at least two"
                )
            for name, array in {"train_cuts.npy": cuts, "val_cuts.npy": val_cuts}.items():
                with open(partial[name], "wb") as file:
                    np.save(file, array)
        for one in filter(None, (source, val_source)):
            one.report_malformed()
        meta = {
            "name": cfg.name,
            "source": stated[0],
            "val_source": stated[1] or f"last {fraction} of the tokens",
            "documents": n_documents,
            "one_per_line": has_problems,
            "vocab_size": spec["vocab_size"],
            "eot_id": tokenizer.eot_token,
            "dtype": dtype.name,
            "tokens": {"train": n_tokens, "val": n_val},
            "sha256": {name.split(".")[0]: file_sha256(path) for name, path in partial.items()},
            "tokenizer": spec,
        }
        meta_path = os.path.join(folder, "meta.json")
        with open(meta_path + ".tmp", "w") as file:
            json.dump(meta, file, indent=1)
        if os.path.exists(meta_path):
            os.remove(meta_path)  # from here until the last rename the folder counts as not prepared
        for path in partial.values():
            os.replace(path, path.removesuffix(".tmp"))
        os.replace(meta_path + ".tmp", meta_path)
    finally:
        for path in partial.values():
            if os.path.exists(path):
                os.remove(path)
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: grade-school word problems. One line each: question||<<3+4=7>> <<7*2=14>> #### 14

NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Zoe", "Leo", "Eva", "Jim", "Ada"]
THINGS = [
    "apples",
    "books",
    "coins",
    "shells",
    "pens",
    "cards",
    "eggs",
    "stamps",
    "nuts",
    "keys",
    "cups",
    "hats",
]
# A question, and its one or two equations: a, b, c are the numbers of the question, x is the first result.
TEMPLATES = [
    ("{name} has {a} {things} and buys {b} more. How many now?", "a+b"),
    ("{name} has {a} {things} and gives {b} to {friend}. How many are left?", "a-b"),
    ("{name} has {a} boxes of {b} {things}. How many in all?", "a*b"),
    ("{name} shares {a} {things} among {b} children. How many for each?", "a/b"),
    ("{name} has {a} {things}, finds {b} and loses {c}. How many now?", "a+b", "x-c"),
    ("{name} buys {a} bags of {b} {things} and loses {c}. How many are left?", "a*b", "x-c"),
    ("{name} has {a} {things}. {friend} has {b} times as many. How many together?", "a*b", "a+x"),
    (
        "{name} has {a} {things} and {friend} has {b}. They make {c} equal piles. How many in each?",
        "a+b",
        "x/c",
    ),
    ("{name} has {a} {things}, sells {b} and fills {c} equal bags. How many in each?", "a-b", "x/c"),
    (
        "{name} has {a} {things} and loses {b}. {friend} has {c} times as many. How many is that?",
        "a-b",
        "x*c",
    ),
    ("{name} shares {a} {things} among {b} boxes and adds {c} to each. How many in each?", "a/b", "x+c"),
    (
        "{name} shares {a} {things} among {b} plates and takes {c} from one. How many are left on it?",
        "a/b",
        "x-c",
    ),
]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def make_problem(rng: random.Random) -> str:
    """One random problem. Its results are whole numbers from 1 to 20: a small model learns such sums in minutes."""
    question, *equations = rng.choice(TEMPLATES)
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    while True:  # draw numbers until every result is whole and small
        numbers = {"a": rng.randint(2, 9), "b": rng.randint(2, 5), "c": rng.randint(2, 5)}
        thoughts = []
        for left, sign, right in equations:
            p, q = numbers[left], numbers[right]
            result = OPERATIONS[sign](p, q)
            if result != int(result) or not 1 <= result <= 20:
                break
            numbers["x"] = int(result)
            thoughts.append(f"<<{p}{sign}{q}={numbers['x']}>>")
        else:
            return f"{question.format(name=name, friend=friend, things=things, **numbers)}||{' '.join(thoughts)} #### {numbers['x']}"


def write_arithmetic(folder, num_problems, seed):
    """Writes train.txt, valid.txt (1,000 problems) and test.txt (1,000); no question stands twice. Returns the first two."""
    if not 1 <= num_problems <= 100_000:
        raise ValueError(f"num_problems is {num_problems}; the grammar is good for 1 to 100,000")
    rng = random.Random(seed)
    problems = {}  # a dict keeps the order, and a question only once
    while len(problems) < num_problems + 2000:
        problems[make_problem(rng)] = None
    lines = list(problems)
    rng.shuffle(
        lines
    )  # short templates run out of new questions, so the last ones drawn would be of another kind
    os.makedirs(folder, exist_ok=True)
    for split, part in {"train": lines[:-2000], "valid": lines[-2000:-1000], "test": lines[-1000:]}.items():
        path = os.path.join(folder, f"{split}.txt")
        with open(path + ".tmp", "w") as file:
            file.write("\n".join(part) + "\n")
        os.replace(path + ".tmp", path)
    return os.path.join(folder, "train.txt"), os.path.join(folder, "valid.txt")


def main():
    cfg, set_by = configurator.parse(PrepareConfig, positional="name")
    print(configurator.describe(cfg, set_by))
    start = time.time()
    meta = prepare(cfg)
    n_train, n_val = meta["tokens"]["train"], meta["tokens"]["val"]
    seconds = time.time() - start
    what = f"{n_train:,} training and {n_val:,} validation tokens, {meta['tokenizer']['name']} vocabulary of {meta['vocab_size']:,}"
    print(
        f"{os.path.join(cfg.data_dir, cfg.name)}: {what}, {seconds:.1f} s, {(n_train + n_val) / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    configurator.run(main)
