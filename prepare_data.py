"""Turns a corpus into token files: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                                # arithmetic: generated word problems, no network
    python prepare_data.py shakespeare                    # downloads 1 MB of text
    python prepare_data.py novels --source=my_folder      # texts of your own, under any name
    python prepare_data.py fineweb_edu --max_tokens=1e9   # streams from the hub (pip install datasets)

Public data sets: gsm8k, shakespeare, wikitext2, tinystories, fineweb_edu, slimpajama. Sources of your own are
.txt, .jsonl or .parquet files, also compressed (.gz, .xz, .zst), or folders of such files.
A .bin file is the tokens of all documents, one after another as uint16 (uint32 for a vocabulary over 65,536),
each closed by the end-of-text token. A word problem reads "Question: ... Answer: <<3+4=7>> #### 7"; _cuts.npy
files tell sft_gsm8k.py where the parts of each begin. Prepared data are never replaced: remove the folder."""

import collections
import contextlib
import glob
import hashlib
import itertools
import json
import os
import random
import tempfile
import unicodedata
import urllib.request
from dataclasses import asdict, dataclass

import fsspec
import numpy as np
import regex
import tiktoken
from tqdm import tqdm

import configurator

EOT = "<|endoftext|>"
PIECE = 1 << 14  # characters: a document of more than two pieces is encoded piece by piece


@dataclass
class PrepareConfig:
    name: str = "arithmetic"  # the files go to data_dir/name: a public data set, or any name with a source
    source: str | None = None  # file, folder, URL or hub:ID[@CONFIG][:SPLIT]; None: the public source
    val_source: str | None = None  # likewise; None: the public one, or documents held out from source
    test_source: str | None = None  # likewise, problems for eval.py
    val_fraction: float | None = None  # 1/n: hold out every n-th document; None: 0.01, or as in CORPORA
    documents: str | None = None  # problems, articles (WikiText), or marked: text between <|endoftext|> marks
    text_field: str = "text"  # of .jsonl, .parquet and hub rows
    tokenizer: str | None = None  # gpt2, bytes, words, or a tokenizer.json: a path, or a model on the hub
    vocab_size: int | None = None  # of words (None: 4096), or only the first tokens of gpt2
    max_tokens: float = 1e30  # stop after about this many tokens of source
    data_dir: str = "data"  # where the data sets are
    num_problems: int = 50000  # arithmetic: training problems (1,000 more each for validation and test)
    seed: int = 0  # arithmetic: seed of the generator

    def __post_init__(self):
        """Replaces None by the data set's default. Raises ValueError for settings that do not go together."""
        if os.path.exists(self.test_source or ""):
            self.test_source = os.path.abspath(self.test_source)
        defaults = {"val_fraction": 0.01, "documents": "marked", "tokenizer": "gpt2"}
        defaults |= CORPORA.get(self.name, {})
        if self.source:
            defaults.pop("val_source", None)
        for key, value in defaults.items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        if bool(self.source) == (self.name == "arithmetic") or not regex.fullmatch(r"\w[\w.-]*", self.name):
            wanted = f"wanted a new name with a --source, or {', '.join(CORPORA)} (arithmetic is generated)"
            raise ValueError(f"name {self.name!r}, source {self.source!r}: {wanted}")
        if self.documents not in MARKS or not 0 < self.val_fraction <= 0.5:
            wanted = f"wanted documents of {', '.join(MARKS)}, and val_fraction from 0 to 0.5"
            raise ValueError(f"{wanted}; got {self.documents!r}, {self.val_fraction}")


