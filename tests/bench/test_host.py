"""What a step costs the host: launches are stubbed and counted, nothing of it stays, and all cases are in the table."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from alrp_triton import alrp_loss, checks
from bench.__main__ import main
from bench.speed import host
from bench.speed.contenders import ALRP, AP, FOCAL, RANK_SORT, backends
from bench.speed.inside import filled, stubs, triton_kernels
from tests.conftest import DEVICE, or_skip

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="Triton's kernels are compiled here, for a GPU alone")


@pytest.fixture(autouse=True)
def _triton() -> None:  # pyright: ignore[reportUnusedFunction]
    or_skip("triton_tiled")


def replaced() -> list[Any]:
    kernels = [getattr(module, name) for module, name in triton_kernels()]
    return [*kernels, checks.check_values, torch.empty, torch.empty_like, torch.Tensor.new_empty]


def test_all_cases_are_in_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(host, "SIZES", host.SIZES[:1])
    monkeypatch.setattr(host, "WARM_UP", 1)
    before, threads = replaced(), torch.get_num_threads()
    assert main(["host", "--turns", "2", "--no-instructions", "--out", str(tmp_path / "host.json")]) == 0
    assert all(a is b for a, b in zip(before, replaced(), strict=True))
    assert torch.get_num_threads() == threads
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "host.json").read_text())
    assert host.markdown(report) in printed
    rows = [host.Row(**row) for row in report["rows"]]
    losses = {(loss, form) for loss in (ALRP, AP, RANK_SORT) for form in (host.CLASSES, host.DENSE)}
    for backend in ("triton_tiled", "triton_binned"):
        of = [row for row in rows if row.backend == backend]
        of_groups = {(ALRP, host.GROUPS)} if backend == "triton_binned" else set[tuple[str, str]]()
        assert {(row.loss, row.targets) for row in of} == losses | of_groups
        assert all(row.path == host.STUBBED and row.quartiles_us and not row.skipped for row in of)
        assert all(row.launches and row.operations and row.filling_us >= 0 for row in of)
    of_focal = [row for row in rows if row.loss == FOCAL]
    assert [(row.path, row.launches, row.per_focal) for row in of_focal] == [(host.STUBBED, 0, 1), (host.CPU, None, 1)]
    assert {(row.loss, row.backend) for row in rows if row.path == host.CPU and row.backend} == {
        (loss, backend) for loss in (ALRP, AP, RANK_SORT) for backend in backends()
    }
    assert all(f"| {row.loss} | {row.backend} | {row.targets} |" in printed for row in rows)


def test_nothing_is_stored_unasked(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    store, measure = Mock(), Mock(return_value={})
    monkeypatch.setattr("bench.__main__.store", store)
    monkeypatch.setattr("bench.__main__.measure", measure)
    monkeypatch.setattr("bench.__main__.host_markdown", Mock(return_value="a table"))
    assert main(["host"]) == 0
    assert capsys.readouterr().out == "a table\n"
    measure.assert_called_once_with(host.TURNS, True)
    store.assert_not_called()


def test_stubs_are_put_back_after_an_error() -> None:
    before = replaced()

    def fail() -> None:
        with stubs(), filled():
            assert not any(a is b for a, b in zip(before, replaced(), strict=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(a is b for a, b in zip(before, replaced(), strict=True))


def test_what_no_kernel_has_written_is_in_range() -> None:
    """Without what fills it, positives are where memory happens to say."""
    logits, errors = torch.randn(40, 4, requires_grad=True), torch.rand(10, requires_grad=True)
    targets = torch.full((40,), 4)
    targets[:10] = 1
    with stubs() as stub, filled():
        out = alrp_loss(logits, targets, errors, backend="triton_binned")
        assert stub.launches > 4
        assert not out.total.isnan()
        torch.autograd.grad(out.total, (logits, errors))
        with pytest.raises(TypeError, match="float16"):  # arguments are checked as ever
            alrp_loss(targets, targets, errors, backend="triton_binned")
    with pytest.raises(ValueError, match="targets mark 10 positives"):
        alrp_loss(logits, targets, errors[:9], backend="torch")


def test_callgrind_is_told_which_losses() -> None:
    assert list(host._counted_steps()) == [FOCAL, ALRP, AP, RANK_SORT]  # pyright: ignore[reportPrivateUsage]
