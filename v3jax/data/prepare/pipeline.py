"""The preparation as a list of stages, and what runs them: this machine, Ray or SLURM.

A stage is a datatrove pipeline and a number of tasks. Every executor is handed the same stages and
notes the tasks that are done, so that a preparation that was killed goes on with those left. What
is in a stage's files does not depend on who ran it, nor in what order.
"""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v3jax.config import to_text
from v3jax.data import shards
from v3jax.data.prepare import decontaminate, recall, steps, write
from v3jax.data.prepare.config import PrepareConfig
from v3jax.data.prepare.dedup import Cluster, FindExact
from v3jax.data.prepare.read import Piece, pieces
from v3jax.data.prepare.report import funnel, page, rounds, stage_counts
from v3jax.data.prepare.staged import Folder, read_ledgers, read_quarantine, whole
from v3jax.data.tokenizer import load_tokenizer

CLEAN_STEPS = ("read", "unicode", "language", "quality", "decontamination")
_ABOUT = "prepare.txt"


@dataclass(frozen=True)
class Stage:
    """A pipeline that `tasks` tasks run, each with its rank, once the stage before is done."""

    name: str
    steps: tuple[Any, ...]
    tasks: int


@dataclass(frozen=True)
class Budget:
    """Stops the run when too much was quarantined."""

    cfg: PrepareConfig
    folders: tuple[Path, ...]

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        rows = read_quarantine(*self.folders)
        (read,) = read_ledgers(self.folders[0], ["read"], 0)
        bad = steps.over_budget(len(rows), len(rows) + read.kept.total(), self.cfg)
        if bad is not None:
            first = rows[0]
            raise ValueError(
                f"{bad}; the first is {first['file']}, {first['reason']} at {first['offset']}; "
                "mend the files or raise the budget"
            )


@dataclass(frozen=True)
class Finish:
    """Puts the corpus together beside its place, and then in it."""

    cfg: PrepareConfig
    work: Folder
    out: Path
    steps: tuple[str, ...]

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        cfg, stage = self.cfg, self.work.stage
        partial = self.out.with_name(f"{self.out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        written = stage("shards")
        for file in sorted(written.rglob("*.array_record")):
            write.place(file, partial / file.relative_to(written))
        write.place(stage("tokenizer") / shards.TOKENIZER, partial / shards.TOKENIZER)
        tokenizer = load_tokenizer(partial)
        index = write.index_of(cfg, tokenizer, stage("order"), written, partial)
        ledgers = read_ledgers(stage("clean"), CLEAN_STEPS, cfg.examples)
        later = [name for name in self.steps if name not in CLEAN_STEPS]
        ledgers += read_ledgers(stage("encode"), later, cfg.examples)
        quarantined = read_quarantine(stage("clean"), stage("encode"))
        index["stages"] = stage_counts(cfg, ledgers)
        index["quarantined"] = len(quarantined)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in quarantined)
        (partial / "quarantine.jsonl").write_text(lines, encoding="utf-8")
        html = page(cfg, index, ledgers, quarantined, rounds(self.work), self.work)
        (partial / "report.html").write_text(html, encoding="utf-8")
        text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
        (partial / shards.INDEX).write_text(text, encoding="utf-8")
        shards.Shards.open(partial, verify=True)
        _move(partial, self.out)


def _move(partial: Path, out: Path) -> None:
    """Gives the corpus its name; one that is there already must be the same."""
    if out.exists():
        there = out / shards.INDEX
        same = there.is_file() and there.read_bytes() == (partial / shards.INDEX).read_bytes()
        if not same:
            raise ValueError(f"{out}: holds something else; delete it or choose another --out")
        shutil.rmtree(partial)
        return
    partial.replace(out)


