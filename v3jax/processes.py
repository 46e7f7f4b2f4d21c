"""One run in several processes: they start, agree, stop and fail together.

With one process nothing here does anything. With more, jax's coordination service, in process 0,
carries short texts between them; arrays travel by XLA alone. Process 0 is the writer: it decides,
and it alone writes files and prints. A process that fails tells the others, which end within
seconds. One that vanishes breaks the others' collectives on CPU, or is missed after
`V3JAX_HEARTBEAT_SECONDS` (100), whereupon jax aborts them. All functions but `start`, `fail` and
`post` are called by every process in the same order.
"""

import functools
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the public face of jax has no key-value store
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax import cli

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_WATCH_SECONDS = 1.0
"""How often a process asks whether another has failed."""
_GRACE_SECONDS = 3.0
"""How long it then waits for an error of its own, which says more."""
_LINGER_SECONDS = 10.0
"""How long process 0, whose end ends the service and aborts the rest, waits for the others."""
_STOP_LEAD = 3
"""Steps from the decision to stop to the stop; see `StopTogether`."""

_rounds = itertools.count()
_last_words = threading.Lock()
_left = threading.Event()
_watchers: list[threading.Thread] = []


def count() -> int:
    """Number of processes."""
    return distributed.global_state.num_processes


def index() -> int:
    """This process' number, from 0."""
    return distributed.global_state.process_id


def is_writer() -> bool:
    """Whether this process writes files and prints: process 0."""
    return index() == 0


def label() -> str:
    """What an error line begins with: `process k of n: `, nothing with one process."""
    return f"process {index()} of {count()}: " if count() > 1 else ""


def say(text: str) -> None:
    """Prints on the writer."""
    if is_writer():
        print(text, flush=True)


def start(program: str, *, detect: bool = False) -> None:
    """Joins the run's other processes, if the environment or `detect` says that there are any.

    The variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them; without
    these, `detect` lets jax look for SLURM, Kubernetes, Open MPI or a TPU pod. Call it before jax
    touches a device. If not all have come within V3JAX_START_SECONDS (300) the process ends, with
    code 1 and one line; jax itself would abort with a stack trace.

    Raises:
      ValueError: some variables are missing or wrong, nothing was detected, or the address cannot
        be served.
    """
    given = _given()
    if given is None and not detect:
        return
    address, n, k = given or (None, None, None)
    if n == 1:
        return
    seconds = _seconds("V3JAX_START_SECONDS", 300)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    late = threading.Timer(seconds, _too_late, (program, seconds))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            address,
            n,
            k,
            cluster_detection_method=None if given is None else "deactivate",
            initialization_timeout=seconds + 3600,
            heartbeat_timeout_seconds=_seconds("V3JAX_HEARTBEAT_SECONDS", 100),
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(_why_not(given is None, error)) from None
    finally:
        late.cancel()
    if count() > 1:
        _watchers.append(threading.Thread(target=_watch, args=(program,), daemon=True))
        _watchers[-1].start()


def _given() -> tuple[str, int, int] | None:
    """Coordinator, number of processes and own number, by the environment."""
    values = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not values:
        return None
    missing = [name for name in _VARIABLES if name not in values]
    if missing:
        raise ValueError(f"{', '.join(values)} without {', '.join(missing)}: set all three or none")
    address, n, k = (values[name] for name in _VARIABLES)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address}: write host:port")
    if not (n.isdecimal() and int(n) > 0):
        raise ValueError(f"JAX_NUM_PROCESSES={n}: must be a positive number")
    if not (k.isdecimal() and int(k) < int(n)):
        raise ValueError(f"JAX_PROCESS_ID={k}: must be within 0..{int(n) - 1}")
    return address, int(n), int(k)


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"{variable}={text}: must be a positive number of seconds")
    return int(text)


def _why_not(detected: bool, error: Exception) -> str:
    if detected and distributed.global_state.coordinator_address is None:
        return (
            "--distributed: no SLURM, Kubernetes, Open MPI or TPU pod found; "
            f"set {', '.join(_VARIABLES)}"
        )
    reason = str(error).split("\n")[0]
    address = distributed.global_state.coordinator_address
    return f"{address} cannot be served ({reason}); correct JAX_COORDINATOR_ADDRESS"


