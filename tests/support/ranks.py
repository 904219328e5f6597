"""What the processes of a gloo group do in tests.

``python -m tests.support.ranks WORLD STORE TIMEOUT JOB...``; jobs are functions of this module. A process with torch needs seconds
to begin: so one imports all of it, and the others are forked from it, before there is a thread.
"""

# pyright: reportPrivateUsage=false
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alrp_triton import ALRPLoss, SelfBalance, alrp_loss, ap_loss, distributed, rank_sort_loss
from examples.process_group import process_group
from tests.support.compare import assert_near

CLASSES = 3
Shard = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(seed: int, anchors: list[int], kinds: list[str]) -> list[Shard]:
    """For each process: logits, class indices, values of its positives, and groups."""
    generator = torch.Generator().manual_seed(seed)
    shards: list[Shard] = []
    for count, kind in zip(anchors, kinds, strict=True):
        targets = torch.randint(-1, 4 * CLASSES, (count,), generator=generator).clamp(max=CLASSES)
        if kind == "no positives":
            targets = torch.where(targets < CLASSES, targets.clamp(max=-1), targets)
        if kind == "no negatives":  # one class would be positive and the others negative
            targets = torch.full_like(targets, -1)
        positives = int(((targets >= 0) & (targets < CLASSES)).sum())
        logits = torch.randn(count, CLASSES, generator=generator) * 2
        groups = torch.randint(0, 3, (count,), generator=generator)
        shards.append((logits, targets, torch.rand(positives, generator=generator), groups))
    return shards


def dense_draw(seed: int, anchors: list[int], kinds: list[str]) -> list[Shard]:
    """The same with a mark for each logit, so that a process may have positives and no negatives."""
    shards: list[Shard] = []
    generator = torch.Generator().manual_seed(seed)
    for (logits, _, _, groups), kind in zip(draw(seed, anchors, kinds), kinds, strict=True):
        marks = torch.randint(0, 8, logits.shape, generator=generator)
        marks = torch.where(marks == 0, 1, torch.where(marks == 1, -1, 0))
        if kind == "no negatives":
            marks[marks == 0] = -1
        if kind == "no positives":
            marks[marks == 1] = 0
        if kind == "ignored":
            marks[:] = -1
        values = torch.rand(int((marks == 1).sum()), generator=generator)
        shards.append((logits, marks, values, groups))
    return shards