def stages(
    cfg: PrepareConfig, work: Folder, out: Path, parts: Sequence[Piece] | None = None
) -> list[Stage]:
    """The whole preparation, in order."""
    from v3jax.data.prepare import minhash

    folder, n = work.stage, cfg.n_tasks
    clean = folder("clean")
    cleaning: list[Any] = [
        steps.Read(cfg, tuple(pieces(cfg) if parts is None else parts), clean),
        steps.Normalise(cfg, clean),
        steps.Identify(cfg, clean),
        steps.Rules(cfg, clean),
    ]
    if cfg.decontaminate.paths:
        cleaning.append(steps.Decontaminate(cfg, clean))
    found = [
        Stage("clean", (*cleaning, steps.Keep(clean)), n),
        Stage("budget", (Budget(cfg, (clean,)),), 1),
    ]
    encode = folder("encode")
    drop: list[steps.Without] = []

    def without(step: str, reason: str, removed: str) -> None:
        drop.append(steps.Without(step, reason, folder(removed), cfg, encode))

    def kept(into: str) -> list[Any]:
        """Steps that yield what is kept so far; their ledgers lie in another stage's folder."""
        return [steps.Load(clean), *(dataclasses.replace(d, folder=folder(into)) for d in drop)]

    if cfg.dedup.exact:
        found.append(Stage("exact", (FindExact(clean, folder("exact")),), n))
        without("exact", "the same text stands in an earlier document", "exact")
    if cfg.dedup.minhash:
        signed, pairs = folder("signatures"), folder("pairs")
        exact = folder("exact") if cfg.dedup.exact else None
        near = Cluster(clean, exact, pairs, folder("near"), n)
        found += [
            Stage(
                "signatures",
                (*kept("signatures_ledgers"), minhash.signatures(cfg.dedup, signed)),
                n,
            ),
            Stage("pairs", (minhash.buckets(cfg.dedup, signed, pairs),), cfg.dedup.buckets),
            Stage("near", (near,), 1),
        ]
        without("near", "almost the same text stands in another document", "near")
    if cfg.judged:
        found += _recall(cfg, work, kept)
        without("classifier", "the classifier scores it low", "judged")
    if cfg.tokenizer is None:
        sample = folder("sample")
        found.append(Stage("sample", (*kept("sample"), write.Sample(cfg, sample)), n))
    tokenizer, ordered = folder("tokenizer"), folder("order")
    written = folder("shards")
    names = (*CLEAN_STEPS, *(d.step for d in drop))
    if not cfg.decontaminate.paths:
        names = tuple(name for name in names if name != "decontamination")
    found += [
        Stage("tokenizer", (write.MakeTokenizer(cfg, folder("sample"), tokenizer),), 1),
        Stage(
            "encode",
            (steps.Load(clean, encode), *drop, write.Encode(cfg, tokenizer, encode)),
            n,
        ),
        Stage("encode_budget", (Budget(cfg, (clean, encode)),), 1),
        Stage("order", (write.Order(cfg, encode, ordered, n),), 1),
        Stage("shards", (write.WriteShards(cfg, encode, ordered, tokenizer, written),), n),
        Stage("finish", (Finish(cfg, work, out, names),), 1),
    ]
    return found


def _recall(cfg: PrepareConfig, work: Folder, kept: Callable[[str], list[Any]]) -> list[Stage]:
    """Rounds of training and scoring, and the decision."""
    folder, clean, n = work.stage, work.stage("clean"), cfg.n_tasks
    unscored = folder("round_0")
    found = [Stage("round_0", (*kept("round_0"), recall.Score(cfg, None, unscored)), n)]
    before = None
    for number in range(1, cfg.classifier.rounds + 1):
        trained, scored = folder(f"train_{number}"), folder(f"round_{number}")
        train = recall.Train(cfg, number, clean, before, unscored, trained)
        score = recall.Score(cfg, trained, scored)
        found += [
            Stage(f"train_{number}", (train,), 1),
            Stage(f"round_{number}", (*kept(f"round_{number}"), score), n),
        ]
        before = scored
    assert before is not None
    return [*found, Stage("judged", (recall.Judge(cfg, before, folder("judged")),), 1)]


