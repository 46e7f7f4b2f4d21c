"""Pre-training, from a registered experiment to a finished run directory.

    python -m v3jax.train --exp=v3_tiny --workdir=runs/v3_tiny
    python -m v3jax.train --exp=v3_tiny --set optim.clip_norm=0.5 --set balance.strategy=none
    python -m v3jax.train --list

Started again on the same `--workdir` it continues from the last complete checkpoint, bit for bit.
Several processes make one run (`v3jax.processes`): start the same command in each, with
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set, or with --distributed.
"""

import functools
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.sharding import Mesh, NamedSharding

from v3jax import checkpoint, cli, config, cost, host, processes, registry
from v3jax.config import ExperimentConfig
from v3jax.data import baselines
from v3jax.data.dataset import TEMPLATE, Dataset, lengthened, open_dataset
from v3jax.data.loader import HostBatch, make_loader
from v3jax.metrics import Recorder, mfu
from v3jax.models import initial_weights
from v3jax.optim.schedules import n_steps
from v3jax.preflight import preflight
from v3jax.progress import Progress
from v3jax.sharding import make_mesh, rules_of
from v3jax.state import (
    TrainState,
    abstract_state,
    catch_up,
    init_state,
    state_around,
    state_shardings,
)
from v3jax.step import amount_of, amount_specs, make_eval_step, make_train_step
from v3jax.summary import write_report, write_samples

_EXP = flags.DEFINE_string("exp", None, "Registered experiment, or path/to/file.py of your own.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; default runs/<experiment>.")
_SET = flags.DEFINE_multi_string("set", [], "path.to.field=value; repeat for more.")
_LIST = flags.DEFINE_bool("list", False, "List the experiments and stop.")
_PROFILE = flags.DEFINE_string("profile", None, "A:B writes a trace of steps A to B - 1.")
_CHECK = flags.DEFINE_bool("check", False, "Build everything, report, stop before step 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Let jax find the run's other processes (SLURM, Kubernetes, TPU pod)."
)

_FLOAT_METRICS = (
    "loss",
    "mtp_loss",
    "balance_loss",
    "lr",
    "grad_norm",
    "bias_speed",
    "bias_mean",
    "bias_spread",
    "mtp_weight",
    "max_violation",
    "rank_overload",
)


@dataclass(frozen=True)
class Result:
    """How a run ended. `finished` is False when a signal stopped it."""

    step: int
    finished: bool
    eval_loss: float | None
    bits_per_byte: float | None