def _too_late(program: str, seconds: int) -> None:
    """Ends a process whose companions have not all come."""
    address = distributed.global_state.coordinator_address or "an address not found yet"
    if is_writer():
        error = f"not all {count()} processes came to {address} after {seconds} s; start the others"
    elif _listens(address):
        error = (
            f"the coordinator at {address} did not begin after {seconds} s; start all processes, "
            "each with its own JAX_PROCESS_ID"
        )
    else:
        error = (
            f"no coordinator at {address} after {seconds} s; "
            "start process 0 or correct JAX_COORDINATOR_ADDRESS"
        )
    os._exit(cli.fail(program, f"{label()}{error}", cli.UNUSABLE))


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def finish() -> None:
    """Waits until every process is done, and leaves the service."""
    if count() > 1:
        agree({})
        _left.set()
        for thread in _watchers:  # the interpreter cannot end while one asks the service
            thread.join()
        jax.distributed.shutdown()


def fail(program: str, error: BaseException, code: int) -> int:
    """Prints an error as one line and returns `code`; with several processes, ends them all.

    The process then ends here, without the interpreter's way out: that would wait for devices that
    wait for other processes.
    """
    if count() == 1:
        return cli.fail(program, error, code)
    with _last_words:  # taken for good: the watcher has nothing to add
        text = str(error).strip().split("\n")[0] or type(error).__name__
        told = _told()
        if isinstance(error, jax.errors.JaxRuntimeError):  # perhaps a connection that broke: why?
            if told is not None:
                text = told
            elif "Gloo" in text:
                text = f"another process was lost ({text}); start all of them again"
        if told is None:
            _try_to_post(f"failed/{index()}", f"process {index()} failed: {text}")
        cli.fail(program, f"{label()}{text}", code)
        _leave(code)
    return code


def _leave(code: int) -> None:
    """Ends this process, which has said why; process 0 after the others."""
    _try_to_post(f"left/{index()}", "")
    deadline = time.monotonic() + _LINGER_SECONDS
    while is_writer() and time.monotonic() < deadline:
        try:
            if len(_client().key_value_dir_get("v3jax/left/")) == count():
                break
        except jax.errors.JaxRuntimeError:
            break
        time.sleep(0.05)
    os._exit(code)


def _watch(program: str) -> None:
    """Ends this process when another has failed, whatever its main thread waits for."""
    while not _left.wait(_WATCH_SECONDS):
        told = _told()
        if told is None:
            continue
        time.sleep(_GRACE_SECONDS)
        with _last_words:
            _leave(cli.fail(program, f"{label()}{told}", cli.UNUSABLE))


def _told() -> str | None:
    """What another process failed with, as far as is known."""
    try:
        found = _client().key_value_dir_get("v3jax/failed/")
    except jax.errors.JaxRuntimeError:
        return None
    return min(found)[1] if found else None


def _client() -> Any:
    return distributed.global_state.client


def post(name: str, text: str) -> None:
    """Says `text` to whoever waits for `name`, which is used once in a run."""
    _client().key_value_set(f"v3jax/{name}", text)


def _try_to_post(name: str, text: str) -> None:
    try:
        post(name, text)
    except jax.errors.JaxRuntimeError:
        return  # said before, or nobody is there to hear it


def wait_for(name: str) -> str:
    """What was or will be posted under `name`."""
    while True:  # in slices: signals are handled between them
        try:
            return _client().blocking_key_value_get(f"v3jax/{name}", 2000)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise


def agree(values: Mapping[str, object]) -> None:
    """Waits until every process is here with the same values.

    Raises:
      ValueError: on every process alike, naming the first fields that differ and who has what.
    """
    if count() == 1:
        return
    place = f"agree/{next(_rounds)}"
    texts = {name: str(value) for name, value in values.items()}
    if is_writer():
        others = [json.loads(wait_for(f"{place}/{k}")) for k in range(1, count())]
        verdict = _difference([texts, *others])
        post(f"{place}/verdict", json.dumps(verdict))
    else:
        post(f"{place}/{index()}", json.dumps(texts))
        verdict = json.loads(wait_for(f"{place}/verdict"))
    if verdict is not None:
        raise ValueError(verdict)