GITHUB, GITHUB_LFS = "https://raw.githubusercontent.com", "https://media.githubusercontent.com/media"
ICOT = "da03/implicit_chain_of_thought/main/data/gsm8k"
ICOT_TRAIN, ICOT_VAL = f"{GITHUB_LFS}/{ICOT}/train.txt", f"{GITHUB}/{ICOT}/valid.txt"
GSM_TEST = f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/test.jsonl"
SHAKESPEARE = f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
WIKI = f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2"
STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4"
FINEWEB, SLIMPAJAMA = "hub:HuggingFaceFW/fineweb-edu@sample-10BT", "hub:cerebras/SlimPajama-627B"
CORPORA = {  # what None stands for
    "arithmetic": {"test_source": "test.txt", "documents": "problems", "tokenizer": "words"},
    "gsm8k": {"source": ICOT_TRAIN, "val_source": ICOT_VAL, "test_source": GSM_TEST, "documents": "problems"},
    "shakespeare": {"source": SHAKESPEARE, "val_fraction": 0.1, "tokenizer": "bytes"},
    "wikitext2": {"source": f"{WIKI}/train.txt", "val_source": f"{WIKI}/valid.txt", "documents": "articles"},
    "tinystories": {"source": f"{STORIES}-train.txt", "val_source": f"{STORIES}-valid.txt"},
    "fineweb_edu": {"source": FINEWEB, "val_fraction": 0.0005},
    "slimpajama": {"source": f"{SLIMPAJAMA}:train", "val_source": f"{SLIMPAJAMA}:validation"},
}

# ---------- Tokenizers: described by a dict that meta.json and every checkpoint carry

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
DIGIT_PATTERN = PATTERN.replace(r" ?\p{N}+", r"\p{N}")


def make_tokenizer(name: str, split_digits: bool = False, vocab_size: int | None = None, texts=()) -> dict:
    """gpt2, or its first vocab_size - 1 tokens and end-of-text; bytes; words, the bytes and the commonest
    pieces of texts, up to a million texts; or a tokenizer.json. Raises ValueError if it is not available."""
    if vocab_size is not None and not (257 <= vocab_size <= 50257 and name in ("gpt2", "words")):
        raise ValueError(f"vocab_size is {vocab_size}; wanted 257 to 50257, with gpt2 or words")
    spec = {"name": name, "pattern": DIGIT_PATTERN if split_digits else PATTERN}
    if name == "gpt2":
        return spec | {"vocab_size": vocab_size or 50257}
    if name == "bytes":
        return spec | {"vocab_size": 257}
    if name == "words":
        counts = collections.Counter()
        for text in itertools.islice(texts, 1_000_000):
            counts.update(regex.findall(spec["pattern"], text))
        words = [word for word, _ in counts.most_common() if 1 < len(word.encode()) <= 64]
        words = words[: (vocab_size or 4096) - 257]
        return spec | {"vocab_size": 257 + len(words), "words": words}
    hub = configurator.need("tokenizers").Tokenizer
    try:
        tokenizer = hub.from_file(name) if os.path.exists(name) else hub.from_pretrained(name)
    except Exception as error:  # tokenizers defines no exception class
        wanted = "gpt2, bytes, words, the path of a tokenizer.json, or a model on the hub"
        raise ValueError(f"tokenizer {name!r} cannot be loaded ({error}); wanted {wanted}") from error
    ids = tokenizer.get_vocab()
    eot = [token for token in (EOT, "<|end_of_text|>", "</s>") if token in ids]
    if not eot:
        raise ValueError(f"tokenizer {name!r} lacks an end-of-text token: {EOT}, <|end_of_text|> or </s>")
    config = os.path.join(os.path.dirname(name), "config.json")
    if os.path.exists(config):  # of several, the one that the model uses comes first
        eos_ids = np.atleast_1d(read_json(config).get("eos_token_id"))
        eot.sort(key=lambda token: ids[token] not in eos_ids)
    data = json.loads(tokenizer.to_str()) | {"truncation": None, "padding": None}
    # Llama 2's puts a space in front of each text and takes it away again, so parts of a text would not join
    for key, kind in (("normalizer", "Prepend"), ("decoder", "Strip")):
        if steps := (data[key] or {}).get(f"{key}s"):
            steps[:] = [step for step in steps if step["type"] != kind]
    spec = {"name": "tokenizer.json", "pattern": None, "vocab_size": max(ids.values()) + 1}
    return spec | {"eot": eot[0], "json": json.dumps(data)}