def run(
    cfg: ExperimentConfig,
    workdir: epath.PathLike,
    *,
    profile: tuple[int, int] | None = None,
    check: bool = False,
) -> Result:
    """Trains `cfg` in `workdir`, continuing from its last complete checkpoint if there is one.

    Every process of a run calls it; only the writer writes and prints.

    Raises:
      ValueError: a setting, a file or the run directory cannot be used; one line. Or the processes
        were not started alike.
      RuntimeError: too many steps in a row without a finite loss, or a failed save.
    """
    workdir = epath.Path(workdir)
    if cfg.numerics.compute == "fp64":
        jax.config.update("jax_enable_x64", True)  # without it jax makes FP32 of it, in silence
    # ---- Who runs where. The directory is judged before anything in it changes.
    processes.agree(config.flatten(cfg) | {"--workdir": workdir, "--check": check})
    found = _found(workdir, cfg)
    mesh = make_mesh(cfg.mesh)

    with StopSignal() as stop, jax.set_mesh(mesh):
        make_train_step(cfg, mesh)  # what cannot be built is found before data is prepared
        # ---- Data: every process prepares or reads all rows and draws those of its devices.
        dataset = open_dataset(cfg)
        processes.agree({"the data's digest": dataset.digest})
        # What was asked for names the run; how long that makes it, only its data can say.
        asked, cfg = cfg, lengthened(cfg, dataset)
        train_step = make_train_step(cfg, mesh)
        if dataset.quarantine is not None:
            dataset.quarantine.keep_in(workdir / f"quarantine-{jax.process_index()}.jsonl")
        feed = Feed(cfg, mesh)
        loader = make_loader(cfg, dataset, feed.rows)
        total_steps = n_steps(cfg)
        if cfg.run.eval_sequences > len(dataset.heldout.tokens_NS):
            n_rows = len(dataset.heldout.tokens_NS)
            processes.say(f"held-out rows: {n_rows}, all of them are evaluated")
        if check:
            preflight(cfg, workdir, dataset, mesh, train_step, feed.place)
            return Result(0, False, None, None)

        train_step = processes.compiled_together(train_step)

        # ---- State, new or continued
        if found is None:
            state, start = _first_state(cfg, mesh), 0
        else:
            state = checkpoint.restore(found, abstract_state(cfg, mesh))
            loader.set_state(found.manifest["data"])
            start = found.step
            processes.say(f"continuing from step {start} of {found.folder}")
        writes = processes.is_writer()
        if writes:
            _describe(workdir, asked, dataset)
            if asked.run.epochs is not None:
                print(
                    f"{asked.run.epochs:g} epochs of {dataset.n_rows:,} rows: "
                    f"{cfg.run.total_tokens:,.0f} tokens, {total_steps:,} steps"
                )
        evaluation = Evaluation(cfg, dataset, mesh)
        trace = Trace(workdir / "profile", profile if writes else None)

        with (
            closing(loader),
            checkpoint.Writer(workdir, asked) as writer,
            Recorder(workdir, start, total_steps, writes=writes) as recorder,
            closing(Progress(cfg.name, start, total_steps, shown=writes)) as progress,
        ):
            # ---- Loop. A step's metrics are read after the next one is dispatched, so the device
            # never waits for the host. Evaluations and checkpoints wait for the step before them
            # first: its speed is then its own. A checkpoint is taken before the next batch is
            # drawn, so that state and data position agree.
            pending: Pending | None = None
            step = start
            while step < total_steps and not stop.due(step):
                evaluated = {}
                if evaluation.due(step):
                    _finish(pending, recorder, progress, cfg)
                    pending = None
                    state = catch_up(cfg, state, mesh)
                    evaluated = evaluation.of(state)
                    progress.lap()
                waited = time.monotonic()
                batch = next(loader)
                waited = time.monotonic() - waited
                trace.before(step)
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, *feed.on_devices(batch))
                _finish(pending, recorder, progress, cfg)
                pending = Pending(step, batch, loader.sequences, metrics, evaluated, waited)
                step += 1
                trace.after(step, metrics)
                writer.poll()
                every = cfg.run.checkpoint_every
                if every and step % every == 0 and step < total_steps:
                    _finish(pending, recorder, progress, cfg)
                    pending = None
                    recorder.flush()
                    state = catch_up(cfg, state, mesh)
                    writer.save(step, state, loader.get_state())

            # ---- End: the last step's row carries the evaluation of the finished parameters. All
            # rows are in place before the last checkpoint makes them final.
            trace.close()
            finished = step >= total_steps
            if pending is not None:
                jax.block_until_ready(pending.metrics)
                pending.seconds = progress.lap()
            state = catch_up(cfg, state, mesh)
            last = evaluation.of(state) if finished else {}
            if pending is not None:
                pending.evaluated = pending.evaluated | last
            _finish(pending, recorder, progress, cfg)
            recorder.flush()
            if step > start:
                writer.save(step, state, loader.get_state())
            writer.wait()

        if not finished:
            processes.say(f"stopped by a signal at step {step}; the same command continues")
            return Result(step, False, None, None)
        samples = write_samples(cfg, state, dataset, workdir)
        if writes:
            write_report(cfg, dataset, workdir, samples, last)
        return Result(step, True, last.get("eval_loss"), last.get("bits_per_byte"))


@dataclass
class Pending:
    """A dispatched step whose metrics have not been read yet."""

    step: int
    batch: HostBatch
    sequences: int
    """Sequences drawn up to and with this step."""
    metrics: dict[str, jax.Array]
    evaluated: dict[str, float]
    waited: float
    seconds: float | None = None
    """What the step took, if it was measured already."""

    def row(self, values: dict[str, Any], seconds: float, cfg: ExperimentConfig) -> dict[str, Any]:
        """The step's row of `metrics.jsonl` from what the device returned."""
        size = self.batch.n_micro * cfg.batch.micro_batch
        tokens = size * cfg.data.seq_len
        row = {
            "step": self.step,
            "tokens": self.sequences * cfg.data.seq_len,
            **{name: float(values[name]) for name in _FLOAT_METRICS},
            "batch_size": size,
            **{n: int(values[n]) for n in ("committed", "extra_passes", "dropped_choices")},
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": self.waited,
        }
        if not row["committed"]:  # where to look: positions in the loader's order
            row |= {"first_sequence": self.sequences - size, "bad_steps": int(values["bad_steps"])}
        flops = cost.flops_per_token(cfg.model, cfg.data.seq_len, mtp=True)
        share = mfu(flops, tokens / seconds, jax.devices()[0].device_kind, cfg.mesh.n_devices)
        return row | ({} if share is None else {"mfu": share}) | self.evaluated


