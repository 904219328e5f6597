"""torch.compile of the losses: one graph, forward and backward, of any size, with the results of eager mode."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from alrp_triton import (
    ALRPLoss,
    ALRPLossOutput,
    APLoss,
    RankSortLoss,
    SelfBalance,
    alrp_loss,
    ap_loss,
    balance_by_value,
    rank_sort_loss,
)
from alrp_triton.dispatch import Backend
from tests.losses.test_training import total as alrp

pytestmark = [
    # torch 2.13 compiles by deprecated parts of its own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # What torch compiled for a CPU before 2.6 flushes the smallest numbers to 0, of which NumPy 1 tells.
    pytest.mark.filterwarnings("ignore:The value of the smallest subnormal:UserWarning"),
    # torch 2.11, where a graph breaks at an operator, looks into it.
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    # torch 2.13, where a graph breaks at an operator, looks at all attributes of what goes on.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(anchors: int, positives: int, device: str, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(anchors)
    logits = torch.randn(anchors, classes, generator=generator)
    targets = torch.full((anchors,), classes)
    targets[:positives] = torch.randint(0, classes, (positives,), generator=generator)
    targets[-anchors // 5 :] = -1
    return (
        logits.to(device).requires_grad_(),
        targets.to(device),
        torch.rand(positives, generator=generator).to(device).requires_grad_(),
    )


def as_dense(targets: Tensor, classes: int = 4) -> Tensor:
    marks = nn.functional.one_hot(targets.clamp(min=0), classes + 1)[:, :classes]
    return torch.where(targets[:, None] < 0, -1, marks)


class Total(nn.Module):
    """Each loss as a module, with what balances it."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion, self.balance = criterion, SelfBalance(3)

    def forward(self, logits: Tensor, targets: Tensor, values: Tensor) -> Tensor:
        if isinstance(self.criterion, APLoss):
            return self.criterion(logits, targets, num_positives=len(values)) + values.sum()
        out = self.criterion(logits, targets, values)
        if isinstance(self.criterion, ALRPLoss):
            return out.classification + self.balance(out.classification, out.localisation)
        return out.ranking + out.sorting + balance_by_value(out.ranking + out.sorting, values.mean())


