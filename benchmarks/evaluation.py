"""Evaluation beside lm-eval's own `hf` class: the same scores, and how much faster.

    python -m benchmarks.evaluation --run=runs/v3_tiny --oracle=PYTHON

The run is exported to Hugging Face's format in FP32. Four tasks are made of its held-out texts:
which of four texts continues a beginning, the same after five examples, the likelihood of whole
documents, and greedy texts. Both sides answer the same requests on this CPU. The `hf` class is
timed with several batch sizes, of which the best one counts for each task; ours is timed before and
after it, compiled before. Where nothing is shared, both have to make the same products: the
greatest possible ratio, printed with them, is the one if ours took as long as one large FP32 matrix
product of as many FLOPs, and all else no time. Figures are written to results/evaluation.json.
PYTHON belongs to an environment with `lm-eval`, `torch` and `transformers`.
"""

import datetime
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from absl import app, flags, logging
from lm_eval.tasks import TaskManager

from benchmarks.timing import matmul_flops
from v3jax import host
from v3jax.convert import to_hf
from v3jax.cost import flops_per_token
from v3jax.data.corpus import load_corpus
from v3jax.evals import harness
from v3jax.models import load_run, open_model

_RUN = flags.DEFINE_string("run", "runs/v3_tiny", "Run directory.")
_ORACLE = flags.DEFINE_string("oracle", None, "Python with lm-eval, torch and transformers.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Batch sizes of the hf class.")
_RECORDS = flags.DEFINE_integer("records", 200, "Of the multiple choice; the others have less.")
_LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a context at most, for both sides.")
_HERE = Path(__file__).parent
_OUT = _HERE / "results" / "evaluation.json"
_BEGINNING, _OPTION, _DOCUMENT = 400, 80, 3000  # characters
_SHOTS = 5


