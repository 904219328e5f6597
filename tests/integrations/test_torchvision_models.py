"""A torchvision detector with a ranking loss: put in, taken out, copied, scripted, resumed."""

# pyright: reportPrivateUsage=false
import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision.ops", reason="torchvision is an extra", exc_type=ImportError)

from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads

from alrp_triton.integrations.torchvision import (
    plain_copy,
    ranking_loss_of,
    remove_ranking_loss,
    use_ranking_loss,
)
from tests.support.compare import assert_near
from tests.support.torchvision_models import (
    CLASSES,
    MODELS,
    SIZE,
    Backbone,
    anchors,
    batch,
    fcos,
    make,
    retinanet,
    spread,
    steps,
)


@pytest.mark.parametrize("name", MODELS)
def test_put_in_and_taken_out(name: str) -> None:
    """Weights fit with and without the loss; without it again, the model is torchvision's; twice is once."""
    torch.manual_seed(0)
    model, plain = MODELS[name](), MODELS[name]()
    before = set(model.state_dict())
    for loss in ("ap", "alrp"):
        parts = use_ranking_loss(model, loss, period=3)
    assert set(model.state_dict()) == before
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.stack(list(model(*batch()).values())).sum().backward()
    assert all(steps(part) == 1 for part in parts.values())  # the second loss, once
    remove_ranking_loss(model)
    remove_ranking_loss(model)
    results: list[dict[str, Tensor]] = []
    for one in (model, plain):
        torch.manual_seed(3)  # torchvision samples anchors
        results.append(one(*batch()))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_copied_and_pickled(name: str) -> None:
    """A copy has a loss of its own, with the same state."""
    model, parts = make(name)
    plain = model(*batch())
    torch.stack(list(plain.values())).sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        losses = copied(*batch())
        assert all(steps(part) == 1 for part in parts.values())
        for key, value in plain.items():
            assert_near(losses[key], value, 1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.* always returns a .* in scripting")
@pytest.mark.parametrize("name", MODELS)
def test_scripted_and_plain(name: str) -> None:
    """They detect as the model does, which trains as before; a plain FCOS takes the weights."""
    model, _ = make(name, box_coder="model" if name == "fcos" else "published")
    spread(model)
    (model if hasattr(model, "score_thresh") else model.roi_heads).score_thresh = 0.01
    images, losses = batch()[0], model(*batch())
    plain = plain_copy(model.train(False))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    scripted = torch.jit.load(io.BytesIO(file.getvalue()))
    with torch.no_grad():
        found = model(images)
        for other in (scripted(images)[1], plain(images)):
            for ours, theirs in zip(found, other, strict=True):
                assert len(ours["scores"]) > 0
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        if name == "fcos":
            other = fcos().train(False)
            other.score_thresh = 0.01
            other.load_state_dict(plain.state_dict())
            assert torch.equal(other(images)[0]["scores"], found[0]["scores"])
    assert not ranking_loss_of(plain)
    once_more = copy.deepcopy(plain)
    use_ranking_loss(once_more, "rank_sort")  # to train it on
    with torch.no_grad():
        for put in range(2):
            for ours, theirs in zip(found, once_more(images), strict=True):
                assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), put
            remove_ranking_loss(once_more)
    again = model.train()(*batch())
    assert all(torch.equal(value, again[key]) for key, value in losses.items())
    own = dict(model.named_parameters())
    shared = [key for key, value in plain.named_parameters() if value is own[key]]
    assert len(own) - len(shared) == (2 if name == "fcos" else 0)


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_warm_start(name: str) -> None:
    """Two steps of torchvision's losses, two of a blend, then the ranking; a copy goes on from the state."""
    model, parts = make(name, "rank_sort", period=None, warm_start=2)
    ranked, own = make(name, "rank_sort", period=None)[0], MODELS[name]()
    for other in (ranked, own):
        other.load_state_dict(model.state_dict())
    first, second = own(*batch()), ranked(*batch())
    for share in (0, 0, 1 / 3, 2 / 3, 1):
        with torch.no_grad():
            model(*batch())  # not counted
        if share == 2 / 3:
            state = copy.deepcopy(parts.state_dict())
            parts = use_ranking_loss(model, "rank_sort", warm_start=2)
            parts.load_state_dict(state)
        losses = model(*batch())
        assert set(losses) == {"classification", "bbox_regression"}
        for key, loss in losses.items():
            assert_near(loss, (1 - share) * first[key] + share * second[key], 1e-6)
    torch.stack(list(losses.values())).sum().backward()
    assert parts.state_dict()["head.warm_start.steps"] == 5
    other = make(name, "rank_sort", period=None, warm_start=2)[0]
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        for key, loss in copied(*batch()).items():
            assert_near(loss, first[key], 1e-6)
        assert ranking_loss_of(copied).state_dict()["head.warm_start.steps"] == 1
    assert "warm_start.steps" not in make(name)[1].state_dict()


