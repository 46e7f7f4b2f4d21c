"""The rows of a run: encoded, put in fill-in-the-middle form, packed by source, cached on disk.

A cached folder is whole: rows, tokenizer and what they were made of, under a digest of everything
that shapes them. `data.path` may name such a folder, copied to a machine that has no corpus.
Dims: N rows, S = T + 1 tokens of a row.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v3jax.config import DataConfig, ExperimentConfig, scaled_to
from v3jax.data.chat import DEFAULT_TEMPLATE, ChatTemplate, load_template
from v3jax.data.conversations import encode_conversations
from v3jax.data.corpus import Corpus, load_corpus
from v3jax.data.fim import encode_documents
from v3jax.data.packing import PlannedRows, Rows, RowSource, alone, pack, read_rows, write_rows
from v3jax.data.prepared import Chosen, Quarantine, TrainingDocuments, chosen, training_rows
from v3jax.data.prepared import heldout_rows as rows_of_heldout
from v3jax.data.sources import Document
from v3jax.data.tokenizer import SPLITS, Tokenizer, load_tokenizer, train_tokenizer
from v3jax.host import cache_folder

_CACHE_VERSION = 3  # of what is cached and how it is made; raised when either changes
_ABOUT, _TOKENIZER, TEMPLATE = "dataset.json", "tokenizer.json", "chat_template.jinja"
# Fields that rows cannot change any more, with what they are in a folder that is older than them.
_SHAPING = {"seq_len": None, "fim_rate": None, "newline_split_rate": None, "format": "text"}


@dataclass(frozen=True)
class SourceReport:
    """What one source holds."""

    name: str
    weight: float
    documents: int
    megabytes: float
    tokens: int
    rows: int
    too_long: int = 0
    """Conversations left out because they are longer than a row."""


@dataclass(frozen=True)
class Dataset:
    """Rows to train on, by source, and rows held out."""

    train: tuple[RowSource, ...]
    weights: tuple[float, ...]
    """Each source's share of the rows drawn, unless `DataConfig.mixture` says otherwise."""
    heldout: Rows
    tokenizer: Tokenizer | None
    """None for synthetic data."""
    digest: str
    files: tuple[tuple[str, str, str], ...]
    """`(source, document name, sha256 of its text)`, held-out documents included."""
    sources: tuple[SourceReport, ...]
    folder: Path | None
    """Where the rows lie; None for synthetic data."""
    isolate_documents: bool = False
    """Whether the first token of a document is no target (`DataConfig.isolate_documents`)."""
    quarantine: Quarantine | None = None
    """Of a prepared corpus: documents that turn out to be damaged."""
    chat_template: str | None = None
    """Of conversations."""

    @property
    def n_rows(self) -> int:
        """Rows to train on, of all sources."""
        return sum(map(len, self.train))

    @cached_property
    def fill_rate(self) -> float:
        """Share of row positions that hold a token."""
        width = self.heldout.tokens_NS.shape[1]
        return sum(rows.n_tokens for rows in self.train) / sum(len(r) * width for r in self.train)

    def heldout_bytes(self, n_rows: int) -> int:
        """UTF-8 bytes of the targets in the first `n_rows` held-out rows; specials have none."""
        if self.tokenizer is None:
            return 0
        tokens, segments = (x[:n_rows] for x in (self.heldout.tokens_NS, self.heldout.segments_NS))
        mask = segments[:, 1:] > 0
        if self.isolate_documents:
            mask &= segments[:, 1:] == abs(segments[:, :-1])
        return int(self.tokenizer.byte_lengths[tokens[:, 1:][mask]].sum())

    def heldout_text(self, n_rows: int) -> bytes:
        """The bytes of the first `n_rows` held-out rows, for compressors."""
        if self.tokenizer is None:
            return b""
        tokens = self.heldout.tokens_NS[:n_rows][self.heldout.segments_NS[:n_rows] != 0]
        return b"".join(self.tokenizer.token_bytes[i] for i in tokens)


def lengthened(cfg: ExperimentConfig, dataset: Dataset) -> ExperimentConfig:
    """The experiment as long as `run.epochs` makes it with this dataset."""
    if cfg.run.epochs is None:
        return cfg
    return scaled_to(cfg, float(round(cfg.run.epochs * dataset.n_rows)) * cfg.data.seq_len)


def open_dataset(cfg: ExperimentConfig, cache: Path | None = None) -> Dataset:
    """The experiment's dataset, from the cache or made and put there.

    Raises:
      ValueError: a corpus, tokenizer or cache that cannot be used; see `corpus` and `tokenizer`.
    """
    found = _opened(cfg, cache)
    if cfg.run.epochs is None:
        return found
    return replace(found, weights=tuple(float(len(rows)) for rows in found.train))