def load_tokenizer(spec: dict):
    """The tiktoken.Encoding or HubTokenizer that a dict of make_tokenizer describes. Raises ValueError if
    GPT-2's vocabulary cannot be downloaded."""
    if "json" in spec:
        return HubTokenizer(spec)
    ranks = {bytes([byte]): byte for byte in range(256)}
    if spec["name"] == "gpt2":
        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except OSError as error:
            hint = "set TIKTOKEN_CACHE_DIR to a folder with its vocabulary, or choose --tokenizer=words"
            raise ValueError(f"gpt2 could not be downloaded ({type(error).__name__}); {hint}") from error
    for word in spec.get("words", []):
        ranks[word.encode()] = len(ranks)
    eot_id = spec["vocab_size"] - 1
    options = {"pat_str": spec["pattern"], "special_tokens": {EOT: eot_id}}
    ranks = {token: rank for token, rank in ranks.items() if rank < eot_id}  # the first are a valid BPE
    return tiktoken.Encoding(spec["name"], mergeable_ranks=ranks, **options)


class HubTokenizer:
    """A tokenizer.json, with the methods of a tiktoken.Encoding that this project calls."""

    def __init__(self, spec):
        self.tokenizer = configurator.need("tokenizers").Tokenizer.from_str(spec["json"])
        self.eot_token = self.tokenizer.token_to_id(spec["eot"])

    def encode_ordinary_batch(self, texts, num_threads=None, allowed_special=()):
        self.tokenizer.encode_special_tokens = not allowed_special  # what looks like one is ordinary text
        return [item.ids for item in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode(self, text, allowed_special=()):
        return self.encode_ordinary_batch([text], None, allowed_special)[0]

    encode_ordinary = encode

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def check_exact(tokenizer, texts):
    """Raises ValueError if a text, or a character alone, does not come back from its tokens. Unicode's NFC
    normalization may change it, as Qwen's tokenizer does."""
    # All bytes that UTF-8 uses, but not the rarer control characters, which SmolLM2's vocabulary lacks
    characters = [9, 10, 13, *range(32, 127), *range(160, 0x801), *range(0x1000, 0x10000, 0x1000), 0x1F600]
    for text in [*map(chr, characters), *texts]:
        back = tokenizer.decode(tokenizer.encode_ordinary(text))
        if unicodedata.normalize("NFC", back) != unicodedata.normalize("NFC", text):
            change = f"{text[:80]!r} comes back as {back[:80]!r}"
            raise ValueError(f"the tokenizer loses text: {change}; take one of all bytes, such as gpt2")


# ---------- Documents: each a list of its parts, which are texts

FILES = regex.compile(r"(?i)(\.parquet|(\.txt|\.jsonl)(\.gz|\.xz|\.zst)?)$")
HELD_OUT = regex.compile(r"(?i)(?<![a-z])(validation|valid|val|dev|test)(?![a-z])")
MARKS = {"marked": r"<\|endoftext\|>\n?", "articles": r"^(?= = [^=\s].* = \n)", "problems": None}
TEXT = regex.compile(r"(?i)\.txt(\.gz|\.xz|\.zst)?$")
WORDS = regex.compile(r"(?s).*\S(?:\n(?=\S)|(?= \S))")  # up to a single blank: there tokens begin anew


def is_remote(address):
    return "://" in address or address.startswith("hub:")  # all else is a path, with colons or without


def find_files(address, download_dir, training=False):
    """The files of a path or URL, also in all folders below it; for hub:... the address itself. Training
    leaves out those named test or validation, if there are others. Prints what it reads and what it leaves
    out. Raises ValueError if there are no texts."""
    if address.startswith("hub:"):
        return [address]
    path = download(address, download_dir) if is_remote(address) else address
    found = [path]
    if not os.path.isfile(path):  # links are followed, hidden files are not read, and each file once
        found = sorted(glob.glob(f"{glob.escape(path)}/**", recursive=True))
        found = {os.path.realpath(file): file for file in found if os.path.isfile(file)}.values()
    texts = [file for file in found if FILES.search(file)]
    files = [file for file in texts if not (training and HELD_OUT.search(file[len(path) :]))] or texts
    if not files:
        raise ValueError(
            f"{path!r} does not exist, or holds no .txt(.gz, .xz, .zst), .jsonl or .parquet files"
        )
    print(f"{path}, files read: {len(files):,} ({', '.join(files[:9])})")
    if left_out := sorted(set(found) - set(files)):
        why = "of another kind, or held out by their names"
        print(f"{path}, files left out: {len(left_out):,} ({why}: {', '.join(left_out[:9])})")
    return files


def refuse_pointer(path):
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull")


@contextlib.contextmanager
def open_text(path):
    """A text file, also compressed: UTF-8 with or without a byte order mark, and with any line ends."""
    refuse_pointer(path)
    disk = fsspec.filesystem("file")  # fsspec.open would take a path with colons for an address
    try:
        with disk.open(os.path.abspath(path), "rt", encoding="utf-8-sig", compression="infer") as file:
            yield file
    except Exception as error:  # each format raises its own
        hint = "convert it, or if it is a .zst file, run: pip install -U fsspec backports.zstd"
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}); {hint}") from error