def _finish(
    pending: Pending | None, recorder: Recorder, progress: Progress, cfg: ExperimentConfig
) -> None:
    """Waits for a step, records its row, and stops a run that no longer makes progress."""
    if pending is None:
        return
    values = jax.device_get(pending.metrics)
    seconds = progress.lap() if pending.seconds is None else pending.seconds
    row = pending.row(values, seconds, cfg)
    recorder.write(row, values["load_LE"])
    progress.show(row)
    if not row["committed"]:
        end = row["first_sequence"] + row["batch_size"] - 1
        processes.say(
            f"step {pending.step}: loss or gradient not finite, nothing committed "
            f"(sequences {row['first_sequence']}..{end})"
        )
        if row["bad_steps"] >= cfg.run.max_bad_steps:
            raise RuntimeError(
                f"step {pending.step}: {row['bad_steps']} steps in a row without a finite "
                "loss; lower the learning rate or look at the data (run.max_bad_steps)"
            )


class Feed:
    """A process' share of every micro-batch, and how the shares become arrays over the mesh."""

    def __init__(self, cfg: ExperimentConfig, mesh: Mesh) -> None:
        n_micro = cfg.batch.end // cfg.batch.micro_batch
        self._shape = (n_micro, cfg.batch.micro_batch, cfg.data.seq_len + 1)
        self._cfg = cfg
        self._amounts = jax.tree.map(lambda spec: NamedSharding(mesh, spec), amount_specs(cfg))
        self.place = NamedSharding(mesh, rules_of(cfg).spec(None, "batch", None))
        """Where a batch `[M, B, S]` lives."""
        self.rows = processes.held(self.place, self._shape, axis=1)
        """The rows of a micro-batch that devices of this process hold."""

    def on_devices(self, batch: HostBatch) -> tuple[jax.Array, jax.Array, Any]:
        """Tokens and segments `[M, B, S]`, each device with its rows alone, and how many of the
        micro-batches there are."""
        tokens_MBS, segments_MBS = (
            processes.joined(self.place, self._shape, 1, self.rows, rows_MRS)
            for rows_MRS in (batch.tokens_MRS, batch.segments_MRS)
        )
        return (
            tokens_MBS,
            segments_MBS,
            jax.tree.map(processes.placed, amount_of(self._cfg, batch.n_micro), self._amounts),
        )


