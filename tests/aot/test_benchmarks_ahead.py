"""What the benchmarks ask of the compilers of machines that are not here."""

import pytest

from benchmarks.ahead import Report, compile_for
from v3jax.aot.collectives import Collective


def test_sum_over_an_axis_leaves_out_what_may_not_run() -> None:
    def permute(count: int, certain: bool) -> Collective:
        return Collective("collective-permute", ("expert",), 64, 64, count, certain, False, False)

    total = Collective("all-reduce", ("node", "expert"), 4, 7, 4, True, False, False)
    found = (permute(3, True), total, permute(4, True), permute(1, False))
    report = Report("h100:2x8", found, 0, 0, 0, 0.0)
    assert report.sent("expert", "collective-permute") == 7 * 64
    assert report.sent("node") == 4 * 4


def test_missing_interpreter_is_one_line() -> None:
    with pytest.raises(RuntimeError, match=r"^h100:2x8: cannot run /no/python: [^\n]*$"):
        compile_for("benchmarks.exchange:layer", "h100:2x8", python="/no/python")