def _difference(texts: Sequence[Mapping[str, str]]) -> str | None:
    """How the processes' values differ, in at most three fields; None if they do not."""
    differ = []
    for name in sorted({name for values in texts for name in values}):
        first, others = texts[0].get(name), texts[1:]
        for k, values in enumerate(others, start=1):
            if values.get(name) != first:
                differ.append(f"{name} is {first} on process 0, {values.get(name)} on process {k}")
                break
    if not differ:
        return None
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return f"the processes disagree: {'; '.join(differ[:3])}{more}; start all alike"


def compiled_together(function: Any) -> Any:
    """`function`, jitted and always called with arrays of one kind, compiled by all before any
    runs it: XLA on CPU gives a process 30 s to come to the first collective."""
    if count() == 1:
        return function
    made = []

    def call(*arguments: Any) -> Any:
        if not made:
            made.append(function.lower(*arguments).compile())
            agree({})
        return made[0](*arguments)

    return call


def decided[T](decide: Callable[[], T]) -> T:
    """What `decide` gives on the writer, a JSON value, on every process.

    Raises:
      ValueError: on every process, if `decide` does.
    """
    if count() == 1:
        return decide()
    name = f"decided/{next(_rounds)}"
    if not is_writer():
        answer = json.loads(wait_for(name))
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]
    try:
        value = decide()
    except ValueError as error:
        post(name, json.dumps({"error": str(error)}))
        raise
    post(name, json.dumps({"value": value}))
    return value


class StopTogether:
    """Makes every process stop before the same step once any of them was asked to.

    Whoever was asked posts it. The writer, when it sees that before step `s`, posts `s + 3` as the
    stop. Before step `t` a process has read the metrics of step `t - 2`, which every process
    dispatched, the writer too; so whoever is before step `s + 3` can see what was posted before
    step `s`, and asks at every step.
    """

    def __init__(self) -> None:
        self._folder = f"stop/{next(_rounds)}"
        self._posted = False

    def due(self, step: int, asked: bool) -> bool:
        """Whether to stop before `step`; asked before each step in turn."""
        if count() == 1:
            return asked
        if asked and not self._posted:
            self._posted = True
            post(f"{self._folder}/asked/{index()}", "")
        found = dict(_client().key_value_dir_get(f"v3jax/{self._folder}/"))
        at = found.get(f"v3jax/{self._folder}/at")
        if at is None and found and is_writer():
            at = str(step + _STOP_LEAD)
            post(f"{self._folder}/at", at)
        return at is not None and step >= int(at)


def held(place: NamedSharding, shape: tuple[int, ...], axis: int) -> list[int]:
    """Which indices along `axis` of an array of this place and shape this process holds."""
    along = range(shape[axis])
    parts = place.addressable_devices_indices_map(shape).values()
    return sorted({i for part in parts if part is not None for i in along[part[axis]]})


def joined(
    place: NamedSharding, shape: tuple[int, ...], axis: int, held: list[int], values: np.ndarray
) -> jax.Array:
    """The array of all processes' `values`, each of which has the rows `held` of `axis`."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        wanted = range(shape[axis])[index[axis]]
        start = held.index(wanted.start)
        rows = slice(start, start + len(wanted))
        return values[(*index[:axis], rows, *index[axis + 1 :])]

    return _from_parts(place, shape, part)


def placed(value: np.ndarray, place: Any) -> jax.Array:
    """A value that every process has, in its place; each device gets its part."""
    if count() == 1:
        return jax.device_put(value, place)
    return _from_parts(place, value.shape, lambda index: value[index])


def _from_parts(
    place: Any, shape: tuple[int, ...], part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """As `jax.make_array_from_callback`, by transfers that the transfer guard knows as meant."""
    indices = place.addressable_devices_indices_map(shape)
    parts = [jax.device_put(part(index), device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def gathered(tree: Any) -> Any:
    """The tree's arrays on the writer's host, one after the other; None on other processes."""
    if count() == 1:
        return jax.device_get(tree)
    leaves, structure = jax.tree.flatten(tree)
    values = [_gathered(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, values) if is_writer() else None


def _gathered(array: jax.Array) -> np.ndarray | None:
    whole = array if array.is_fully_replicated else _replicate(array.sharding)(array)
    return np.array(whole.addressable_data(0)) if is_writer() else None


@functools.cache
def _replicate(sharding: Any) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, P()))
