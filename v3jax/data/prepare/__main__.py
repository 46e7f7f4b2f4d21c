"""Prepares a corpus: cleaned, deduplicated, tokenised, in shards under an index with digests.

    python -m v3jax.data.prepare --exp=v3_tiny
    python -m v3jax.data.prepare --config=my_corpus.py --workdir=corpora/mine --workers=8
    python -m v3jax.data.prepare --config=my_corpus.py --executor=slurm --sbatch=partition=cpu

`--config` names a Python file whose function `prepare` returns a `PrepareConfig`
(`v3jax/data/prepare/config.py`); `--exp` takes the sources of an experiment. Started again on the
same `--workdir` it goes on with the tasks that are left, to the same bytes.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from v3jax import cli, registry
from v3jax.config import override
from v3jax.data.prepare.config import PrepareConfig, of_experiment, of_file
from v3jax.data.prepare.staged import Folder

_EXECUTORS = ("local", "ray", "slurm")


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("exp", None, "Registered experiment, or path/to/file.py, for its sources.")
    flags.DEFINE_string("config", None, "Python file whose prepare() returns a PrepareConfig.")
    flags.DEFINE_string("workdir", None, "Folder of the stages; default corpora/<name>.")
    flags.DEFINE_string("out", None, "Folder of the corpus; default <workdir>/corpus.")
    flags.DEFINE_multi_string("set", [], "path.to.field=value; repeat for more.")
    flags.DEFINE_enum("executor", "local", _EXECUTORS, "What runs the tasks.")
    flags.DEFINE_integer("workers", None, "Tasks at a time; default all cores.", lower_bound=1)
    flags.DEFINE_multi_string(
        "sbatch", [], "An option of sbatch, as partition=cpu; repeat for more."
    )


def main(argv: Sequence[str]) -> int:
    """Parses, prepares; 2 for a mistake in the call, 1 for anything that cannot be used."""
    values = flags.FLAGS.flag_values_dict()
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {' '.join(argv[1:])}; options start with --")
        name, cfg = chosen(values["exp"], values["config"])
        cfg = override(cfg, values["set"])
        options = dict(_option(text) for text in values["sbatch"])
        if options and values["executor"] != "slurm":
            raise ValueError("--sbatch: goes with --executor=slurm")
    except ValueError as error:
        return cli.fail("data.prepare", error, cli.USAGE)
    logging.set_verbosity(logging.WARNING)
    work = Folder(Path(values["workdir"] or Path("corpora", name)).expanduser().absolute())
    out = Path(values["out"]).expanduser().absolute() if values["out"] else work.root / "corpus"
    try:
        prepare(cfg, work, out, values["executor"], values["workers"], options)
    except (ValueError, OSError) as error:
        return cli.fail("data.prepare", error, cli.UNUSABLE)
    return 0


def chosen(exp: str | None, config: str | None) -> tuple[str, PrepareConfig]:
    """The name and the preparation of `--exp` or `--config`.

    Raises:
      ValueError: none or both, or one that is not there.
    """
    if (exp is None) == (config is None):
        raise ValueError("write --exp=NAME or --config=FILE.py, one of them")
    if config is not None:
        return Path(config).stem, of_file(Path(config))
    assert exp is not None
    experiment = registry.get(exp)
    if experiment.data.synthetic:
        raise ValueError(f"--exp={exp}: draws synthetic data, which need no corpus")
    return experiment.name, of_experiment(experiment)


def _option(text: str) -> tuple[str, str]:
    key, sep, value = text.partition("=")
    if not sep or not key:
        raise ValueError(f"--sbatch {text!r}: write option=value")
    return key, value


def prepare(
    cfg: PrepareConfig,
    work: Folder,
    out: Path,
    executor: str,
    workers: int | None,
    options: dict[str, str],
) -> None:
    """Runs, or queues, what is left to do, and prints what each stage did.

    Raises:
      ValueError: anything that cannot be used; see `pipeline.start`.
    """
    from v3jax.data.prepare import pipeline

    found = pipeline.start(cfg, work, out)
    n_workers = workers or os.cpu_count() or 1
    if executor == "slurm":
        for script in pipeline.run_slurm(found, work, workers or cfg.n_tasks, options):
            print(f"queued: {script}")
        return

    def tell(line: str) -> None:
        print(line, flush=True)

    run = pipeline.run_ray if executor == "ray" else pipeline.run_local
    run(found, work, n_workers, tell)
    print(summary(out))
    print(f"done: {out}")


def summary(out: Path) -> str:
    """What a corpus holds, a line a source."""
    from v3jax.data.shards import read_index

    lines = [f"{'source':20s} {'train':>9s} {'held out':>9s} {'tokens':>14s} {'bytes/token':>11s}"]
    for source in read_index(out)["sources"]:
        both = source["train"], source["heldout"]
        tokens = sum(side["tokens"] for side in both)
        size = sum(side["text_bytes"] for side in both)
        documents = " ".join(f"{side['documents']:9,}" for side in both)
        lines.append(f"{source['name']:20s} {documents} {tokens:14,} {size / tokens:11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    cli.run("data.prepare", main)
