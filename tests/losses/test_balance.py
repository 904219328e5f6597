"""Self-balancing: the schedule, its state, and what it must not do."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from alrp_triton import SelfBalance, balance_by_value
from tests.support.compare import assert_near


def step(balance: SelfBalance, classification: float, localisation: float) -> float:
    return float(balance(torch.tensor(classification), torch.tensor(localisation)))


def test_schedule_by_hand() -> None:
    balance = SelfBalance(period=3)
    assert step(balance, 0.9, 0.5) == 25  # 50 at the start
    assert step(balance, 0.8, 0.4) == 20
    weight = (0.9 + 0.8 + 0.7 + 0.5 + 0.4 + 0.3) / (0.5 + 0.4 + 0.3)
    assert_near(step(balance, 0.7, 0.3), weight * 0.3, 1e-6)  # from the step that ends the period on
    assert_near(balance.weight, weight, 1e-6)
    assert_near(step(balance, 0.6, 0.2), weight * 0.2, 1e-6)
    assert_near(step(balance, 0.6, 0.2), weight * 0.2, 1e-6)
    assert_near(step(balance, 0.6, 0.2), 4 * 0.2, 1e-6)  # the second period stands alone
    assert SelfBalance(1, initial_weight=7).weight == 7


def test_steps_without_positives_are_not_counted() -> None:
    """The published heads append to their history where there are positives, and nowhere else."""
    balance = SelfBalance(period=2)
    step(balance, 0.9, 0.01)
    for _ in range(3):
        assert step(balance, 0.0, 0.0) == 0
        assert balance.weight == 50
    assert_near(step(balance, 0.7, 0.01), (0.9 + 0.7 + 0.02) / 0.02 * 0.01, 1e-6)
    assert_near(step(balance, 0.0, 1.0), 81.0, 1e-6)  # a perfect ranking counts, and so do perfect boxes
    assert_near(step(balance, 1.0, 0.0), 0.0, 1e-6)
    assert_near(balance.weight, 2.0, 1e-6)


def test_an_automatic_weight_is_balanced_from_the_first_step_on() -> None:
    """Each step of the first period by the means so far; then as ever. The state resumes anywhere in between."""
    losses = [(0.0, 0.0), (0.2, 0.4), (0.3, 0.1), (0.0, 0.0), (0.1, 0.3), (0.4, 0.4), (0.5, 0.1), (0.9, 0.2)]
    first, second = 1.4 / 0.8, (0.4 + 0.5 + 0.9 + 0.7) / 0.7
    wanted = [1, 0.6 / 0.4, 1.0 / 0.5, 1.0 / 0.5, first, first, first, second]
    for stop in range(len(losses)):
        balance = SelfBalance(period=3, initial_weight="auto")
        for count, ((classification, localisation), weight) in enumerate(zip(losses, wanted, strict=True)):
            if count == stop:
                resumed = SelfBalance(period=3)
                resumed.load_state_dict(balance.state_dict())
                balance = resumed
            assert_near(step(balance, classification, localisation), weight * localisation, 1e-6)
            assert_near(balance.weight, weight, 1e-6)
    assert SelfBalance(3, initial_weight="auto").state_dict().keys() == SelfBalance(3).state_dict().keys()
    with pytest.raises(ValueError, match="initial_weight must be a number or 'auto', got 'first'"):
        SelfBalance(3, initial_weight="first")  # pyright: ignore


def test_a_period_told_later() -> None:
    """By anything that knows the loader; a state goes from one to the other."""
    balance = SelfBalance("later")
    with pytest.raises(RuntimeError, match="period is 'later': set it before the first step"):
        step(balance, 0.9, 0.3)
    assert step(balance.eval(), 0.9, 0.5) == 25  # nothing is recorded
    state = copy.deepcopy(balance.state_dict())
    assert state.keys() == SelfBalance(3).state_dict().keys()
    balance.train().period = 2
    assert repr(balance) == "SelfBalance(period=2)"
    step(balance, 0.9, 0.3)
    assert_near(step(balance, 0.9, 0.3), 4 * 0.3, 1e-6)
    balance.load_state_dict(state)
    assert balance.period == 2
    assert balance.weight == 50
    for wrong, error in ((0, ValueError), (2.5, TypeError), ("soon", TypeError), (None, TypeError)):
        with pytest.raises(error, match="period must be"):
            balance.period = wrong  # pyright: ignore[reportAttributeAccessIssue]
        assert balance.period == 2
        with pytest.raises(error, match="period must be"):
            SelfBalance(wrong)  # pyright: ignore[reportArgumentType]


def test_modules_that_an_older_version_pickled() -> None:
    """Then the period was an attribute."""
    balance = SelfBalance(2)
    state = dict(vars(balance))
    state["period"] = state.pop("_period")
    old = SelfBalance.__new__(SelfBalance)
    old.__setstate__(state)
    assert old.period == 2
    assert step(old, 0.9, 0.5) == 25
    assert pickle.loads(pickle.dumps(old)).period == 2


def test_gradient_reaches_only_the_localisation() -> None:
    balance = SelfBalance(period=1)
    classification, localisation = (torch.tensor(v, requires_grad=True) for v in (0.5, 0.25))
    balance(classification, localisation).backward()
    assert classification.grad is None
    assert localisation.grad == 3


def test_two_steps_before_one_backward() -> None:
    balance = SelfBalance(period=1)
    loss = torch.tensor(0.5, requires_grad=True)
    total: Tensor = balance(torch.tensor(0.5), loss) + balance(torch.tensor(0.25), loss)
    total.backward()
    assert loss.grad == 2 + 1.5


def test_resume_from_state_dict() -> None:
    original = SelfBalance(period=4)
    for i in range(6):
        step(original, 0.9 - i / 10, 0.5)
    buffer = io.BytesIO()
    torch.save(original.state_dict(), buffer)
    buffer.seek(0)
    resumed = SelfBalance(period=4)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for i in range(6):
        assert step(original, 0.3, 0.1 * i) == step(resumed, 0.3, 0.1 * i)


def test_resume_with_a_shorter_period() -> None:
    original = SelfBalance(period=1000)
    for _ in range(500):
        step(original, 0.9, 0.3)
    resumed = SelfBalance(period=400)
    resumed.load_state_dict(original.state_dict())
    step(resumed, 0.9, 0.3)
    assert_near(resumed.weight, 4.0, 1e-5)
    assert resumed.steps == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_state_stays_float32(dtype: torch.dtype) -> None:
    balance = SelfBalance(period=2000, initial_weight=1e5).to(dtype)
    assert balance.weight == 1e5
    for _ in range(2000):
        step(balance, 0.9, 0.3)
    assert {b.dtype for b in balance.buffers()} == {torch.float32, torch.int64}
    assert_near(balance.weight, 4.0, 1e-4)


def test_what_leaves_the_weight_alone() -> None:
    balance = SelfBalance(period=2)
    for _ in range(4):
        step(balance, 0.0, 0.0)  # batches without positives
    for _ in range(2):
        step(balance, 0.98, 1e-39)  # a weight beyond float32
    assert balance.weight == 50
    balance.eval()
    before = copy.deepcopy(balance.state_dict())
    assert step(balance, 0.5, 0.5) == 25
    assert all(torch.equal(before[name], value) for name, value in balance.state_dict().items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_is_seen_and_forgotten(bad: float) -> None:
    balance = SelfBalance(period=2)
    assert not torch.tensor(step(balance, 0.5, bad)).isfinite()
    step(balance, 0.6, 0.2)
    assert_near(balance.weight, 4.0, 1e-6)


def test_needs_no_host_sync() -> None:
    """On the meta device nothing can be read back, so a step that works there reads nothing."""
    balance = SelfBalance(period=2).to("meta")
    loss = torch.zeros((), device="meta")
    assert balance(loss, loss).device.type == "meta"


def test_repr() -> None:
    assert repr(SelfBalance(period=5)) == "SelfBalance(period=5)"


def test_balance_by_value() -> None:
    classification, box = (torch.tensor(v, requires_grad=True) for v in (0.6, 1.5))
    weighted = balance_by_value(classification, box)
    assert weighted.item() == pytest.approx(0.6)
    weighted.backward()
    assert classification.grad is None
    assert box.grad is not None
    assert box.grad.item() == pytest.approx(0.4)


@pytest.mark.parametrize(("classification", "box"), [(0.6, 0.0), (0.0, 0.0), (float("nan"), 0.5), (float("inf"), 0.5)])
def test_balance_by_value_divides_by_nothing(classification: float, box: float) -> None:
    value = torch.tensor(box, requires_grad=True)
    weighted = balance_by_value(torch.tensor(classification), value)
    weighted.backward()
    assert weighted == box
    assert value.grad == 1
    assert balance_by_value(torch.tensor(0.5), torch.tensor(float("nan"))).isnan()
    with pytest.raises(ValueError, match=r"box must be 0-d, got shape \(2,\)"):
        balance_by_value(torch.tensor(0.5), torch.zeros(2))