def _opened(cfg: ExperimentConfig, cache: Path | None) -> Dataset:
    if cfg.data.synthetic:
        return _synthetic(cfg)
    if cfg.data.path is not None and (Path(cfg.data.path).expanduser() / _ABOUT).is_file():
        return _open_prepared(cfg, Path(cfg.data.path).expanduser())
    cache = cache_folder() if cache is None else cache
    shards = chosen(cfg.data)
    corpus = load_corpus(cfg.data) if shards is None else None
    try:
        if corpus is None:
            assert shards is not None
            return _open_shards(cfg, shards, cache)
        tokenizer = _tokenizer(cfg, corpus, cache)
        found = _open_cached(cfg, corpus, tokenizer, cache)
    except OSError as error:
        raise ValueError(
            f"{cache}: the cache cannot be written ({error.strerror}); set V3JAX_CACHE"
        ) from None
    return replace(found, files=corpus.files)  # the same texts may have moved


def _open_shards(cfg: ExperimentConfig, found: Chosen, cache: Path) -> Dataset:
    """The dataset that a prepared corpus gives."""
    data, shards = cfg.data, found.shards
    if data.format == "chat":
        raise ValueError(f"{shards.folder}: a prepared corpus is of text; set data.format=text")
    if data.tokenizer is not None:
        raise ValueError(f"{shards.folder}: brings its tokenizer; unset data.tokenizer")
    tokenizer = shards.tokenizer()
    _check_tokenizer(cfg, tokenizer, str(shards.folder))
    shape = _shape(data)
    digest = _key(_CACHE_VERSION, shards.digest, shape, cfg.run.seed)
    quarantine = Quarantine(data.max_corrupt)
    train = tuple(
        training_rows(
            TrainingDocuments(
                records=source.train,
                tokenizer=tokenizer,
                seed=cfg.run.seed,
                fim_rate=data.fim_rate,
                newline_split_rate=data.newline_split_rate,
                vocab_size=shards.vocab_size,
                quarantine=quarantine,
            ),
            data,
            cache,
            digest,
            n_processes=os.cpu_count() or 1,
        )
        for source in found.sources
    )
    names = [source.name for source in found.sources]
    return Dataset(
        train=train,
        weights=found.weights,
        heldout=_some_heldout(cfg, found, tokenizer, quarantine),
        tokenizer=tokenizer,
        digest=_key(digest, names, found.weights),
        files=tuple(
            (source.name, shard.file, shard.sha256)
            for source in found.sources
            for shard in (*source.train.shards, *source.heldout.shards)
        ),
        sources=tuple(
            SourceReport(
                name=source.name,
                weight=weight,
                documents=len(source.train),
                megabytes=source.train.text_bytes / 1e6,
                tokens=rows.n_tokens,
                rows=len(rows),
            )
            for source, weight, rows in zip(found.sources, found.weights, train, strict=True)
        ),
        folder=None,
        isolate_documents=data.isolate_documents,
        quarantine=quarantine,
    )


def _some_heldout(
    cfg: ExperimentConfig, found: Chosen, tokenizer: Tokenizer, quarantine: Quarantine
) -> Rows:
    """A fair sample of the held-out rows, as many as are evaluated."""
    rows: PlannedRows = rows_of_heldout(
        [source.heldout for source in found.sources], tokenizer, cfg.data, quarantine
    )
    if not len(rows):
        raise ValueError(f"{found.shards.folder}: no held-out documents; prepare it with some")
    order_N = np.random.default_rng(0).permutation(len(rows))[: max(cfg.run.eval_sequences, 1)]
    tokens, segments = zip(*(rows[int(i)] for i in order_N), strict=True)
    return Rows(np.stack(tokens), np.stack(segments))


def _open_prepared(cfg: ExperimentConfig, folder: Path) -> Dataset:
    """The dataset in a folder that was cached on this machine or another."""
    if cfg.data.tokenizer is not None:
        raise ValueError(f"{folder}: prepared rows bring their tokenizer; unset data.tokenizer")
    found = _read(cfg, folder)
    if found is None:
        raise ValueError(f"{folder}: the prepared rows are incomplete or damaged; copy them anew")
    return found