def read_rows(address, kind="problems"):
    """(row, position) for all that is not blank: the lines of a .jsonl file or of problems; the documents of
    other .txt files; the dicts of .parquet files, and of the hub, from hub:ID[@CONFIG][:SPLIT]."""
    if address.startswith("hub:"):
        name, config, split = regex.fullmatch(r"hub:([^@:]*)@?([^:]*):?(.*)", address).groups()
        options = {"path": name, "name": config or None, "split": split or "train"}
    elif address.lower().endswith(".parquet"):
        options = {"path": "parquet", "data_files": glob.escape(address), "split": "train"}
    else:
        with open_text(address) as file:
            rows = file if kind == "problems" or not TEXT.search(address) else split_text(file, kind)
            yield from ((row, f"{address}, line {n}") for n, row in enumerate(rows, 1) if row.strip())
        return
    rows = configurator.need("datasets").load_dataset(**options, streaming=True)
    yield from ((row, f"{address}, row {n}") for n, row in enumerate(rows, 1))


def split_text(file, kind):
    """The documents of a text file: between <|endoftext|> marks, or from one title to the next."""
    text = ""
    for line in file:
        *ends, rest = regex.split(MARKS[kind], line)
        for end in ends:
            text += end
            yield text.removesuffix("\n") if kind == "marked" else text
            text = ""
        text += rest
    yield text


def cut(text):
    """A text in pieces of up to 2 * PIECE characters, cut between words if there are any."""
    pieces, start = [], 0
    while len(text) - start > 2 * PIECE:
        words = WORDS.match(text, start, start + PIECE)
        end = words.end() if words else start + PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def parse(row, kind, text_field):
    """The parts of a row: the pieces of its text, none if it is blank; or question, thoughts and answer.
    A problem is a line of augmented GSM8K, question||<<3+4=7>> <<7*2=14>> #### 14, or OpenAI's {"question":
    ..., "answer": "... #### 14"}, where the equations <<...>> are the thoughts, or the prose if it has none.
    A part begins with a space, as words do: alone, as in an evaluation, it has the same tokens."""
    is_line = isinstance(row, str)
    if kind != "problems":
        text = row if is_line else row[text_field]
        return cut(text) if text.strip() else []
    question, solution = row.split("||", 1) if is_line else (row["question"], row["answer"])
    thoughts, hashes, answer = solution.rpartition("####")
    if not is_line:
        thoughts = " ".join(regex.findall(r"<<.*?>>", thoughts)) or thoughts
    question, thoughts, answer = question.strip(), thoughts.strip(), answer.strip()
    if not (hashes and question and answer):
        raise ValueError("wanted question||thoughts #### answer")
    return [f"Question: {question}", f" Answer: {thoughts}".rstrip(), f" #### {answer}"]