def write_tasks(folder: Path, texts: list[str], n: int) -> None:
    """Four task files and their records, drawn from documents."""
    rng = np.random.default_rng(0)
    long = [text for text in texts if len(text) > _DOCUMENT]
    pieces = []
    for _ in range(n):
        text = long[rng.integers(len(long))]
        at = int(rng.integers(len(text) - _BEGINNING - _OPTION))
        pieces.append((text[at : at + _BEGINNING], text[at + _BEGINNING :][:_OPTION]))
    records = []
    for i, (beginning, right) in enumerate(pieces):
        others = [pieces[(i + 7 * k) % n][1] for k in (1, 2, 3)]
        place = int(rng.integers(4))
        options = [*others[:place], right, *others[place:]]
        records.append({"text": beginning, "options": options, "answer": place})
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **mean}],
    }
    _write(folder, "choice", records, **choice)
    shots = {"num_fewshot": _SHOTS, "fewshot_split": "test"}
    shots["fewshot_config"] = {"sampler": "first_n"}
    _write(folder, "few_shot", records[: n // 2], **choice, **shots)
    _write(
        folder,
        "rolling",
        [{"text": text[:_DOCUMENT]} for text in long[: n // 4]],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    _write(
        folder,
        "texts",
        records[: n // 4],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{options[answer]}}",
        generation_kwargs={"until": ["<never>"], "max_gen_toks": 32, "do_sample": False},
        metric_list=[{"metric": "exact_match", **mean}],
    )


def _write(folder: Path, name: str, records: list[dict[str, Any]], **fields: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def ours(directory: str, tasks: Path, length: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds and answers by task."""
    loaded = open_model(directory)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    seconds, answers = {}, {}
    for name in manager.all_subtasks:
        samples: list[dict[str, Any]] = []
        for _ in range(2):  # the first one compiles
            fresh = harness.Answers(None, "")
            model = harness.Model(loaded, fresh, max_length=length, truncate=True)
            start = time.perf_counter()
            _, samples = harness.run(model, manager.load([name]))
            seconds[name] = time.perf_counter() - start
        answers[name] = [sample["resps"] for sample in samples]
    return seconds, answers


def forward_flops(directory: str, tasks: Path, length: int) -> float:
    """Of the documents, in contexts of `length`."""
    loaded = open_model(directory)
    texts = [json.loads(line)["text"] for line in (tasks / "rolling.jsonl").open(encoding="utf-8")]
    n_tokens = sum(len(loaded.tokenizer.encode(text)) for text in texts)
    return n_tokens * flops_per_token(loaded.model, length) / 3


def peer(directory: str, tasks: Path, length: int, batch: str) -> dict[str, Any]:
    """What `lm_eval_peer` printed."""
    assert _ORACLE.value is not None
    command = [_ORACLE.value, str(_HERE / "lm_eval_peer.py"), directory, str(tasks), str(length)]
    done = subprocess.run([*command, batch], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: list[str]) -> None:
    del argv
    host.prepare()
    logging.set_verbosity(logging.WARNING)
    cfg, *_ = load_run(_RUN.value)
    texts = [d.text for part in load_corpus(cfg.data).heldout for d in part]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        directory, tasks = str(folder / "hf"), folder / "tasks"
        tasks.mkdir()
        to_hf(_RUN.value, directory, dtype="fp32", ema=False)
        write_tasks(tasks, texts, _RECORDS.value)
        before, answers = ours(directory, tasks, _LENGTH.value)
        print("ours, seconds:", {k: round(v, 2) for k, v in before.items()}, flush=True)
        if _ORACLE.value is None:
            return
        peers = {b: peer(directory, tasks, _LENGTH.value, b) for b in _BATCHES.value}
        after, _ = ours(directory, tasks, _LENGTH.value)
        least = forward_flops(directory, tasks, _LENGTH.value) / matmul_flops()
    found = []
    for task, first in before.items():
        best = min(peers, key=lambda b: peers[b]["seconds"][task])
        mine, theirs = (first + after[task]) / 2, peers[best]["seconds"][task]
        found.append(
            {
                "task": task,
                "seconds": round(mine, 2),
                "hf_seconds": round(theirs, 2),
                "hf_batch": int(best),
                "ratio": round(theirs / mine, 2),
                "scores": differences(answers[task], peers[best]["answers"][task]),
                "limit": round(theirs / least, 2) if task == "rolling" else None,
            }
        )
    ratio = sum(one["hf_seconds"] for one in found) / sum(one["seconds"] for one in found)
    report = {"date": str(datetime.date.today()), "length": _LENGTH.value, "tasks": found}
    _OUT.write_text(json.dumps(report | {"ratio": round(ratio, 2)}, indent=1) + "\n")
    print(f"{'task':10s} {'ours, s':>8s} {'hf class, s':>12s} {'batch':>6s} {'ratio':>6s}  scores")
    for one in found:
        print(
            f"{one['task']:10s} {one['seconds']:8.2f} {one['hf_seconds']:12.2f} "
            f"{one['hf_batch']:6d} {one['ratio']:6.2f}  {one['scores']}"
            + (f"; at most {one['limit']}" if one["limit"] else "")
        )
    print(f"all: {ratio:.2f}")


def differences(a: list[Any], b: list[Any]) -> str:
    """The largest difference of two sides' log-likelihoods, or how many texts are the same."""
    flat_a, flat_b = _flat(a), _flat(b)
    if isinstance(flat_a[0], str):
        same = sum(x == y for x, y in zip(flat_a, flat_b, strict=True))
        return f"{same} of {len(flat_a)} texts the same"
    x, y = np.array(flat_a, float), np.array(flat_b, float)
    worst = np.abs(x - y).max()
    return f"differ by at most {worst:.2g} nats, {(np.abs(x - y) / np.abs(x)).max():.2g} of it"


def _flat(answers: Any) -> list[Any]:
    """Numbers or texts of nested lists, without whether they were the likeliest."""
    if isinstance(answers, str | float | int) and not isinstance(answers, bool):
        return [answers]
    if isinstance(answers, bool):
        return []
    return [item for answer in answers for item in _flat(answer)]


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    app.run(main)
