"""A small prepared corpus, as `v3jax.data.prepare` leaves it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from v3jax.data import shards
from v3jax.data.tokenizer import Tokenizer


def write(
    folder: Path,
    tokenizer: Tokenizer,
    sources: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    *,
    weights: Mapping[str, float] | None = None,
    per_shard: int = 7,
) -> Path:
    """Training and held-out texts of every source, a few documents a shard."""
    entries = []
    for name, sides in sources.items():
        entry = {"name": name, "kind": "prose", "weight": (weights or {}).get(name, 1.0)}
        for side, texts in zip(shards.SIDES, sides, strict=True):
            entry[side] = _write_side(folder, name, side, texts, tokenizer, per_shard)
        entries.append(entry)
    about = {
        "sha256": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
    }
    index = {"format": shards.FORMAT, "tokenizer": about, "sources": entries}
    (folder / shards.TOKENIZER).write_text(tokenizer.text, encoding="utf-8")
    (folder / shards.INDEX).write_text(json.dumps(index))
    return folder


def damage(folder: Path, source: str, shard: int) -> str:
    """Turns over a byte of the first training document of a shard; its file's name."""
    index = json.loads((folder / shards.INDEX).read_text())
    (entry,) = [e for e in index["sources"] if e["name"] == source]
    described = entry["train"]["shards"][shard]
    file = folder / described["file"]
    reader = ArrayRecordReader(str(file))
    records = reader.read(list(range(reader.num_records())))
    reader.close()
    records[0] = records[0][:20] + bytes([records[0][20] ^ 0xFF]) + records[0][21:]
    writer = shards.Writer(file, 2)
    for record in records:
        writer.write_record(record)
    described |= asdict(writer.close()) | {"file": described["file"]}
    (folder / shards.INDEX).write_text(json.dumps(index))
    return str(file)


def _write_side(
    folder: Path, name: str, side: str, texts: Sequence[str], tokenizer: Tokenizer, per_shard: int
) -> dict[str, object]:
    written, lengths = [], []
    parts = [texts[i : i + per_shard] for i in range(0, len(texts), per_shard)]
    for number, part in enumerate(parts):
        file = f"{side}-{number:05d}-of-{len(parts):05d}.array_record"
        writer = shards.Writer(folder / name / file, shards.id_bytes(tokenizer.vocab_size))
        for i, text in enumerate(part):
            writer.write([*tokenizer.encode(text), tokenizer.eos], f"{side}/{number}/{i}")
        lengths += writer.lengths
        written.append(asdict(writer.close()) | {"file": f"{name}/{file}"})
    said = folder / name / f"{side}-lengths.npy"
    said.parent.mkdir(parents=True, exist_ok=True)
    np.save(said, np.array(lengths, np.int32))
    kept = {"file": f"{name}/{said.name}", "sha256": shards.file_sha256(said)}
    size = sum(len(text.encode()) for text in texts)
    return {"shards": written, "text_bytes": size, "lengths": kept}