def _read(cfg: ExperimentConfig, folder: Path) -> Dataset | None:
    """The dataset in `folder`; None unless it is whole."""
    rows = read_rows(folder)
    if rows is None:
        return None
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        text = (folder / _TOKENIZER).read_text(encoding="utf-8")
        shape = {f: about[f] if old is None else about.get(f, old) for f, old in _SHAPING.items()}
        sources = tuple(SourceReport(**source) for source in about["sources"])
        train = tuple(rows[f"train_{i}"] for i in range(len(sources)))
        heldout, digest, files = rows["heldout"], about["digest"], about["files"]
        chat = shape["format"] == "chat"
        template = (folder / TEMPLATE).read_text(encoding="utf-8") if chat else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for field, value in shape.items():
        if getattr(cfg.data, field) != value:
            raise ValueError(
                f"{folder}: prepared with {field}={value}, not {getattr(cfg.data, field)}; "
                f"--set data.{field}={value}"
            )
    tokenizer = Tokenizer(text, str(folder / _TOKENIZER))
    _check_tokenizer(cfg, tokenizer, str(folder / _TOKENIZER))
    for name, part in rows.items():
        _check_ids(part, cfg.model.vocab_size, f"{folder}/{name}_tokens.npy")
    return Dataset(
        train=train,
        weights=tuple(source.weight for source in sources),
        heldout=heldout,
        tokenizer=tokenizer,
        digest=digest,
        files=tuple((source, name, text_hash) for source, name, text_hash in files),
        sources=sources,
        folder=folder,
        isolate_documents=cfg.data.isolate_documents,
        chat_template=template,
    )


def _shape(data: DataConfig) -> dict[str, Any]:
    """What shapes rows beside their text; what fields younger than a cache add only if they are
    not what they were then."""
    shape = {field: getattr(data, field) for field in _SHAPING}
    return {f: v for f, v in shape.items() if v != _SHAPING[f]}


def _template(cfg: ExperimentConfig) -> str | None:
    """The chat template of conversations: the one that is named, or that of the weights."""
    if cfg.data.format != "chat":
        return None
    named = cfg.data.chat_template
    if named is None:
        found = None if cfg.init_from is None else load_template(_beside(cfg.init_from))
        return found or DEFAULT_TEMPLATE
    where = Path(named).expanduser()
    found = where.read_text(encoding="utf-8") if where.is_file() else load_template(where)
    if found is None:
        raise ValueError(f"data.chat_template: {named}: no file, and no folder with a template")
    return found


def _beside(init_from: str) -> Path:
    """Where the tokenizer of weights lies: with them, or in a conversion's folder of such files."""
    folder = Path(init_from).expanduser()
    return folder / "hf" if (folder / "hf" / _TOKENIZER).is_file() else folder


def _tokenizer(cfg: ExperimentConfig, corpus: Corpus, cache: Path) -> Tokenizer:
    named = cfg.data.tokenizer
    if named is None and cfg.init_from is not None:  # weights know the ids they were trained on
        named = str(_beside(cfg.init_from) / _TOKENIZER)
        if not Path(named).is_file():
            raise ValueError(
                f"init_from: {cfg.init_from} has no {_TOKENIZER}, and another one's ids mean other "
                "text; set data.tokenizer"
            )
    if named is None:
        if cfg.data.format == "chat":
            raise ValueError("data.format: chat needs a trained tokenizer; set data.tokenizer")
        return _trained_tokenizer(cfg, corpus, cache)
    tokenizer = load_tokenizer(named)
    _check_tokenizer(cfg, tokenizer, named)
    return tokenizer


def _check_tokenizer(cfg: ExperimentConfig, tokenizer: Tokenizer, origin: str) -> None:
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"{origin}: {tokenizer.vocab_size} ids exceed "
            f"model.vocab_size={cfg.model.vocab_size}; raise it or choose another tokenizer"
        )


def _trained_tokenizer(cfg: ExperimentConfig, corpus: Corpus, cache: Path) -> Tokenizer:
    """The tokenizer of the training documents: from the cache, or trained and put there."""
    size, library = cfg.data.tokenizer_vocab_size, importlib.metadata.version("tokenizers")
    key = _key(_CACHE_VERSION, library, SPLITS, size, corpus.train_digest)
    file = cache / "tokenizers" / f"{key}.json"
    if (found := _read_tokenizer(file)) is not None:
        return found
    with alone(file):
        if (found := _read_tokenizer(file)) is not None:
            return found
        texts = (d.text for documents in corpus.train for d in documents)
        tokenizer = train_tokenizer(texts, size)
        partial = file.with_suffix(".partial")
        partial.write_text(f"{tokenizer.digest}\n{tokenizer.text}", encoding="utf-8")
        partial.replace(file)
        return tokenizer