def start(cfg: PrepareConfig, work: Folder, out: Path) -> list[Stage]:
    """Takes possession of a working folder, or goes on in it; the stages to run.

    Raises:
      ValueError: the folder holds stages of another configuration or of other files, the extra is
        not installed, or something named in the configuration is not there.
    """
    need_extra()
    parts = pieces(cfg)
    if cfg.tokenizer is not None:
        load_tokenizer(cfg.tokenizer)
    decontaminate.make_index(cfg.decontaminate)
    if cfg.judged:
        seeds = (cfg.classifier.positives, cfg.classifier.negatives)
        for path in filter(None, seeds):
            recall.seeds(path, cfg.classifier)
    about = to_text(cfg) + "".join(_stamp(piece) for piece in parts)
    file = work.root / _ABOUT
    if file.is_file() and (there := file.read_text(encoding="utf-8")) != about:
        other = sorted(set(there.splitlines()) ^ set(about.splitlines()))[0]
        raise ValueError(
            f"{work.root}: holds the stages of other settings or files ({other}); choose another "
            "--workdir or delete this one"
        )
    work.root.mkdir(parents=True, exist_ok=True)
    with whole(file, "w") as content:
        content.write(about)
    if not (out / shards.INDEX).is_file():
        (logs(work, "finish") / "completions" / "00000").unlink(missing_ok=True)
    return stages(cfg, work, out, parts)


def _stamp(piece: Piece) -> str:
    if not piece.file:
        return f"{piece.name} of Python {sys.version.split()[0]}\n" if piece.start == 0 else ""
    changed = Path(piece.file).stat().st_mtime_ns
    return f"{piece.file} of {piece.size} bytes, changed at {changed}\n" if not piece.start else ""


def need_extra() -> None:
    """Raises ValueError unless the extra is installed."""
    for name in ("datatrove", "ftfy", "py3langid", "trafilatura", "pyarrow"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"needs {name}; pip install 'v3jax[data]'")


def logs(work: Folder, stage: str) -> Path:
    """Where datatrove notes a stage's finished tasks and its logs."""
    return work.root / "logs" / stage


def run_local(
    found: Sequence[Stage], work: Folder, workers: int, tell: Callable[[str], None]
) -> None:
    """Runs the stages here, `workers` tasks at a time."""
    from v3jax.data.prepare.executors import local

    for stage in found:
        executor = local(stage, logs(work, stage.name), min(workers, stage.tasks))
        left = len(executor.get_incomplete_ranks())
        if left:
            executor.run()
        _told(stage, left, work, tell)


def run_ray(
    found: Sequence[Stage], work: Folder, workers: int, tell: Callable[[str], None]
) -> None:
    """Runs the stages on a Ray cluster, or on this machine as one."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--executor=ray needs ray; pip install 'v3jax[ray]'")
    from v3jax.data.prepare.executors import on_ray, ray_session

    with ray_session():
        for stage in found:
            executor = on_ray(stage, logs(work, stage.name), min(workers, stage.tasks))
            left = len(executor.get_incomplete_ranks())
            if left:
                executor.run()
                failed = executor.get_incomplete_ranks()
                if failed:
                    log = logs(work, stage.name) / "logs" / f"task_{failed[0]:05d}.log"
                    raise ValueError(f"{stage.name}: {len(failed)} tasks failed; see {log}")
            _told(stage, left, work, tell)


def run_slurm(
    found: Sequence[Stage], work: Folder, workers: int, options: dict[str, str]
) -> list[str]:
    """Queues the stages as SLURM arrays, each after the one before; the scripts they run."""
    from v3jax.data.prepare.executors import on_slurm

    if shutil.which("sbatch") is None:
        raise ValueError("--executor=slurm: no sbatch here; run it where jobs are submitted")
    before, scripts = None, []
    for stage in found:
        executor = on_slurm(
            stage, logs(work, stage.name), min(workers, stage.tasks), options, before
        )
        try:
            with contextlib.redirect_stdout(sys.stderr):
                executor.run()
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"{stage.name}: sbatch refused it with exit code {error.returncode}; see --sbatch"
            ) from None
        scripts.append(str(logs(work, stage.name) / "launch_script.slurm"))
        before = executor
    return scripts


def _told(stage: Stage, left: int, work: Folder, tell: Callable[[str], None]) -> None:
    again = (
        "" if left == stage.tasks else f" ({stage.tasks - left} of {stage.tasks} tasks were done)"
    )
    tell(f"{stage.name:14s}{funnel(stage.name, work)}{again}")