class Documents:
    """The documents of files, each a list of its parts. They can be read several times. Rows that are empty,
    or do not fit, are left out and counted."""

    def __init__(self, files, kind, text_field="text"):
        self.files, self.kind, self.text_field = files, kind, text_field

    def __iter__(self):
        self.n_rows, self.n_empty, self.n_bad, self.first_bad = 0, 0, 0, ""
        for path in self.files:
            for row, position in read_rows(path, self.kind):
                self.n_rows += 1
                try:
                    if isinstance(row, str) and not TEXT.search(path):
                        row = dict(json.loads(row))
                    parts = parse(row, self.kind, self.text_field)
                    "".join(parts).encode()  # fails for half a surrogate pair
                    self.n_empty += not parts
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    parts = []
                    self.n_bad += 1
                    self.first_bad = self.first_bad or f"{position}, {error!r}: {str(row)[:80]!r}"
                    if self.n_bad > max(99, self.n_rows / 100):  # a wrong setting is told early
                        self.report()
                if parts:
                    yield parts

    def report(self):
        """Prints what was left out so far. Raises ValueError if more than 1 in 100 rows do not fit."""
        bad = f"{self.n_bad:,} of {self.n_rows:,} rows do not fit"
        if self.n_bad > self.n_rows / 100:
            raise ValueError(f"{bad}; the first is {self.first_bad}. Set --text_field or --documents?")
        if self.n_bad:
            print(f"{bad} and are left out; the first is {self.first_bad}")
        if self.n_empty:
            print(f"{self.n_empty:,} empty rows left out")


def download(url, folder):
    """The path of a URL's file, fetched once into folder. Raises OSError if it cannot be had."""
    name = os.path.basename(url.split("?")[0])
    path = f"{folder}/{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        print(f"downloading {url}", flush=True)
        temporary = f"{path}.{os.getpid()}.tmp"  # half a file never gets the name
        urllib.request.urlretrieve(url, temporary)
        os.replace(temporary, path)
    return path


# ---------- Writing


