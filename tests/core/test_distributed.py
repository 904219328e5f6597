"""One ranking over several processes (gloo, no network): equal to one process, little on the wire, errors and no hangs."""

# pyright: reportPrivateUsage=false
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest
import torch
import torch.distributed as dist

from alrp_triton import alrp_loss, distributed, operators
from tests.support.processes import TORCHRUN, Processes, run_ranks, run_together


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    """Three: a mean over them is not a half, and one can be between two others."""
    jobs = [
        "joint",
        "train",
        "traffic",
        "calls_another_loss",
        "gives_up",
        *(["heads", "masks"] if find_spec("torchvision") else []),
        "compiled",
        "skips_a_call",
    ]
    return run_ranks(jobs, 3, tmp_path_factory.mktemp("gloo") / "store")


def assert_done(processes: Processes, job: str) -> None:
    for process in processes:
        assert f"done: {job}\n" in process.stdout, process.stderr


def test_all_processes_end_in_peace(processes: Processes) -> None:
    assert [process.returncode for process in processes] == [0] * len(processes)


def test_equal_to_one_process_on_the_joint_batch(processes: Processes) -> None:
    """Uneven sizes, processes without positives, without negatives, without anything; all losses; groups."""
    assert_done(processes, "joint")


def test_the_same_weights_as_one_process_after_20_steps(processes: Processes) -> None:
    assert_done(processes, "train")


def test_bytes_on_the_wire_do_not_depend_on_the_number_of_logits(processes: Processes) -> None:
    assert_done(processes, "traffic")


def test_all_see_that_they_did_not_call_the_same(processes: Processes) -> None:
    assert_done(processes, "calls_another_loss")


def test_all_hear_of_bad_input_on_one(processes: Processes) -> None:
    assert_done(processes, "gives_up")


@pytest.mark.skipif(not find_spec("torchvision"), reason="the integrations need torchvision")
def test_the_head_of_a_detector(processes: Processes) -> None:
    assert_done(processes, "heads")


@pytest.mark.skipif(not find_spec("torchvision"), reason="the integrations need torchvision")
def test_masks(processes: Processes) -> None:
    assert_done(processes, "masks")


def test_calls_are_counted(processes: Processes) -> None:
    assert_done(processes, "skips_a_call")


def test_compiles_without_a_graph_break(processes: Processes) -> None:
    assert_done(processes, "compiled")


@pytest.mark.parametrize("job", ["dies", "calls_nothing", "calls_another_collective"])
def test_an_error_and_no_hang(job: str, tmp_path: Path) -> None:
    """Within the timeout of the group, which is short; tests/support/processes.py ends those that hang."""
    processes = run_ranks([job], 3 if job == "dies" else 2, tmp_path / "store", 3)
    killed = [process for process in processes if process.returncode == -9]
    assert len(killed) == (job == "dies")
    assert_done([process for process in processes if process not in killed], job)


def test_the_example_learns() -> None:
    (done,) = run_together([*TORCHRUN, "-m", "examples.ddp"])
    assert done.returncode == 0, done.stderr
    errors = [float(line.split()[5]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert errors[-1] < 0.5 * errors[0]


THREADS = """
import sys
from pathlib import Path
from examples.ddp import train
from examples.process_group import process_group
threads = lambda: [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]
with process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1):
    train()
    assert threads()
assert not threads(), threads()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in Linux's /proc")
@pytest.mark.skipif(torch.__version__ < "2.11", reason="gloo's threads have names from torch 2.11 on")
def test_no_thread_outlives_the_group(tmp_path: Path) -> None:
    (done,) = run_together(["-c", THREADS, str(tmp_path / "store")])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "backends", "wanted"),
    [("cpu", "cpu:gloo,cuda:gloo", "cpu"), ("cpu", "cuda:nccl", "cuda:3"), ("cuda:1", "cuda:nccl", "cuda:1")],
)
def test_an_error_without_tensors_reaches_the_others(
    given: str, backends: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL carries no tensor of a CPU: what is told has to be on a GPU, also where the call that failed had no tensor."""

    def backends_of(_: object) -> str:
        return backends

    def group_of(_: object) -> tuple[str, int]:
        return "a group", 2

    def tell(count: int, call: str, group: object, device: torch.device) -> None:
        told.append(device)

    told = list[torch.device]()
    monkeypatch.setattr(dist, "get_backend_config", backends_of)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(distributed, "name_and_size", group_of)
    monkeypatch.setattr(distributed, "_group", group_of)
    monkeypatch.setattr(distributed, "_counts", tell)
    error = ValueError("an error")
    for process_group in ("", "a group", "a group"):  # nobody to tell; to be told; and known already
        distributed.send_failure(process_group, error, torch.device(given))
    assert told == [torch.device(wanted)]


def test_an_import_in_inference_mode() -> None:
    """Leaves no tensor that no later step may write to."""
    with torch.inference_mode():
        imported = run_path(str(distributed.__file__))
    assert not imported["COLLECTIVES"].is_inference()


def test_one_process_is_a_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        logits, targets, errors = torch.randn(50, requires_grad=True), torch.arange(50) % 5 == 0, torch.rand(10)
        results = [
            alrp_loss(logits, targets, errors, process_group=group)
            for group in (None, "world", dist.group.WORLD, dist.new_group([0]))
        ]
        gradients = [torch.autograd.grad(out.classification, logits)[0] for out in results]
        scores, name = torch.rand(5, dtype=torch.float64), dist.distributed_c10d._get_default_group().group_name
        for groups in (None, torch.arange(5)):
            order = torch.arange(5)
            arguments = scores, scores, groups, order, distributed.COLLECTIVES, "a call", name, "auto"
            torch.library.opcheck(operators.gather_positives, arguments, test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(operators.sum_over_processes, (scores, distributed.COLLECTIVES, name), test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    finally:
        dist.destroy_process_group()
    for out, gradient in zip(results, gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(out.positives, results[0].positives, strict=True))
        assert torch.equal(gradient, gradients[0])