def _read_tokenizer(file: Path) -> Tokenizer | None:
    """The tokenizer in a cached file; None unless it is there, bit for bit."""
    try:
        digest, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        return None
    return Tokenizer(text, str(file))


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _open_cached(
    cfg: ExperimentConfig, corpus: Corpus, tokenizer: Tokenizer, cache: Path
) -> Dataset:
    """The dataset of a corpus: from the cache, or made and put there."""
    template = _template(cfg)
    weights = [source.weight for source in corpus.sources]
    made_of = (corpus.digest, tokenizer.digest, _shape(cfg.data), weights, cfg.run.seed)
    key = _key(_CACHE_VERSION, *made_of, *([] if template is None else [template]))
    folder = cache / "rows" / key
    if (found := _read(cfg, folder)) is not None:
        return found
    with alone(folder):
        if (found := _read(cfg, folder)) is not None:
            return found
        rows, too_long = _encode_all(cfg, corpus, tokenizer, template)
        train = tuple(rows[f"train_{i}"] for i in range(len(corpus.sources)))
        sources = [asdict(source) for source in _report(corpus, train, too_long)]
        shape = {field: getattr(cfg.data, field) for field in _SHAPING}
        about = {"digest": key, **shape, "sources": sources, "files": corpus.files}
        texts = {_TOKENIZER: tokenizer.text, _ABOUT: json.dumps(about, indent=1)}
        write_rows(folder, rows, texts | ({} if template is None else {TEMPLATE: template}))
        if (found := _read(cfg, folder)) is None:
            raise ValueError(f"{folder}: reads back other than it was written; check the disk")
        return found


def _encode_all(
    cfg: ExperimentConfig, corpus: Corpus, tokenizer: Tokenizer, template: str | None
) -> tuple[dict[str, Rows], list[int]]:
    """Rows by name, and how many conversations of each source are too long for one. Held-out text
    is encoded as it is: no FIM, no random splitting."""
    data, capacity = cfg.data, cfg.data.seq_len + 1
    chat = None if template is None else ChatTemplate(template, tokenizer)

    def packed(
        documents: Sequence[Document], fim_rate: float, newline_split_rate: float
    ) -> tuple[Rows, int]:
        if chat is not None:
            found = encode_conversations(chat, ((d.name, d.text) for d in documents), capacity)
            if documents and not found.documents:
                raise ValueError(
                    f"{documents[0].source}: no conversation fits in data.seq_len={data.seq_len} "
                    f"tokens, the first is {found.too_long[0]}; raise it"
                )
            return pack(found.documents, capacity, tokenizer.pad), len(found.too_long)
        ids = encode_documents(
            tokenizer,
            [d.text for d in documents],
            seed=cfg.run.seed,
            fim_rate=fim_rate,
            newline_split_rate=newline_split_rate,
        )
        return pack(list(ids), capacity, tokenizer.pad), 0

    rows, too_long = {}, []
    for i, documents in enumerate(corpus.train):
        rows[f"train_{i}"], n = packed(documents, data.fim_rate, data.newline_split_rate)
        too_long.append(n)
    held, _ = packed([d for documents in corpus.heldout for d in documents], 0.0, 0.0)
    order_N = np.random.default_rng(0).permutation(len(held.tokens_NS))  # a prefix is a fair sample
    rows["heldout"] = Rows(held.tokens_NS[order_N], held.segments_NS[order_N])
    return rows, too_long


def _check_ids(rows: Rows, vocab_size: int, file: str) -> None:
    """Raises ValueError if a row holds an id outside the vocabulary; names the first."""
    bad_N = ((rows.tokens_NS < 0) | (rows.tokens_NS >= vocab_size)).any(axis=1)
    if bad_N.any():
        row = int(bad_N.argmax())
        ids = rows.tokens_NS[row]
        first = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise ValueError(
            f"{file}: row {row} holds token id {first}, outside model.vocab_size={vocab_size}; "
            "raise it or retrain the tokenizer"
        )


def _report(
    corpus: Corpus, train: tuple[Rows, ...], too_long: list[int]
) -> tuple[SourceReport, ...]:
    parts = zip(corpus.sources, corpus.train, train, too_long, strict=True)
    return tuple(
        SourceReport(
            name=source.name,
            weight=source.weight,
            documents=len(documents),
            megabytes=sum(len(d.text.encode()) for d in documents) / 1e6,
            tokens=rows.n_tokens,
            rows=len(rows.tokens_NS),
            too_long=n_too_long,
        )
        for source, documents, rows, n_too_long in parts
    )


def _synthetic(cfg: ExperimentConfig) -> Dataset:
    """Uniform random ids, as many rows as a few batches hold."""
    n_rows, capacity = 4 * cfg.batch.end, cfg.data.seq_len + 1
    rng = np.random.default_rng(cfg.run.seed)
    ids_NS = rng.integers(0, cfg.data.tokenizer_vocab_size, (n_rows, capacity)).astype(np.int32)
    rows = Rows(ids_NS, np.ones_like(ids_NS))
    report = SourceReport("synthetic", 1.0, n_rows, 0.0, ids_NS.size, n_rows)
    return Dataset((rows,), (1.0,), rows, None, f"synthetic-{cfg.run.seed}", (), (report,), None)