def read_json(path):
    """The dict of a JSON file. Raises ValueError if it holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            return {**json.load(file)}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); take another copy") from error


def parts_of(documents, n):
    """(split, part, is_last) for all parts of documents. Every n-th is of val: n=1 means all, n=0 none."""
    for number, parts in enumerate(documents, start=1):
        split = "val" if n and number % n == 0 else "train"
        for i, part in enumerate(parts, start=1):
            yield split, part, i == len(parts)


def write_tokens(parts, files, tokenizer, dtype, sizes, max_tokens=float("inf")):
    """Encodes parts (split, text, is_last) to files[split], and an end-of-text behind each document. Appends
    how many tokens a part has to sizes[split], if that exists. Returns how many documents were written."""
    n_tokens, n_documents = 0, 0
    with tqdm(unit=" tokens", unit_scale=True) as bar:
        while batch := list(itertools.islice(parts, 256)):  # as many at a time: this bounds the memory
            texts = [text for _, text, _ in batch]
            encoded = tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            for (split, _, is_last), ids in zip(batch, encoded):
                if n_tokens >= max_tokens:
                    return n_documents
                if is_last:
                    ids.append(tokenizer.eot_token)
                    n_documents += 1
                files[split].write(np.array(ids, dtype).tobytes())
                if split in sizes:
                    sizes[split].append(len(ids))
                n_tokens += len(ids)
                bar.update(len(ids))
    return n_documents


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(cfg: PrepareConfig) -> dict:
    """Writes data_dir/name/{train.bin,val.bin,meta.json}, returns the meta. They come when all are complete,
    meta.json last: a folder without it is not prepared. Raises ValueError for a source that cannot be read or
    is too short, and for a folder that was prepared with other settings."""
    folder = os.path.join(cfg.data_dir, cfg.name)
    settings = {key: value for key, value in asdict(cfg).items() if key != "data_dir"}
    if os.path.exists(f"{folder}/meta.json"):
        meta = load_meta(folder)
        old = {key: value for key, value in meta["settings"].items() if key in settings}
        if changed := [f"{key}={value!r}" for key, value in old.items() if value != settings[key]]:
            raise ValueError(
                f"{folder} was prepared with {', '.join(changed)}; remove it, or choose another name"
            )
        print(f"{folder} is prepared already; to prepare it again, remove it")
        return meta
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new", dir=folder) as new:
        meta = {"name": cfg.name, "settings": settings} | write_data(cfg, folder, new)
        if os.path.exists(f"{folder}/meta.json"):
            raise ValueError(f"{folder} was prepared by another run in the meantime; its data are kept")
        names = os.listdir(new)
        with open(f"{new}/meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
        for name in [*names, "meta.json"]:
            os.replace(f"{new}/{name}", f"{folder}/{name}")
    return meta


def write_data(cfg, folder, new):
    """Writes token files to the folder new, downloads to folder. Returns what meta.json says of them."""
    if cfg.name == "arithmetic":
        write_arithmetic(new, cfg)
        files, val_files = [f"{new}/train.txt"], [f"{new}/valid.txt"]
    else:
        files = find_files(cfg.source, f"{folder}/download", training=True)
        val_files = find_files(cfg.val_source, f"{folder}/download") if cfg.val_source else []
    documents = Documents(files, cfg.documents, cfg.text_field)
    val_documents = Documents(val_files, cfg.documents, cfg.text_field)
    n = 0 if val_files else round(1 / cfg.val_fraction)
    is_problems = cfg.documents == "problems"

    texts = (text for split, text, _ in parts_of(documents, n) if split == "train")
    spec = make_tokenizer(cfg.tokenizer, is_problems, cfg.vocab_size, texts)
    tokenizer = load_tokenizer(spec)
    if "json" in spec:  # our own are exact
        check_exact(tokenizer, itertools.islice(texts, 1000))

    dtype = np.dtype("uint16" if spec["vocab_size"] <= 1 << 16 else "uint32")
    sizes = {"train": [], "val": []} if is_problems else {}
    with open(f"{new}/train.bin", "wb") as train, open(f"{new}/val.bin", "wb") as val:
        outputs = {"train": train, "val": val}
        n_documents = write_tokens(parts_of(documents, n), outputs, tokenizer, dtype, sizes, cfg.max_tokens)
        documents.report()
        write_tokens(parts_of(val_documents, 1), outputs, tokenizer, dtype, sizes)
        val_documents.report()
    held_out = (cfg.val_source or "1,000 other problems") if val_files else f"1 of every {n} documents"
    if not (os.path.getsize(f"{new}/val.bin") or val_files or is_problems or cfg.tokenizer == "words"):
        held_out = f"the last {cfg.val_fraction:.2%} of the text"
        tokens = np.fromfile(f"{new}/train.bin", dtype)
        start = round(len(tokens) * (1 - cfg.val_fraction))
        tokens[:start].tofile(f"{new}/train.bin")
        tokens[start:].tofile(f"{new}/val.bin")
    n_tokens = {split: os.path.getsize(f"{new}/{split}.bin") // dtype.itemsize for split in ("train", "val")}
    if not all(n_tokens.values()):
        hint = "raise --val_fraction, or give a --val_source"
        raise ValueError(f"{cfg.source} is empty, or too short to hold out {held_out}: {hint}")
    for split in sizes:  # where question, thoughts and answer of each whole problem begin, and where it ends
        borders = np.cumsum([0, *sizes[split]])
        starts = np.arange(0, len(sizes[split]) - 2, 3)
        np.save(f"{new}/{split}_cuts.npy", borders[starts[:, None] + np.arange(4)])

    names = sorted(name for name in os.listdir(new) if not name.endswith(".txt"))
    meta = {"held_out": held_out, "documents": n_documents, "opens_with_eot": n_documents > 1}
    meta |= {"one_per_line": is_problems, "vocab_size": spec["vocab_size"], "eot_id": tokenizer.eot_token}
    meta |= {"dtype": dtype.name, "tokens": n_tokens, "tokenizer": spec}
    return meta | {"sha256": {name.split(".")[0]: file_sha256(f"{new}/{name}") for name in names}}


def load_meta(folder: str) -> dict:
    """meta.json of prepared data. Raises ValueError if it is missing, or a token file has another size."""
    if not os.path.exists(f"{folder}/meta.json"):
        hint = "prepare it with prepare_data.py, or say where it is: --data_dir (eval.py: --data)"
        raise ValueError(f"no prepared data in {str(folder)!r}; {hint}")
    meta = read_json(f"{folder}/meta.json")
    for split, n_tokens in meta["tokens"].items():
        path, size = f"{folder}/{split}.bin", n_tokens * np.dtype(meta["dtype"]).itemsize
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise ValueError(f"{path} should have {size:,} bytes; remove {folder}, and prepare it again")
    return meta


# ---------- Arithmetic: grade-school word problems. One line each: question||<<3+4=7>> <<7*2=14>> #### 14

NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Zoe", "Leo", "Eva", "Jim", "Ada"]
THINGS = "apples books coins shells pens cards eggs stamps nuts keys cups hats".split()
# A question|its equations: a, b, c are the numbers of the question, x is the first result.
QUESTIONS = [
    "{name} has {a} {things} and buys {b} more. How many now?|a+b",
    "{name} has {a} {things} and gives {b} to {friend}. How many are left?|a-b",
    "{name} has {a} boxes of {b} {things}. How many in all?|a*b",
    "{name} shares {a} {things} among {b} children. How many for each?|a/b",
    "{name} has {a} {things}, finds {b} and loses {c}. How many now?|a+b|x-c",
    "{name} buys {a} bags of {b} {things} and loses {c}. How many are left?|a*b|x-c",
    "{name} has {a} {things}. {friend} has {b} times as many. How many together?|a*b|a+x",
    "{name} has {a} {things} and {friend} has {b}. They make {c} equal piles. How many in each?|a+b|x/c",
    "{name} has {a} {things}, sells {b} and fills {c} equal bags. How many in each?|a-b|x/c",
    "{name} has {a} {things} and loses {b}. {friend} has {c} times as many. How many is that?|a-b|x*c",
    "{name} shares {a} {things} among {b} boxes and adds {c} to each. How many in each?|a/b|x+c",
    "{name} shares {a} {things} among {b} plates and takes {c} from one. How many are left on it?|a/b|x-c",
]
TEMPLATES = [question.split("|") for question in QUESTIONS]


def make_problem(rng: random.Random) -> str:
    """One random problem. Its results are whole numbers from 1 to 20: small models learn them in minutes."""
    question, *equations = rng.choice(TEMPLATES)
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    while True:  # draw numbers until every result is whole and small
        numbers = {"a": rng.randint(2, 9), "b": rng.randint(2, 5), "c": rng.randint(2, 5)}
        thoughts = []
        for first, sign, second in equations:
            p, q = numbers[first], numbers[second]
            result = {"+": p + q, "-": p - q, "*": p * q, "/": p / q}[sign]
            if result != int(result) or not 1 <= result <= 20:
                break
            numbers["x"] = int(result)
            thoughts.append(f"<<{p}{sign}{q}={numbers['x']}>>")
        else:
            question = question.format(name=name, friend=friend, things=things, **numbers)
            return f"{question}||{' '.join(thoughts)} #### {numbers['x']}"


def write_arithmetic(folder, cfg):
    """Writes train.txt, and 1,000 lines of valid.txt and test.txt; no question twice."""
    if not 1 <= cfg.num_problems <= 100_000:
        raise ValueError(f"num_problems is {cfg.num_problems}; it must lie between 1 and 100,000")
    rng, problems = random.Random(cfg.seed), {}
    while len(problems) < cfg.num_problems + 2000:
        problems[make_problem(rng)] = None  # a dict keeps the order, and a question only once
    lines = list(problems)
    rng.shuffle(lines)  # short templates run out of new questions: the last ones drawn are of another kind
    for name, part in {"train": lines[:-2000], "valid": lines[-2000:-1000], "test": lines[-1000:]}.items():
        with open(f"{folder}/{name}.txt", "w", encoding="utf-8") as file:
            file.write("\n".join(part) + "\n")


def main():
    cfg, set_by = configurator.parse(PrepareConfig, positional="name")
    print(configurator.describe(cfg, set_by))
    meta = prepare(cfg)
    tokens, spec = meta["tokens"], meta["tokenizer"]
    print(f"{cfg.data_dir}/{cfg.name}: {spec['name']} vocabulary of {spec['vocab_size']:,}")
    print(f"{tokens['train']:,} training and {tokens['val']:,} validation tokens ({meta['held_out']})")


if __name__ == "__main__":
    configurator.run(main)
