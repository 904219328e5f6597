"""A warm start in models of transformers, against two more: without it, and without a ranking loss."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.compare import assert_blend

pytest.importorskip("transformers", reason="transformers is a user's, not the package's", exc_type=ImportError)
pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)

from alrp_triton.integrations.transformers import load_ranking_loss, use_ranking_loss
from tests.support.tiny_detr import LABELS, build

pytestmark = pytest.mark.usefixtures("one_thread")
SHARES = (0, 0, 1 / 3, 2 / 3, 1, 1)  # of the ranking, with warm_start=2
HEADS = ("class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head", "enc_out")


def step(model: nn.Module) -> tuple[Tensor, ...]:
    """The total, each loss, the gradient of the layers that say scores and boxes of all outputs, and of all layers."""
    torch.manual_seed(1)
    model.zero_grad()
    out: Any = model(pixel_values=torch.randn(len(LABELS), 3, 64, 64), labels=LABELS)
    out.loss.backward()
    # Some of all cancel out but for rounding: those of biases in front of a normalisation.
    found = {name: each.grad.flatten() for name, each in model.named_parameters() if each.grad is not None}
    gradient = torch.cat([grad for name, grad in found.items() if any(part in name for part in HEADS)])
    assert gradient.any()
    names = sorted(key for key in out.loss_dict if not key.startswith("loss_giou"))  # some weigh them later
    return out.loss, torch.stack([out.loss_dict[key] for key in names]), gradient, torch.cat(list(found.values()))


@pytest.mark.parametrize("loss", ["alrp", "rank_sort"])
@pytest.mark.parametrize("name", ["RTDetr", "DFine", "Deimv2", "DeformableDetr", "LwDetr"])
def test_warm_start(name: str, loss: Any, tmp_path: Path) -> None:
    """Two steps of the model's own losses, two of a blend, then the ranking; it goes on from the state, and in a copy."""
    own = step(build(name))
    model = build(name)
    use_ranking_loss(model, loss, period=100, backend="torch")
    ranked = step(model)
    model = build(name)
    losses = use_ranking_loss(model, loss, period=100, backend="torch", warm_start=2)
    for number, share in enumerate(SHARES):
        if number == 1:  # these are no steps
            pixels = torch.randn(len(LABELS), 3, 64, 64)
            with torch.no_grad():
                model(pixel_values=pixels, labels=LABELS)
            model.eval()(pixel_values=pixels, labels=LABELS)
            model.train()
        if number == 3:
            model.save_pretrained(tmp_path)
            fresh = build(name)
            use_ranking_loss(fresh, loss, period=100, backend="torch", warm_start=2)
            fresh.load_state_dict(model.state_dict())
            model = copy.deepcopy(model)
            losses = model.ranking_loss
            for other in (fresh, model):
                assert_blend(step(other), own, ranked, share, rounded=1)
            continue
        assert_blend(step(model), own, ranked, share, rounded=1)
    assert losses.state_dict()["last.warm_start.steps"] == len(SHARES)
    load_ranking_loss(model, tmp_path)
    assert_blend(step(model), own, ranked, SHARES[3], rounded=1)


def test_where_denoising_is_in_the_own_loss_there_is_none() -> None:
    """The ranking leaves its queries out, so that there would be other ones in the beginning."""
    model = build("Deimv2", auxiliary_loss=False)
    for value, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="warm_start must be"):
            use_ranking_loss(model, "ap", warm_start=value)  # pyright: ignore[reportArgumentType]
    use_ranking_loss(model, "ap", warm_start=1, backend="torch")
    with pytest.raises(ValueError, match=r"warm_start must be 0 where .* DEIMv2 without auxiliary_loss"):
        step(model)
    own = step(build("Deimv2", auxiliary_loss=False, num_denoising=0))
    model = build("Deimv2", auxiliary_loss=False, num_denoising=0)
    use_ranking_loss(model, "ap", warm_start=1, backend="torch")
    assert_blend(step(model), own, own, 0)