def ap(logits: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    return ap_loss(logits, targets) + values.sum()  # the number of positives is found out


def rank_sort_by_grade(logits: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    marks = as_dense(targets)
    grades = marks.float().masked_scatter(marks == 1, values.detach() * 0.9 + 0.1)
    out = rank_sort_loss(logits, grades)
    return out.ranking + out.sorting + values.sum()


def in_groups(logits: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    return alrp(logits, targets, values, groups=torch.arange(len(logits), device=logits.device) // 16)


LOSSES: dict[str, Callable[[], Loss]] = {
    "alrp": lambda: alrp,
    "alrp, dense": lambda: lambda x, t, v: alrp(x, as_dense(t), v),
    "alrp, hard": lambda: partial(alrp, delta=0),
    "alrp in groups": lambda: in_groups,
    "ap": lambda: ap,
    "rank_sort by grade": lambda: rank_sort_by_grade,
    "ALRPLoss": lambda: Total(ALRPLoss(delta=0.5)),
    "APLoss": lambda: Total(APLoss()),
    "RankSortLoss": lambda: Total(RankSortLoss()),
}


P_IS_FOUND_OUT = {"ap", "rank_sort by grade"}


def in_one_graph(name: str) -> bool:
    """Whether this torch can, as docs/support.md says."""
    return torch.__version__ >= "2.10" or name not in P_IS_FOUND_OUT


def step(loss: Loss, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    value = loss(*arguments)
    return value, *torch.autograd.grad(value, [arguments[0], arguments[2]])


@pytest.mark.parametrize(
    ("name", "dynamic", "compiler"),
    [
        *((name, True, "aot_eager") for name in LOSSES),
        ("ALRPLoss", None, "inductor"),
    ],
)
def test_one_graph_for_all_sizes(name: str, dynamic: bool | None, compiler: str, device: str) -> None:
    """The operators are the same to every compiler: one loss is compiled to machine code, all are traced."""
    torch.compiler.reset()
    if not in_one_graph(name):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"function disable|compiler\.disable"):  # pyright: ignore
            torch.compile(LOSSES[name](), fullgraph=True, dynamic=dynamic)(*draw(40, 7, device))
        return
    graphs = torch._dynamo.utils.counters["stats"]  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    before = graphs["unique_graphs"]
    eager = LOSSES[name]()
    compiled = torch.compile(LOSSES[name](), fullgraph=True, dynamic=dynamic, backend=compiler)
    for anchors, positives in ((40, 7), (40, 7), (100, 20), (333, 51), (64, 9)):
        arguments = draw(anchors, positives, device)
        for a, b in zip(step(compiled, arguments), step(eager, arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert graphs["unique_graphs"] - before == (1 if dynamic else 2)  # one size, then any


@pytest.mark.parametrize("name", sorted(P_IS_FOUND_OUT))
def test_graphs_may_break(name: str, device: str) -> None:
    """Not asked to be one graph: equal to eager mode with every torch."""
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name](), backend="aot_eager")
    for anchors, positives in ((40, 7), (100, 20)):
        arguments = draw(anchors, positives, device)
        for a, b in zip(step(compiled, arguments), step(LOSSES[name](), arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["alrp", "ap"])
def test_no_positives(name: str, device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name](), fullgraph=in_one_graph(name), dynamic=True, backend="aot_eager")
    for positives in (5, 0):
        arguments = draw(30, positives, device)
        for a, b in zip(step(compiled, arguments), step(LOSSES[name](), arguments), strict=True):
            assert torch.equal(a, b)


def test_every_backend(backend: Backend, device: str) -> None:
    torch.compiler.reset()
    loss = partial(alrp, backend=backend)
    arguments = draw(40, 7, device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(compiled, arguments), step(loss, arguments), strict=True):
        assert torch.equal(a, b)


def test_errors_are_those_of_eager_mode() -> None:
    """Of values when it runs, of shapes and types when it is traced."""
    torch.compiler.reset()
    compiled = torch.compile(alrp, fullgraph=True, dynamic=True, backend="aot_eager")
    logits, targets, values = draw(40, 7, "cpu")
    compiled(logits, targets, values)
    with pytest.raises(ValueError, match="got 3 box_errors, but targets mark 7 positives"):
        compiled(logits, targets, values[:3])
    broken = targets.clone()
    broken[8] = 77
    with pytest.raises(ValueError, match=r"class-index targets must be .* got \[77\] among 1"):
        compiled(logits, broken, values)
    # Dynamo before 2.10 does not get as far: an exception class of ours is too much for it.
    words = "targets must have the shape of logits" if torch.__version__ >= "2.10" else None
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):  # pyright: ignore
        compiled(logits, targets[:9], values)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_no_second_derivative(backend: str) -> None:
    """An error; before torch 2.13 the gradient has no history, as docs/support.md says. Eager mode: losses/test_alrp.py."""
    torch.compiler.reset()
    logits, targets, values = draw(40, 7, "cpu")
    loss = torch.compile(alrp, fullgraph=True, backend=backend)(logits, targets, values)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    if torch.__version__ < "2.13":
        assert not gradient.requires_grad
        return
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_what_is_returned_is_what_eager_returns(device: str) -> None:
    """Its properties inside of the graph, and the whole of it, ranks included, out of the graph."""

    def function(logits: Tensor, targets: Tensor, values: Tensor) -> tuple[Tensor, Tensor, ALRPLossOutput]:
        out = alrp_loss(logits, targets, values)
        return out.total, 2 * out.rank + out.order, out

    arguments = draw(60, 8, device)
    expected = function(*arguments)
    in_one_graph = torch.__version__ >= "2.11"  # to torch 2.4 properties are no tensors; between nobody looked
    found = torch.compile(function, fullgraph=in_one_graph, backend="aot_eager", dynamic=True)(*arguments)
    assert type(found[2]) is ALRPLossOutput
    for one, other in ((found[:2], expected[:2]), (found[2][:2], expected[2][:2]), (found[2].positives, expected[2].positives)):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    wanted = torch.autograd.grad(expected[0], arguments[::2])
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(found[0], arguments[::2]), wanted, strict=True))