def losses_and_gradients(loss: str, shard: Shard, grouped: bool, **settings: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """Losses, gradients, and what else there is."""
    logits, targets, values, groups = shard
    logits, values = logits.clone().requires_grad_(), values.clone().requires_grad_()
    if grouped:
        settings["groups"] = groups
    if loss == "alrp":
        out = alrp_loss(logits, targets, values, **settings)
        losses, others = [out.classification, out.localisation], [out.rank, out.order]
    elif loss == "rank_sort":
        losses, others = list(rank_sort_loss(logits, targets, values, **settings)), []
    else:
        losses, others = [ap_loss(logits, targets, interpolate=loss == "ap", **settings)], []
    gradients = torch.autograd.grad(
        2 * losses[0] + 3 * losses[-1], [logits, values], allow_unused=True, materialize_grads=True
    )
    return losses, list(gradients), others


def joint(rank: int, world: int) -> None:
    """Every loss on shards of uneven sizes equals that of one process on all of them."""
    kinds = ["", "no positives", "no negatives", "ignored"]
    for seed in range(4):
        sizes = [[7, 40, 23, 0], [0, 31, 5, 64], [1, 1, 1, 1], [90, 2, 300, 17]][seed][:world]
        turned = [kinds[(k + seed) % 4] for k in range(world)]
        for make in (draw, dense_draw):
            shards = make(seed, sizes, turned)
            whole: Any = tuple(torch.cat(parts) for parts in zip(*shards, strict=True))
            begin, first = sum(sizes[:rank]), sum(len(shard[2]) for shard in shards[:rank])
            end, last = begin + sizes[rank], first + len(shards[rank][2])
            for loss in ("alrp", "ap", "ap without interpolation", "rank_sort"):
                for delta, grouped in ((1.0, False), (0.0, True)):
                    expected = losses_and_gradients(loss, whole, grouped, delta=delta)
                    for reduction, scale in (("mean", world), ("sum", 1)):
                        found = losses_and_gradients(loss, shards[rank], grouped, delta=delta, process_group="world", gradient_reduction=reduction)  # fmt: skip
                        for mine, theirs in zip(found[0], expected[0], strict=True):
                            assert_near(mine, theirs, 1e-6)
                        assert_near(found[1][0], scale * expected[1][0][begin:end], 1e-6)
                        if loss == "alrp":
                            assert_near(found[1][1], scale * expected[1][1][first:last], 1e-6)
                            assert_near(found[2][0], expected[2][0][first:last], 1e-6)
                            alone = losses_and_gradients(loss, shards[rank], grouped, delta=delta)
                            assert torch.equal(found[2][1], alone[2][1])


class Model(nn.Module):
    """Two branches on a shared layer, as a detector has them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.classes, self.boxes = nn.Linear(6, 16), nn.Linear(16, CLASSES), nn.Linear(16, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.shared(features).tanh()
        return self.classes(hidden), self.boxes(hidden).squeeze(-1).sigmoid()


def train(rank: int, world: int) -> None:
    """20 steps with DistributedDataParallel, and 20 steps of one process on the joint batch: the same weights."""
    torch.manual_seed(0)
    alone, shared = Model(), Model()
    start = {name: value.clone() for name, value in alone.state_dict().items()}
    shared.load_state_dict(start)
    parallel = DistributedDataParallel(shared)
    runs = [
        (alone, ALRPLoss(), slice(None)),
        (parallel, ALRPLoss(process_group="world"), slice(rank, None, world)),
    ]
    for model, criterion, mine in runs:
        optimizer, balance = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), SelfBalance(5)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            features = torch.randn(60, 6, generator=generator)[mine]
            targets = torch.randint(0, 4 * CLASSES, (60,), generator=generator).clamp(max=CLASSES)[mine]
            if step % 4 == 3 and rank == 0:  # a step in which one process has no positives
                other = torch.arange(60)[mine] % world != 0
                targets = torch.where(other, targets, CLASSES)
            if step % 4 == 3 and mine == slice(None):
                targets = torch.where(torch.arange(60) % world == 0, CLASSES, targets)
            logits, errors = model(features)
            out = criterion(logits, targets, errors[targets < CLASSES])
            optimizer.zero_grad()
            (out.classification + balance(out.classification, out.localisation)).backward()
            optimizer.step()
    for name, value in alone.state_dict().items():
        assert (value - start[name]).abs().max() > 0.05, f"{name} was not trained"
        assert (shared.state_dict()[name] - value).abs().max() < 1e-5, name


def heads(rank: int, world: int) -> None:
    """A detector's head: the mean of the box loss goes over the positives of all, and so does its balance."""
    from alrp_triton.integrations.head_loss import Boxes, HeadLoss, Loss

    shards = draw(0, [30, 50, 20, 10][:world], ["", "no positives", "", ""][:world])
    generator = torch.Generator().manual_seed(0)
    corners = [torch.rand(len(shard[2]), 2, 2, 2, generator=generator) for shard in shards]
    boxes = [torch.cat([corner[:, 0], corner[:, 0] + corner[:, 1] + 0.1], -1) for corner in corners]  # (P, 2, 4)
    for loss in get_args(Loss):
        for reduction in get_args(distributed.GradientReduction):
            scale = world if reduction == "mean" else 1
            alone = HeadLoss(loss, period=2)
            together = HeadLoss(loss, period=2, process_group="world", gradient_reduction=reduction)
            for _ in range(3):
                found: list[list[Tensor]] = []
                for head, shares in ((alone, range(world)), (together, [rank])):
                    logits, targets = (torch.cat([shards[share][part] for share in shares]) for part in (0, 1))
                    pairs = torch.cat([boxes[share] for share in shares])
                    inputs = logits.requires_grad_(), pairs[:, 0].clone().requires_grad_()
                    of = Boxes(inputs[1], pairs[:, 1], inputs[1] * 2, pairs[:, 1] * 2)
                    out = head(inputs[0], targets, of)
                    found.append(
                        [*out, head.box_weight, *torch.autograd.grad(2 * out.classification + 3 * out.box, inputs)]
                    )
                first = sum(len(shard[0]) for shard in shards[:rank]), sum(map(len, boxes[:rank]))
                for which, (mine, joint) in enumerate(zip(found[1], found[0], strict=True)):
                    if which > 2:
                        begin = first[which - 3]
                        joint = scale * joint[begin : begin + len(mine)]
                    assert_near(mine, joint, 2e-6)


def masks(rank: int, world: int) -> None:
    """The mean of the mask loss goes over the positives of all, of whom a process may have none."""
    from alrp_triton.integrations.head_loss import HeadLoss

    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(2, count, 3, 4, generator=generator) for count in (5, 0, 2, 1)[:world]]  # logits, and targets
    classification = torch.tensor(0.7)
    for reduction in get_args(distributed.GradientReduction):
        scale = world if reduction == "mean" else 1
        together = HeadLoss("rank_sort", process_group="world", gradient_reduction=reduction)
        found: list[list[Tensor]] = []
        for head, shares in ((HeadLoss("rank_sort"), shards), (together, [shards[rank]])):
            logits, targets = torch.cat(shares, 1)
            out = head.mask_loss(logits.requires_grad_(), targets.sigmoid(), targets[:, 0, 0].sigmoid(), classification)
            found.append([out, *torch.autograd.grad(3 * out, logits)])
        (joint, gradient), (mine, own) = found
        assert_near(mine, joint, 2e-6)
        assert_near(own, scale * gradient.split([shard.shape[1] for shard in shards])[rank], 2e-6)


