"""What users import, with and without triton, and how the operators behave under torch's tracing."""

# pyright: reportPrivateUsage=false
import ast
import re
import subprocess
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
)

import alrp_triton
from alrp_triton import alrp_loss, ap_loss, autograd, rank_sort_loss
from alrp_triton.dispatch import Backend
from tests.support.cases import FINITE
from tests.support.inside import Inside, replace_kernels
from tests.support.processes import ROOT, run_together


def test_public_names() -> None:
    assert sorted(alrp_triton.__all__) == [
        "ALRPLoss", "ALRPLossOutput", "APLoss", "ComparisonMatrix", "PositiveRanks", "RankSortLoss", "RankSortLossOutput",
        "SelfBalance", "alrp_loss", "ap_loss", "balance_by_value", "giou_localisation_error", "localisation_error", "rank_sort_loss",
    ]  # fmt: skip
    assert all(hasattr(alrp_triton, name) for name in alrp_triton.__all__)
    assert all(getattr(alrp_triton, name).__doc__ for name in alrp_triton.__all__)
    assert (ROOT / "alrp_triton" / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", alrp_triton.__version__)
    assert f"## {alrp_triton.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    (done,) = run_together(["-W", "error", "-c", code])
    return done


def test_import_needs_no_triton() -> None:
    hidden = "import sys; sys.modules['triton'] = None; import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a); "
    code = hidden + (
        "import torch, alrp_triton as a; x = torch.zeros(4, requires_grad=True); "
        "out = a.alrp_loss(x, torch.tensor([1, 0, 0, -1]), torch.ones(1)); out.classification.backward(); print(x.grad.tolist())\n"
        "try: a.alrp_loss(x, torch.tensor([1, 0, 0, -1]), torch.ones(1), backend='triton')\n"
        "except ValueError as e: print(e)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout


def test_import_is_light() -> None:
    heavy = "{'alrp_triton.backends.triton_tiled', 'alrp_triton.integrations', 'alrp_triton.metrics', 'numba', 'torchvision', 'triton', 'torchmetrics'}"
    done = run_python(f"import sys, alrp_triton; print({heavy} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_layers_import_one_way() -> None:
    """backends <- dispatch <- stages <- operators <- autograd <- functional <- modules; nothing reaches up. Backends, too, have an order."""
    order = ["formulas", "checks", "hints", "cost", "backends", "distributed", "dispatch", "stages", "operators", "comparison", "targets", "autograd", "functional", "boxes", "metrics", "balance", "modules", "integrations", "trainer", "compat", "__init__"]  # fmt: skip
    within = [
        "__init__", "columns", "threads", "segments", "knots", "graded", "positives", "torch_targets", "torch_binned", "numba_jit",
        "numba_targets", "numba_streams", "numba_tables", "numba_loops", "numba_binned", "numba_positives", "triton_marks", "triton_layout", "triton_gradients", "triton_tiled", "triton_targets", "triton_sort", "triton_prefix", "triton_sums", "triton_tables", "triton_shared", "triton_binned",
        "triton_among", "triton_graded", "triton_positives",
    ]  # fmt: skip
    inside = {
        "backends": within,
        "metrics": ["lrp", "coco", "calibration", "images", "detection", "__init__"],
        "integrations": [
            "__init__",
            "masks",
            "methods",
            "box_errors",
            "warm_start",
            "head_loss",
            "lightning",
            "atss",
            "torchvision_heads",
            "torchvision_masks",
            "torchvision",
            "detectron2",
            "mmdet_dense",
            "mmdet_fovea",
            "mmdet_roi",
            "mmdet_masks",
            "mmdet",
            "queries",
            "detr",
            "transformers",
            "transformers_trainer",
            "ultralytics_criterion",
            "ultralytics",
        ],
        "trainer": [
            "errors",
            "sampling",
            "coco",
            "images",
            "dataset",
            "data",
            "detectors",
            "evaluation",
            "module",
            "runs",
            "callbacks",
            "stopping",
            "pictures",
            "parsers",
            "reports",
            "fitting",
            "detecting",
            "cli",
            "__init__",
            "__main__",
        ],
    }
    for path in (ROOT / "alrp_triton").rglob("*.py"):
        layers = inside.get(path.parent.name, order)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                if layers is not order and node.level == 2:
                    assert order.index((node.module or node.names[0].name).split(".")[0]) < order.index(
                        path.parent.name
                    ), path.name
                    continue
                targets = [node.module.split(".")[0]] if node.module else [name.name for name in node.names]
                for target in targets:
                    assert layers.index(target) < layers.index(path.stem), f"{path.name} imports {target}"


class Context:
    """What autograd hands to a function; autograd's own engine wants a real GPU."""

    needs_input_grad = (True, True, False, False, False, False, False)
    saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class NoLaunch:
    """In place of a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None  # pyright: ignore[reportUnknownLambdaType]


def can_trace_for_a_gpu() -> bool:
    """Whether this torch slices fake CUDA tensors: older ones want a GPU for that, and CPU builds have none."""
    try:
        with FakeTensorMode():
            return torch.zeros(2, device="cuda")[:1].device.type == "cuda"
    except (AssertionError, RuntimeError):  # torch was not compiled with CUDA; there is no GPU
        return False


def test_a_gpu_is_traced_for_by_all_but_old_versions() -> None:
    recent = torch.__version__ >= "2.11"
    assert can_trace_for_a_gpu() or not recent or not torch.backends.cuda.is_built()


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_trace_for_a_gpu():
        pytest.skip("this torch cannot trace for a GPU that is not there")
    replace_kernels(monkeypatch, lambda kernel, name: NoLaunch())
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)

    def multiprocessors(device: torch.device) -> int:
        return 132

    monkeypatch.setattr("alrp_triton.backends.triton_binned._multiprocessors", multiprocessors)


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize(
    ("kernels", "grouped"), [("triton_tiled", False), ("triton_binned", False), ("triton_binned", True)]
)
@pytest.mark.parametrize("form", ["dense", "classes"])
@pytest.mark.parametrize("loss", ["alrp", "ap", "rank_sort", "rank_sort_graded"])
def test_no_host_sync_on_a_gpu(
    loss: str, form: str, kernels: Backend, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward trace on fake CUDA tensors, where anything that reads a value back raises."""
    if loss == "rank_sort_graded" and form == "classes":
        pytest.skip("class indices hold no IoU")
    context, function = Context(), autograd.RankingLoss
    monkeypatch.setattr(function, "apply", partial(function.forward, context))
    with FakeTensorMode(), Inside() as inside:
        logits = torch.randn(50, 8, device="cuda")
        targets = torch.zeros((50, 8) if form == "dense" else 50, dtype=torch.int64, device="cuda")
        values = torch.rand(7, device="cuda")
        how: dict[str, Any] = {"backend": kernels}
        if grouped:
            how["groups"] = torch.zeros(50, dtype=torch.int64, device="cuda")
        if loss == "alrp":
            assert alrp_loss(logits, targets, values, **how).rank.shape == (7,)
        elif loss == "ap":
            assert ap_loss(logits, targets, num_positives=7, **how).shape == ()
        elif loss == "rank_sort":
            assert rank_sort_loss(logits, targets, values, **how).sorting.shape == ()
        else:
            assert rank_sort_loss(logits, targets.float(), num_positives=7, **how).sorting.shape == ()
        one = torch.ones((), device="cuda")
        grad_logits, grad_values, *_ = function.backward(context, one, None if loss == "ap" else one, None, None)
        assert grad_logits is not None
        assert (grad_logits.shape, grad_logits.device.type, grad_logits.dtype) == ((50, 8), "cuda", torch.float32)
        assert (grad_values is not None) == (loss == "alrp")
    assert inside.operators >= {"find", "count", "terms", "spread"}


@pytest.mark.usefixtures("no_launches")
def test_what_waits_for_the_gpu_is_seen() -> None:
    """Where the number of positives is not told, the host reads it."""
    with FakeTensorMode(), Inside():
        logits, targets = torch.randn(50, 8, device="cuda"), torch.zeros(50, dtype=torch.int64, device="cuda")
        with pytest.raises(DataDependentOutputException):
            ap_loss(logits, targets, backend="triton_tiled")


def test_deepcopy_and_pickle_of_the_module() -> None:
    import copy
    import pickle

    module = alrp_triton.ALRPLoss(delta=0.5)
    case = FINITE["random"]
    arguments: list[Any] = [torch.tensor(a) for a in case[:3]]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*arguments).classification, module(*arguments).classification)


def test_modules_of_version_0_3_still_work() -> None:
    """Whole modules that were pickled before there were process groups."""
    module = alrp_triton.ALRPLoss()
    for name in ("process_group", "gradient_reduction"):
        module.__dict__.pop(name, None)
    case = FINITE["random"]
    assert module(*(torch.tensor(a) for a in case[:3])).classification > 0
    assert "process_group=None" in repr(module)