class Evaluation:
    """Held-out loss of the raw and the averaged weights, in nats a token and bits a byte."""

    def __init__(self, cfg: ExperimentConfig, dataset: Dataset, mesh: Mesh) -> None:
        self._cfg = cfg
        self._eval_step = processes.compiled_together(make_eval_step(cfg, mesh))
        self._params = state_shardings(cfg, mesh).params
        self._rows = min(cfg.run.eval_sequences, len(dataset.heldout.tokens_NS))
        self._dataset = dataset
        self._bytes = dataset.heldout_bytes(self._rows)
        # A pipeline takes as many micro-batches at once as keep it busy.
        n_micro = min(2 * cfg.mesh.pipe, -(-self._rows // cfg.batch.micro_batch))
        n_micro = n_micro if cfg.mesh.pipe > 1 else 1
        self._shape = (n_micro * cfg.batch.micro_batch, cfg.data.seq_len + 1)
        self._place = NamedSharding(mesh, rules_of(cfg).spec("batch", None))
        self._held = processes.held(self._place, self._shape, axis=0)

    def due(self, step: int) -> bool:
        """Whether the parameters before `step` are to be evaluated."""
        every = self._cfg.run.eval_every
        return every > 0 and step % every == 0

    def of(self, state: TrainState) -> dict[str, float]:
        """Evaluates a state; nothing if the experiment evaluates never."""
        if not self._cfg.run.eval_every:
            return {}
        nats, count = self._nats(state.params, state.router_state)
        values = {"eval_loss": nats / count}
        if self._bytes:
            values["bits_per_byte"] = baselines.bits_per_byte(nats, self._bytes)
        if state.ema is not None:
            average = jax.device_put(state.ema, self._params)  # beside the parameters
            values["eval_loss_ema"] = self._nats(average, state.router_state)[0] / count
        return values

    def _nats(self, params: Any, router_state: Any) -> tuple[float, int]:
        """Summed over fixed-size batches; a last one is filled up with padding rows."""
        size = self._shape[0]
        nats, count = 0.0, 0
        held = self._dataset.heldout
        for start in range(0, self._rows, size):
            tokens, segments = (
                self._on_devices(rows_NS, start) for rows_NS in (held.tokens_NS, held.segments_NS)
            )
            some, n = jax.device_get(self._eval_step(params, router_state, tokens, segments))
            nats, count = nats + float(some), count + int(n)
        return nats, count

    def _on_devices(self, rows_NS: np.ndarray, start: int) -> jax.Array:
        """The rows from `start` on, each device with its own alone."""
        wanted = start + np.asarray(self._held)
        there = wanted < self._rows
        rows_RS = np.zeros((len(wanted), self._shape[1]), rows_NS.dtype)
        rows_RS[there] = rows_NS[wanted[there]]
        return processes.joined(self._place, self._shape, 0, self._held, rows_RS)


class StopSignal:
    """SIGTERM and SIGINT ask the loop to save and end; a second one ends the process at once.

    One process that is asked is enough for all to end, at the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._together = processes.StopTogether()

    def due(self, step: int) -> bool:
        """Whether to end before `step`; asked before each step in turn."""
        return self._together.due(step, self.requested)

    def __enter__(self) -> "StopSignal":
        # Python takes handlers on the main thread only.
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested:
            os._exit(128 + number)
        self.requested = True


class Trace:
    """A profile of the steps from `steps[0]` to `steps[1] - 1`, of those that this process runs."""

    def __init__(self, folder: epath.Path, steps: tuple[int, int] | None) -> None:
        self._folder = folder
        self._first, self._end = steps or (0, 0)
        self._running = False

    def before(self, step: int) -> None:
        if not self._running and self._first <= step < self._end:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, steps_done: int, metrics: dict[str, jax.Array]) -> None:
        """Ends the trace when its last step, which made `metrics`, is complete."""
        if self._running and steps_done >= self._end:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def _found(workdir: epath.Path, cfg: ExperimentConfig) -> checkpoint.Checkpoint | None:
    """The checkpoint to continue from, as the writer finds it."""

    def step() -> int | None:
        found = checkpoint.check_workdir(workdir, cfg)
        return None if found is None else found.step

    chosen = processes.decided(step)
    if chosen is None:
        return None
    if chosen not in checkpoint.committed_steps(workdir):
        raise ValueError(
            f"{workdir}: this process does not see step {chosen}; --workdir must be on a disk that "
            "all processes share"
        )
    return checkpoint.load(workdir, chosen)


def _first_state(cfg: ExperimentConfig, mesh: Mesh) -> TrainState:
    if cfg.init_from is None:
        return init_state(cfg, mesh)
    processes.say(f"starting from the weights of {cfg.init_from}")
    return state_around(cfg, *initial_weights(cfg, mesh), mesh)


def _describe(workdir: epath.Path, cfg: ExperimentConfig, dataset: Dataset) -> None:
    """Writes what the run is made of: config, tokenizer, list of documents."""
    workdir.mkdir(parents=True, exist_ok=True)
    files = "".join(f"{digest}  {source}  {name}\n" for source, name, digest in dataset.files)
    checkpoint.write_whole(workdir / "data_files.txt", f"rows {dataset.digest}\n{files}")
    if dataset.tokenizer is not None:
        checkpoint.write_whole(workdir / "tokenizer.json", dataset.tokenizer.text)
    if dataset.chat_template is not None:
        checkpoint.write_whole(workdir / TEMPLATE, dataset.chat_template)
    checkpoint.write_whole(workdir / "config.txt", config.to_text(cfg))
    for source in dataset.sources:
        print(
            f"{source.name}: {source.documents} documents, {source.megabytes:.1f} MB, "
            f"{source.tokens:,} tokens, weight {source.weight:g}"
            + (f"; {source.too_long:,} too long and left out" if source.too_long else "")
        )


def _profile_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ValueError(f"--profile={text}: write A:B with A < B")
    return int(first), int(last)


def _list_experiments() -> None:
    for name in registry.names():
        print(f"{name:16s} {registry.describe(name)}")


_fail = functools.partial(cli.fail, "train")


def main(argv: Sequence[str]) -> int:
    """Parses, runs; 2 for a mistake in the call, 1 for anything that cannot be used."""
    if len(argv) > 1:
        return _fail(f"unexpected arguments {' '.join(argv[1:])}; options start with --", cli.USAGE)
    try:
        if _LIST.value:
            _list_experiments()
            return 0
        if _EXP.value is None:
            raise ValueError("--exp=NAME is missing; --list shows the experiments")
        cfg = config.override(registry.get(_EXP.value), _SET.value)
        profile = _profile_range(_PROFILE.value)
    except ValueError as error:
        return _fail(error, cli.USAGE)
    logging.set_verbosity(logging.WARNING)
    host.prepare()
    workdir = _WORKDIR.value or f"runs/{cfg.name}"
    try:
        processes.start("train", detect=_DISTRIBUTED.value)
        run(cfg, workdir, profile=profile, check=_CHECK.value)
        processes.finish()
    except (ValueError, RuntimeError, OSError) as error:
        return processes.fail("train", error, cli.UNUSABLE)
    except Exception as error:  # a bug: shown whole here, and the other processes learn of it
        if processes.count() > 1:
            traceback.print_exc()
            processes.fail("train", error, cli.UNUSABLE)
        raise
    return 0


if __name__ == "__main__":
    cli.run("train", main)