def traffic(rank: int, world: int) -> None:
    """The bytes that are handed over do not depend on N; nothing but these two collectives is called."""
    sent: list[int] = []

    def counted(collective: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append(args[which].nbytes)
            return collective(*args, **kwargs)

        return call

    before = dist.all_gather, dist.all_reduce
    dist.all_gather, dist.all_reduce = counted(dist.all_gather, 1), counted(dist.all_reduce, 0)
    for n in (2_000, 500_000):
        for positives in (50, 400):
            sent.clear()
            logits = torch.randn(n, requires_grad=True)
            targets = (torch.arange(n) < positives).long()
            out = alrp_loss(logits, targets, torch.rand(positives), process_group="world")
            out.classification.backward()
            assert sent == [256, 16 * positives, 8 * world * positives], sent
    dist.all_gather, dist.all_reduce = before


def compiled(rank: int, world: int) -> None:
    """The exchange is part of a graph without breaks, sizes unknown; before torch 2.10 it breaks the graph."""
    in_one_graph = torch.__version__ >= "2.10"
    eager = partial(alrp_loss, process_group="world")
    compiled = torch.compile(eager, fullgraph=in_one_graph, dynamic=True, backend="aot_eager")
    for seed in range(2):
        logits, targets, values, _ = draw(seed, [40, 25, 30], ["", "no positives" if seed else "", ""])[rank]
        x, e = logits.requires_grad_(), values.requires_grad_()
        results: list[list[Tensor]] = []
        for function in (eager, compiled):
            out = function(x, targets, e)
            results.append([*out[:2], *out.positives, *torch.autograd.grad(out[0] + out[1], [x, e])])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def three(x: Tensor, t: Tensor, y: Tensor, u: Tensor, used: bool) -> tuple[Tensor, ...]:
        """In one graph, of sizes that suggest another order to each process, and of which one may not be used."""
        first = ap_loss((x * 2).sin() * 3, t, num_positives=4, process_group="world")
        second = ap_loss(y, u, num_positives=4, process_group="world")
        third = ap_loss(y.tanh(), u, num_positives=4, process_group="world")
        return (first, second, third) if used else (second, third)

    sizes = (9000, 36) if rank == 0 else (36, 9000)
    x, y = (torch.randn(n, generator=torch.Generator().manual_seed(n + rank)).requires_grad_() for n in sizes)
    t, u = ((torch.arange(size) < 4).long() for size in sizes)
    expected = three(x, t, y, u, True)
    for used, backend in ((True, "inductor"), (rank == 0, "aot_eager")):
        found = torch.compile(three, fullgraph=in_one_graph, dynamic=False, backend=backend)(x, t, y, u, used)
        assert all(torch.equal(a, b) for a, b in zip(found[-2:], expected[-2:], strict=True))


def expect(error: type[Exception], call: Callable[[], object], *words: str) -> None:
    with pytest.raises(error) as seen:
        call()
    for word in words:
        assert word in str(seen.value)


def calls_another_loss(rank: int, world: int) -> None:
    """Another delta, another form, groups or none, another loss: ValueError for all, and then all is well again."""
    logits, targets, values, groups = draw(0, [20] * world, [""] * world)[rank]
    settings: dict[str, Any] = {"process_group": "world"}
    odd = rank == world - 1

    def another() -> object:
        return ap_loss(logits, targets, **settings) if odd else alrp_loss(logits, targets, values, **settings)

    for call in (
        lambda: alrp_loss(logits, targets, values, delta=2.0 if odd else 1.0, **settings),
        lambda: ap_loss(logits, targets, interpolate=odd, **settings),
        lambda: alrp_loss(logits, targets, values, groups=groups if odd else None, **settings),
        lambda: alrp_loss(logits, targets, values, gradient_reduction="sum" if odd else "mean", **settings),
        another,
    ):
        expect(ValueError, call, "process_group must call the same loss", "its rank 0 called", f"its rank {world - 1} ")
    alrp_loss(logits, targets, values, **settings)


def gives_up(rank: int, world: int) -> None:
    """Bad input of one process: its own error there, an error that names it on the others; and all is well again."""
    logits, targets, values, _ = draw(0, [20] * world, [""] * world)[rank]
    settings: dict[str, Any] = {"process_group": "world"}
    odd = rank == world - 1
    for call, words in (
        (lambda: alrp_loss(logits, targets, values[:-1] if odd else values, **settings), "positives"),
        (lambda: alrp_loss(logits, targets + 77 if odd else targets, values, **settings), "class-index targets must"),
        (lambda: ap_loss(logits, targets, delta=-1.0 if odd else 1.0, **settings), "delta must be at least 0"),
        (lambda: rank_sort_loss(logits, targets, values + 2 if odd else values, **settings), "ious must be in [0, 1]"),
    ):
        expect(
            ValueError, call, words if odd else f"rank {world - 1} of process_group gave up with an error: ValueError: "
        )
    wanted = alrp_loss(logits, targets, values, **settings)
    in_one_graph = torch.__version__ >= "2.10"
    compiled = torch.compile(partial(alrp_loss, **settings), fullgraph=in_one_graph, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(logits, targets, values).rank, wanted.rank)
        expect(
            ValueError,
            lambda: compiled(logits, targets + 77 if odd else targets, values),
            "class-index targets must" if odd else f"rank {world - 1} of process_group gave up with an error: ",
        )


def skips_a_call(rank: int, world: int) -> None:
    """What is the second call of one process is not taken for the first of another."""
    logits, targets, _, _ = draw(0, [20] * world, [""] * world)[rank]
    if rank == 0:  # as a call that was lost between two compiled graphs
        distributed._calls[dist.group.WORLD] = distributed._calls.get(dist.group.WORLD, 0) + 1
    expect(ValueError, lambda: ap_loss(logits, targets, process_group="world"), "as its call")


BREAK_THE_GROUP = ("dies", "calls_nothing", "calls_another_collective")


def get_ready() -> None:
    """All that takes long the first time, so that no process waits for another while that one compiles."""
    alrp_loss(*draw(0, [20], [""])[0][:3])


def dies(rank: int, world: int) -> None:
    """One process is killed between two steps; for the others the next step is an error."""
    shard = draw(0, [20] * world, [""] * world)[rank]
    alrp_loss(*shard[:3], process_group="world")
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    expect(RuntimeError, lambda: alrp_loss(*shard[:3], process_group="world"))


def calls_nothing(rank: int, world: int) -> None:
    if rank == 0:
        time.sleep(8)  # alive, and longer than the timeout
        return
    shard = draw(0, [20] * world, [""] * world)[rank]
    expect(RuntimeError, lambda: alrp_loss(*shard[:3], process_group="world"))


def calls_another_collective(rank: int, world: int) -> None:
    shard = draw(0, [20] * world, [""] * world)[rank]
    call = partial(alrp_loss, *shard[:3], process_group="world")
    expect(RuntimeError, call if rank else lambda: dist.all_reduce(torch.zeros(1000)))


def metric(rank: int, world: int) -> None:
    """Each process has some of the images; the second time the last has none."""
    from alrp_triton.metrics import coco_olrp
    from tests.support.detections import assert_metric, images_of, make_metric, random_images

    preds, target = random_images(9)
    metric = make_metric(class_metrics=True)
    for mine in ([images_of(rank)], [slice(0, 12)] if rank == 0 else []):
        metric.reset()
        for part in mine:
            metric.update(preds[part], target[part])
        metric._update_count = 1
        assert_metric(metric.compute(), preds, target)
        assert coco_olrp(metric.evaluation()).lrp == metric.compute()["olrp"]
        assert len(metric.detection_boxes) == sum(len(preds[part]) for part in mine)


def box_head(rank: int, world: int) -> None:
    """MMDetection's second stage."""
    from tests.integrations.test_mmdet_stages import in_a_group

    in_a_group(rank)


IMPORTS = {
    "train": "torch._dynamo",
    "heads": "alrp_triton.integrations.head_loss",
    "metric": "tests.support.detections",
    "box_head": "tests.integrations.test_mmdet_stages",
}
"""What a job would import in each process."""


def fork(world: int, store: str) -> int | None:
    """The rank, in a new process that writes to files of its own; None in this one, when all have ended."""
    children = list[int]()
    for rank in range(world):
        child = os.fork()
        if child == 0:
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{store}.{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), stream)
            return rank
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(statuses))
    return None


def run(rank: int, world: int, store: str, timeout: str, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    get_ready()
    Path(f"{store}.{rank}").touch()
    while not all(Path(f"{store}.{other}").exists() for other in range(world)):
        time.sleep(0.1)  # the timeout may be shorter than what one needs to get ready after the other
    settings = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
    with process_group("gloo", timeout=timedelta(seconds=float(timeout)), **settings):
        for job in jobs:
            globals()[job](rank, world)
            print("done:", job, flush=True)
        if jobs[0] in BREAK_THE_GROUP:
            os._exit(0)  # what is left of it is not to be waited for


if __name__ == "__main__":
    world, store, timeout, *jobs = sys.argv[1:]
    for job in jobs:
        if job in IMPORTS:
            import_module(IMPORTS[job])
    rank = fork(int(world), store)
    if rank is not None:
        run(rank, int(world), store, timeout, jobs)
