"""Speed and scores of the evaluation harness's own `hf` class, run by `benchmarks.evaluation`.

    PYTHON benchmarks/lm_eval_peer.py DIRECTORY TASKS MAX_LENGTH BATCH_SIZE [float64]

Runs in an environment of its own with `lm-eval`, `torch` and `transformers`. TASKS is a folder of
task files. Prints one JSON object: seconds of the whole evaluation after one to warm up, and what
each request was answered.
"""

import json
import sys
import time

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main(directory: str, tasks: str, max_length: int, batch_size: int, dtype: str) -> None:
    model = HFLM(
        pretrained=directory,
        dtype=dtype,
        device="cpu",
        batch_size=batch_size,
        max_length=max_length,
    )
    manager = TaskManager(include_path=tasks, include_defaults=False)
    answers, seconds = {}, {}
    for name in manager.all_subtasks:
        for limit in (2, None):
            start = time.perf_counter()
            found = simple_evaluate(
                model=model, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0
            )
            seconds[name] = time.perf_counter() - start
        answers[name] = [sample["resps"] for sample in found["samples"][name]]
    print(json.dumps({"seconds": seconds, "answers": answers}))


if __name__ == "__main__":
    directory, tasks, max_length, batch_size, *rest = sys.argv[1:]
    main(directory, tasks, int(max_length), int(batch_size), *(rest or ["float32"]))
