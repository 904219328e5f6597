"""Two processes, an image each, with a ranking over both. Run by tests/integrations/test_ultralytics.py with torchrun."""

from typing import Any

import torch
import torch.distributed as dist

from examples.process_group import process_group
from tests.support.compare import assert_near
from tests.support.ultralytics_models import BOXES, batch_of, build, outputs_of

# Imported there first, with settings.
# isort: split
from alrp_triton.integrations.ultralytics import use_ranking_loss

BOXES_OF = [[(0, *rest) for image, *rest in BOXES if image == at] for at in (0, 2)]


def of_image(outputs: dict[str, Any], image: int) -> dict[str, Any]:
    taken = {name: outputs[name].detach()[image : image + 1].clone().requires_grad_() for name in ("boxes", "scores")}
    return {**taken, "feats": [level[image : image + 1] for level in outputs["feats"]]}


def main() -> None:
    torch.set_num_threads(1)
    for loss in ("rank_sort", "alrp"):
        model: Any = build()
        joint = outputs_of(model, images=2)
        mine = of_image(joint, dist.get_rank())
        both = batch_of([(at, *rest) for at in (0, 1) for _, *rest in BOXES_OF[at]], images=2)
        use_ranking_loss(model, loss, period=1, backend="torch")  # pyright: ignore[reportArgumentType]
        total, items = model.criterion(joint, both)
        (total[0] + total[1]).backward()
        use_ranking_loss(model, loss, period=1, process_group="world", backend="torch")  # pyright: ignore[reportArgumentType]
        batch = batch_of(BOXES_OF[dist.get_rank()], images=1)
        total, own = model.criterion(mine, batch)
        assert_near(own["cls_loss"], items["cls_loss"], 1e-5)
        # Each process trains with its one image's share, twice as large, for DDP takes the mean; together they are two.
        total[1].backward(retain_graph=True)
        assert_near(mine["scores"].grad, joint["scores"].grad[dist.get_rank()][None], 1e-5)
        if loss == "alrp":
            assert_near(own["box_loss"], items["box_loss"], 1e-5)
            total[0].backward()
            assert_near(mine["boxes"].grad, joint["boxes"].grad[dist.get_rank()][None], 1e-5)
        if dist.get_rank() == 0:  # validated alone, so that nobody waits
            model.eval()
            assert model.criterion(mine, batch)[1]["cls_loss"] != own["cls_loss"]
    print("ranked together")


if __name__ == "__main__":
    with process_group("gloo"):
        main()