def test_a_part_of_ones_own_has_no_plain_copy() -> None:
    model, _ = make("faster_rcnn")
    remove_ranking_loss(model)

    class Mine(RoIHeads):
        pass

    model.roi_heads.__class__ = Mine
    use_ranking_loss(model, "rank_sort")
    with pytest.raises(TypeError, match="model must detect by torchvision's own RoIHeads for a plain copy, got Mine"):
        plain_copy(model)


def test_self_balancing_is_resumed() -> None:
    """Without the state the weight would begin at 50 again."""
    model, parts = make("retinanet", period=2)
    for _ in range(3):
        model(*batch())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "losses": parts.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, others = make("retinanet", period=2)
    again.load_state_dict(saved["model"])
    others.load_state_dict(saved["losses"])
    for _ in range(4):
        one, other = model(*batch()), again(*batch())
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert parts["head"].box_weight != 50
    with torch.no_grad():  # a validation loss leaves no trace
        before = steps(parts["head"])
        model(*batch())
    assert steps(parts["head"]) == before


def test_frozen_parts_stay_frozen() -> None:
    torch.manual_seed(0)
    model = fcos().requires_grad_(False)
    use_ranking_loss(model, period=5)
    remove_ranking_loss(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_methods_that_were_set_before() -> None:
    """They are called, and come back."""
    model, calls = retinanet(), [0]
    own = model.head.forward

    def counted(x: list[Tensor]) -> dict[str, Tensor]:
        calls[0] += 1
        return own(x)

    model.head.forward = counted
    for loss in ("alrp", "ap"):
        use_ranking_loss(model, loss, period=5)
        model(*batch())
    assert calls == [2]
    remove_ranking_loss(model)
    assert model.head.forward is counted


def test_losses_of_a_copy() -> None:
    model, parts = make("faster_rcnn")
    assert dict(ranking_loss_of(model).items()) == dict(parts.items())
    copied = copy.deepcopy(model)
    copied(*batch())
    assert {name: steps(part) for name, part in ranking_loss_of(copied).items()} == {"rpn": 1, "roi_heads": 1}
    assert all(steps(part) == 0 for part in parts.values())
    assert len(ranking_loss_of(retinanet())) == 0
    parts.eval()
    model(*batch())
    assert all(steps(part) == 0 for part in parts.values())


def test_a_head_of_ones_own() -> None:
    """A subclass keeps what it does; the method that is called in the end is its own."""

    class Loud(RetinaNetHead):
        def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
            return {key: value * 2 for key, value in super().forward(x).items()}

    torch.manual_seed(0)
    model = RetinaNet(
        Backbone(), CLASSES, min_size=SIZE, max_size=SIZE, anchor_generator=anchors(16, 32), head=Loud(32, 3, CLASSES)
    )
    use_ranking_loss(model, period=5)
    features = [torch.rand(1, 32, 16, 16), torch.rand(1, 32, 8, 8)]
    twice = model.head(features)["cls_logits"]
    assert torch.equal(twice, 2 * RetinaNetHead.forward(model.head, features)["cls_logits"])
