"""The whole preparation: what is planted is found, and the bytes depend on the texts alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data import small
from tests.data.prepare import corpora
from tests.data.prepare.corpora import changed, contents, jsonl, prose
from v3jax.data.corpus import load_corpus
from v3jax.data.prepare import pipeline
from v3jax.data.prepare.__main__ import prepare
from v3jax.data.prepare.config import (
    ClassifierConfig,
    DecontaminateConfig,
    DedupConfig,
    PrepareConfig,
    PrepareSource,
    QuarantineConfig,
)
from v3jax.data.prepare.staged import Folder
from v3jax.data.shards import Shards

N = 60


def run(cfg: PrepareConfig, root: Path, name: str = "work", workers: int = 1) -> Path:
    out = root / name / "corpus"
    prepare(cfg, Folder(root / name), out, "local", workers, {})
    return out


def two_sources(root: Path) -> tuple[PrepareSource, PrepareSource]:
    """Sources `a` and `b` of N documents each; `b` repeats a third of `a`, exactly or nearly."""
    mine = [prose(i) for i in range(N)]
    others = [prose(1000 + i) for i in range(N)]
    exact, near = mine[: N // 6], [changed(t, i) for i, t in enumerate(mine[N // 6 : N // 3])]
    one = jsonl(root / "a.jsonl", mine)
    other = jsonl(root / "b.jsonl", [*others, *exact, *near])
    return (
        PrepareSource(name="a", kind="prose", path=str(one)),
        PrepareSource(name="b", kind="web", path=str(other), weight=2.0),
    )


def texts(out: Path, source: int, side: str = "both") -> list[str]:
    opened = Shards.open(out, verify=True)
    tokenizer = opened.tokenizer()
    found = opened.sources[source]
    sides = [s for s in (found.train, found.heldout) if side in ("both", s.side)]
    ids = [s.read(n) for s in sides for n in range(len(s))]
    assert all(i[-1] == opened.eos for i in ids)
    return [tokenizer.decode(i[:-1]) for i in ids]


def dropped(out: Path, stage: str) -> dict[str, int]:
    (about,) = (
        s for s in json.loads((out / "index.json").read_text())["stages"] if s["stage"] == stage
    )
    return {source["name"]: source["dropped"] for source in about["sources"]}


def test_planted_duplicates_leave_and_the_first_source_keeps_the_text(tmp_path: Path) -> None:
    out = run(corpora.config(tmp_path, two_sources(tmp_path)), tmp_path)
    assert dropped(out, "exact") == {"a": 0, "b": N // 6}
    assert dropped(out, "near") == {"a": 0, "b": N // 6}
    assert sorted(texts(out, 0)) == sorted(prose(i) for i in range(N))
    assert sorted(texts(out, 1)) == sorted(prose(1000 + i) for i in range(N))


def test_order_and_split_are_those_of_the_corpus(tmp_path: Path) -> None:
    (source, _) = two_sources(tmp_path)
    assert source.path is not None
    out = run(corpora.config(tmp_path, [source]), tmp_path)
    data = small.data(sources=(small.source("a", Path(source.path)),), heldout_fraction=0.1)
    expected = load_corpus(data)
    assert texts(out, 0, "train") == [d.text for d in expected.train[0]]
    assert texts(out, 0, "heldout") == [d.text for d in expected.heldout[0]]


def test_neither_workers_nor_tasks_change_a_byte(tmp_path: Path) -> None:
    cfg = corpora.config(tmp_path, two_sources(tmp_path), shard_mb=0.01)
    one = contents(run(cfg, tmp_path, "one"))
    two = contents(run(cfg, tmp_path, "two", workers=2))
    many = contents(run(replace(cfg, n_tasks=5), tmp_path, "many"))
    assert sum(name.endswith(".array_record") for name in one) > 6
    assert one == two
    assert one == many


@pytest.mark.faults
def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    cfg = corpora.config(tmp_path, two_sources(tmp_path))
    whole = contents(run(cfg, tmp_path, "whole"))
    file = corpora.write_config(tmp_path / "mine.py", cfg)
    work = tmp_path / "killed"
    command = [sys.executable, "-m", "v3jax.data.prepare", f"--config={file}", "--workers=1"]
    command.append(f"--workdir={work}")
    killed = []
    for stage in ("clean", "signatures", "encode"):
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        done = work / "logs" / stage / "completions"
        until = time.monotonic() + 240
        while process.poll() is None and not list(done.glob("*")) and time.monotonic() < until:
            time.sleep(0.005)
        alive = process.poll() is None
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.append(alive)
        assert list(done.glob("*")), process.stderr
    assert any(killed)
    finished = corpora.run(f"--config={file}", "--workers=1", f"--workdir={work}")
    assert finished.returncode == 0, finished.stderr
    assert "(3 of 3 tasks were done)" in finished.stdout
    assert finished.stdout.endswith(f"done: {work}/corpus\n")
    assert contents(work / "corpus") == whole


def test_planted_evaluation_text_leaves_and_is_named(tmp_path: Path) -> None:
    questions = [" ".join(prose(9000 + i, 2).split()) for i in range(12)]
    evaluation = tmp_path / "eval"
    jsonl(evaluation / "x.jsonl", questions)
    planted = [
        prose(i) + questions[i].upper().replace(" ", "\n  ").replace(".", " !") + prose(500 + i)
        for i in range(12)
    ]
    file = jsonl(tmp_path / "a.jsonl", [*planted, *(prose(100 + i) for i in range(30))])
    source = PrepareSource(name="a", kind="maths", path=str(file))
    paths = DecontaminateConfig(paths=(str(evaluation),))
    out = run(corpora.config(tmp_path, [source], decontaminate=paths), tmp_path)
    assert dropped(out, "decontamination") == {"a": 12}
    assert len(texts(out, 0)) == 30
    report = (out / "report.html").read_text(encoding="utf-8")
    assert re.search(r"see x\.jsonl:\d+\.text", report)
    cut = replace(paths, action="cut")
    left = texts(run(corpora.config(tmp_path, [source], decontaminate=cut), tmp_path, "cut"), 0)
    assert len(left) == 42
    assert not any(q.split()[3].upper() in text for q in questions for text in left)


def quarantined(tmp_path: Path, **budget: Any) -> Path:
    lines = [json.dumps({"text": prose(i)}).encode() for i in range(40)]
    lines[3:3] = [b'{"text": "a\xffb"}', b'{"text": "a\\ud800"}', b'{"text": 1}', b"{"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = PrepareSource(name="a", kind="prose", path=str(tmp_path / "a.jsonl"))
    cfg = corpora.config(tmp_path, [source], quarantine=QuarantineConfig(**budget))
    return run(cfg, tmp_path)


def test_what_cannot_be_read_is_quarantined_with_its_place(tmp_path: Path) -> None:
    out = quarantined(tmp_path, max_share=0.1)
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [row["reason"].split(" (")[0] for row in rows] == [
        "invalid UTF-8",
        "half a surrogate pair at character 1",
        "no text field 'text'",
        "not JSON",
    ]
    raw = (tmp_path / "a.jsonl").read_bytes()
    assert raw[rows[0]["offset"]] == 0xFF
    assert raw[rows[2]["offset"] :].startswith(b'{"text": 1}')
    assert {(row["source"], row["file"]) for row in rows} == {("a", "a.jsonl")}
    assert len(texts(out, 0)) == 40


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_share": 0.05}, "4 of 44 documents quarantined exceed quarantine.max_share=0.05"),
        ({"max_share": 1.0, "max_documents": 2}, "exceed quarantine.max_documents=2"),
    ],
)
def test_over_its_budget_the_run_stops(
    tmp_path: Path, budget: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        quarantined(tmp_path, **budget)
    assert "a.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work" / "corpus").exists()


def test_a_stage_damaged_on_disk_is_noticed(tmp_path: Path) -> None:
    cfg = corpora.config(
        tmp_path, two_sources(tmp_path), quarantine=QuarantineConfig(max_share=0.5)
    )
    work, out = Folder(tmp_path / "work"), tmp_path / "corpus"
    found = pipeline.start(cfg, work, out)
    pipeline.run_local(found[:1], work, 1, print)
    file = work.stage("clean") / "00001.jsonl"
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"house", b"horse", 1))
    pipeline.run_local(found[1:], work, 1, print)
    (row,) = (json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines())
    assert (row["file"], row["reason"]) == ("00001.jsonl", "bad digest")


def test_the_classifier_recalls_what_its_seeds_are_like(tmp_path: Path) -> None:
    terms = {"people": "lemma", "year": "proof", "time": "prime", "water": "integral", "eye": "set"}
    pattern = re.compile("|".join(terms))
    wanted = [pattern.sub(lambda m: terms[m[0]], prose(i)) for i in range(60)]
    seeds = jsonl(tmp_path / "seeds.jsonl", wanted[:40])
    file = jsonl(tmp_path / "a.jsonl", [*wanted[40:], *(prose(500 + i) for i in range(80))])
    others = jsonl(tmp_path / "others.jsonl", [prose(3000 + i) for i in range(40)])
    source = PrepareSource(name="a", kind="web", path=str(file), rules=False)
    classifier = ClassifierConfig(
        negatives=str(others),
        positives=str(seeds),
        rounds=2,
        recall_share=0.1,
        keep_share=0.2,
        n_features=2**14,
    )
    cfg = corpora.config(
        tmp_path, [source], classifier=classifier, dedup=DedupConfig(minhash=False)
    )
    out = run(cfg, tmp_path)
    kept = texts(out, 0)
    assert len(kept) == 20
    assert sum(" lemma" in text or " proof" in text for text in kept) >= 18
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Classifier</h2>" in report
    rounds = [
        json.loads((tmp_path / f"work/stages/train_{k}/round.json").read_text()) for k in (1, 2)
    ]
    assert [r["recalled"] for r in rounds] == [0, 10]


def test_caps_and_languages_of_a_source_are_kept_to(tmp_path: Path) -> None:
    german = "Die Kinder spielten den ganzen Tag im Garten hinter dem alten Haus. "
    file = jsonl(tmp_path / "a.jsonl", [*(prose(i) for i in range(40)), german * 3])
    source = PrepareSource(
        name="a", kind="maths", path=str(file), max_mb=0.01, languages=("en", "de")
    )
    out = run(corpora.config(tmp_path, [source]), tmp_path)
    size = sum(len(text.encode()) for text in texts(out, 0))
    assert 0.008e6 < size <= 0.01e6
    german_alone = replace(source, languages=("de",), max_mb=None)
    out = run(corpora.config(tmp_path, [german_alone], heldout_fraction=0.0), tmp_path, "de")
    assert texts(out, 0) == [german * 3]
    assert dropped(out, "language") == {"a": 40}


def test_the_report_shows_counts_and_examples(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [*(prose(i) for i in range(30)), "too <short>", prose(1)])
    source = PrepareSource(name="a", kind="prose", path=str(file))
    report = (run(corpora.config(tmp_path, [source]), tmp_path) / "report.html").read_text()
    assert "quality rules: prose: fewer than 50 words (1)" in report
    assert "too &lt;short&gt;" in report
    key = r"<div class=\"key\">a, \w+: a.jsonl:\d+; see a.jsonl:\d+"
    assert re.search(r"exact duplicates: [^<]* \(1\)</summary>\n" + key, report)
    assert "http" not in report


def test_a_finished_preparation_is_only_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = corpora.config(tmp_path, two_sources(tmp_path))
    out = run(cfg, tmp_path)
    before = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    capsys.readouterr()
    assert run(cfg, tmp_path) == out
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert "(1 of 1 tasks were done)" in capsys.readouterr().out


def test_a_folder_of_another_preparation_is_refused(tmp_path: Path) -> None:
    sources = two_sources(tmp_path)
    cfg = corpora.config(tmp_path, sources)
    run(cfg, tmp_path)
    with pytest.raises(ValueError, match="holds the stages of other settings or files"):
        run(replace(cfg, heldout_fraction=0.2), tmp_path)
    jsonl(tmp_path / "b.jsonl", [prose(7000 + i) for i in range(20)])
    with pytest.raises(ValueError, match="holds the stages of other settings or files"):
        run(cfg, tmp_path)
    with pytest.raises(ValueError, match="holds something else; delete it or choose another"):
        prepare(cfg, Folder(tmp_path / "w2"), tmp_path / "work" / "corpus", "local", 1, {})


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", ["short"] * 3)
    source = PrepareSource(name="a", kind="prose", path=str(file))
    with pytest.raises(ValueError, match=r"sources\[a\]: nothing is left to train on"):
        run(corpora.config(tmp_path, [source]), tmp_path)
