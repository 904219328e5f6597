"""Ranking losses as functions: check the input, tell the form of the targets, run the stages."""

import math
from typing import NamedTuple

from torch import Tensor

from .autograd import Positives, Settings, ranking_loss
from .checks import (
    check_bool,
    check_delta,
    check_integer,
    check_number,
    check_same_device,
    check_tensor,
    no_reduction,
)
from .dispatch import Backend, check_backend_name
from .distributed import GradientReduction, ProcessGroup, check_gradient_reduction, name_and_size, propagates_errors
from .hints import hint
from .targets import IGNORE_INDEX, check_form, check_groups

DELTA = 1.0
EPS = 1e-5
DELTA_RS = 0.5
EPS_RS = 1e-10


class PositiveRanks(NamedTuple):
    """Where the positives stand. A tuple of its own, so that who adds up the parts of a loss gets an error."""

    rank: Tensor
    """``(P,)``; rank of each positive among all logits that count (of its group), at least 1. Not differentiable."""
    order: Tensor
    """``(P,)`` int64; ascending, stable argsort of the positives' logits (by group, and then logit)."""


class ALRPLossOutput(NamedTuple):
    """What :func:`alrp_loss` returns: two losses, and where the positives stand."""

    classification: Tensor
    """0-d; 1 - mean precision over the positives, in [0, 1]. Differentiable in ``logits``."""
    localisation: Tensor
    """0-d; mean ranked localisation error. Differentiable in ``box_errors``."""
    positives: PositiveRanks
    """Not a loss: ``out.rank`` and ``out.order``."""

    @property
    def total(self) -> Tensor:
        """0-d; ``classification + localisation``, without self-balancing."""
        return self.classification + self.localisation

    @property
    def rank(self) -> Tensor:
        """``(P,)``; see :class:`PositiveRanks`."""
        return self.positives.rank

    @property
    def order(self) -> Tensor:
        """``(P,)`` int64; see :class:`PositiveRanks`."""
        return self.positives.order


class RankSortLossOutput(NamedTuple):
    """What :func:`rank_sort_loss` returns: two losses."""

    ranking: Tensor
    """0-d; mean ranking error, 1 - precision, in [0, 1]. Differentiable in ``logits``."""
    sorting: Tensor
    """0-d; mean sorting error, in [0, 1]. Differentiable in ``logits``."""

    @property
    def total(self) -> Tensor:
        """0-d; ``ranking + sorting``, the loss of the classification branch."""
        return self.ranking + self.sorting


def _settings(
    name: str,
    loss: str,
    logits: Tensor,
    groups: Tensor | None,
    delta: float,
    eps: float,
    backend: Backend,
    process_group: ProcessGroup | None,
    gradient_reduction: GradientReduction,
) -> Settings:
    check_backend_name(backend)
    delta, eps = check_delta(delta), check_number("eps", eps, 0.0, math.inf)
    check_groups(logits, groups)
    check_gradient_reduction(gradient_reduction)
    group, size = name_and_size(process_group)
    call = ""
    if group:
        call = f"{name}(delta={delta}, eps={eps}, {gradient_reduction!r}) with{'out' * (groups is None)} groups"
    return Settings(loss, call, delta, eps, backend, group, float(size) if gradient_reduction == "mean" else 1.0)


def _check_logits_and(name: str, logits: Tensor, values: Tensor) -> None:
    """Logits, and values of the positives."""
    check_tensor("logits", logits, "floating")
    check_tensor(name, values, "floating")
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape (P,), one value for each positive, got {tuple(values.shape)}")
    check_same_device(logits=logits, **{name: values})


@propagates_errors
@no_reduction
def alrp_loss(
    logits: Tensor,
    targets: Tensor,
    box_errors: Tensor,
    *,
    delta: float = DELTA,
    eps: float = EPS,
    background: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    groups: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    gradient_reduction: GradientReduction = "mean",
    backend: Backend = "auto",
) -> ALRPLossOutput:
    r"""Average Localisation-Recall-Precision Loss over all anchors and classes of a batch.

    With the step h of half-width delta, H_ij = h(s_j - s_i), for each positive i, over negatives j and positives k::

        FP_i   = sum_j H_ij
        rank_i = 1 + sum_{k != i} H_ik + FP_i
        classification = mean_i FP_i / rank_i
        localisation   = mean_i (1 / rank_i) localisation_i
        localisation_i = E_i + sum_{k: s_k > s_i} E_k + h(0) sum_{k != i: s_k = s_i} E_k

    The gradient with respect to the logits is **the error-driven update** of the paper (Theorem 1), scaled by the
    incoming gradient; it is not the derivative of the value above, whose step has none worth using. It contains the
    localisation errors too: a positive is pushed up by (FP_i + sum_{k != i} H_ik E_k) / rank_i, and the negatives that
    outrank it are pushed down by as much in total (Theorem 2). It flows through ``classification``; the gradient with
    respect to ``box_errors`` flows through ``localisation``, the ranks being held constant.

    Dense equivalent, for some thousand logits::

        def dense_alrp_loss(logits, targets, box_errors, delta=1.0, eps=1e-5):
            positives, negatives = logits[targets == 1], logits[targets == 0]
            s, e, p = positives.detach(), box_errors.detach(), len(positives)

            def step(x):
                return ((x - s[:, None]) / (2 * delta) + 0.5).clamp(0, 1)

            false, above = step(negatives.detach()), step(s).fill_diagonal_(0)
            fp = false.sum(1)
            rank = 1 + above.sum(1) + fp
            error = torch.where(fp > eps, (fp + above @ e) / rank, 0)
            down = (error / fp.clamp(min=eps)) @ false  # of each negative
            update = (down @ negatives - error @ positives) / p
            classification = (fp / rank).mean() + update - update.detach()
            higher = (s > s[:, None]).to(s) + (s == s[:, None]).fill_diagonal_(0) / 2
            localisation = ((box_errors + higher @ box_errors) / rank).mean()
            return classification, localisation

    Args:
        logits: pre-sigmoid scores, N elements in any shape, contiguous or not; float16, bfloat16, float32 or float64
            (there, up to 1e300 in magnitude: beyond, sums overflow and the result is NaN).
        targets: on the device of the logits, in one of two forms.
            Dense: the shape of ``logits``, any integer, bool or floating dtype; 1 positive, 0 negative, -1 ignored.
            Class indices: ``logits.shape[:-1]`` for C = ``logits.shape[-1]`` classes, any integer dtype; the class of
            an anchor, in [0, C), makes that logit positive and the anchor's other logits negative; ``background`` makes
            all of them negative; ``ignore_index`` leaves all of them out. Dense targets of one byte (int8, uint8, bool)
            are read once more for the gradient: they have to stay as they are until then.
        box_errors: localisation errors E of the positives, ``(P,)``, in the order of their flat index in ``logits``,
            floating; (1 - IoU) / (1 - tau), see :func:`alrp_triton.localisation_error`. May require no gradient.
        delta: half-width of the step, the loss' one hyperparameter; 0 (a hard step) or in [2**-126, 2**125].
        eps: a positive with FP_i <= eps is at its place already and causes no gradient.
        background: the class index that stands for background; default C. Of one in [0, C), that column of the logits
            is never positive. Where labels count from 1, with 0 for background, and the head has no column for it,
            shift them instead: 0 becomes C, and what is above 0 one less.
        ignore_index: the class index that stands for an ignored anchor.
        groups: what is ranked apart, such as images: an integer for each entry along the first dimensions of
            ``logits``, ``logits.shape[:k]``, ``torch.arange(B)`` for logits ``(B, A, C)``. Only logits of equal group
            are compared. The means stay those over all positives, so the result is the mean of the groups' own losses
            weighted by their numbers of positives. None: one ranking.
        process_group: rank the logits of all its processes together: a ``torch.distributed.ProcessGroup``, or
            ``"world"`` for the default one. Each process passes its own logits, with as many positives as it has, if
            any, and all of them have to call. Losses are those of the joint batch, the same on every process; ``rank``
            and ``order`` are those of its own positives; groups are equal across processes where their integers are.
            What is sent grows with P alone. The host waits for the number of positives of the others. None: each
            process by itself.
        gradient_reduction: how gradients of the processes are brought together afterwards. ``"mean"``, as
            DistributedDataParallel does: each process' gradients are the joint loss' times the number of processes, so
            that their mean is right. ``"sum"``: they are the joint loss' own. Without ``process_group`` no matter.
        backend: ``"auto"``: on a GPU ``"triton"`` where triton 3.4 or newer is installed, on a CPU ``"numba"`` where
            numba is installed, else ``"torch"``. ``"triton"``: ``"triton_tiled"`` or ``"triton_binned"``, whichever the
            model of :mod:`alrp_triton.cost` expects to be faster for P and N; with groups the latter, for the former
            ranks one. ``"torch"`` runs on any device.

    Returns:
        ``classification`` and ``localisation`` (0-d), ``rank`` ``(P,)``, all in the widest dtype of
        logits, box_errors and float32; ``order`` ``(P,)`` int64.

    Defined behaviour:
        * No positives: both losses are 0 whatever the logits, each connected to the graph if its input requires a
          gradient; all gradients are 0.
        * No negatives, everything ignored, N = 0: as the formulas say, no NaN from finite input.
        * Ties: equal scores see each other with h(0), 1/2 for delta > 0 and 1 for delta = 0, in ``rank`` and in both
          losses; ``order`` is stable. Values and gradients do not depend on the order of the input, but for rounding.
        * NaN in a positive's or negative's logit, +-inf in a positive's logit: both losses and the gradients of all
          logits that count, in its group, are NaN. NaN or +-inf in a box error: ``localisation`` is NaN, and so is
          every update that contains it: those of positives with FP_i > eps and, if there is one, of the negatives. -inf
          and +inf negatives behave as the step says. Ignored logits are not looked at, and get gradient 0.
        * Second derivatives raise RuntimeError.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; values of targets that mean nothing; another number of box errors
            than of positives; delta or eps out of range; a backend that cannot run here; processes of
            ``process_group`` that call different losses or settings. On a GPU the two checks that need the values of
            ``targets`` are asynchronous device assertions: the host never waits for the device.
        RuntimeError: a process of ``process_group`` died or did not call within the group's timeout.

    Reference:
        Oksuz, Cam, Akbas, Kalkan: "A Ranking-based, Balanced Loss Function Unifying Classification and Localisation in
        Object Detection", NeurIPS 2020, arXiv:2009.13592; Section 4, Theorems 1 and 2.
    """
    _check_logits_and("box_errors", logits, box_errors)
    settings = _settings("alrp_loss", "alrp", logits, groups, delta, eps, backend, process_group, gradient_reduction)
    form = check_form(logits, targets, background, ignore_index)
    hint(logits)
    known = Positives(box_errors, box_errors.numel(), "box_errors")
    classification, localisation, rank, order = ranking_loss(logits, targets, form, known, groups, settings)
    return ALRPLossOutput(classification, localisation, PositiveRanks(rank, order))


@propagates_errors
@no_reduction
def ap_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    interpolate: bool = True,
    delta: float = DELTA,
    num_positives: int | None = None,
    background: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    groups: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    gradient_reduction: GradientReduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Average Precision Loss over all anchors and classes of a batch: 1 - AP.

    With the step h of half-width delta, H_ij = h(s_j - s_i), for each positive i, over negatives j and positives k::

        FP_i        = sum_j H_ij
        precision_i = (1 + sum_{k != i} H_ik) / (1 + sum_{k != i} H_ik + FP_i)
        loss        = mean_i (1 - precision_i)

    With ``interpolate`` precision_i is the greatest precision of the positives that do not score higher than i.

    The gradient is **the error-driven update** of the paper, scaled by the incoming gradient, and not the derivative of
    the value: a positive is pulled up by its error e_i = 1 - precision_i, and each negative j that outranks it is
    pushed down by H_ij e_i / FP_i. Where interpolation raises the precision, that is the published weight:
    H_ij / rank_i times (1 - greatest precision) / (1 - precision_i). A positive of precision 1 causes no gradient.

    Dense equivalent, for some thousand logits::

        def dense_ap_loss(logits, targets, delta=1.0):
            positives, negatives = logits[targets == 1], logits[targets == 0]
            s, p = positives.detach(), len(positives)

            def step(x):
                return ((x - s[:, None]) / (2 * delta) + 0.5).clamp(0, 1)

            false, above = step(negatives.detach()), step(s).fill_diagonal_(0)
            fp, true = false.sum(1), 1 + above.sum(1)
            precision = true / (true + fp)
            precision = torch.where(s <= s[:, None], precision, 0).amax(1)
            error = torch.where(fp > 0, 1 - precision, 0)
            down = (error / torch.where(fp > 0, fp, 1)) @ false  # of each negative
            update = (down @ negatives - error @ positives) / p
            return (1 - precision).mean() + update - update.detach()

    Args:
        logits: as for :func:`alrp_loss`.
        targets: as for :func:`alrp_loss`, in either form.
        interpolate: whether precision is interpolated, as published.
        delta: half-width of the step; 0 (a hard step) or in [2**-126, 2**125].
        num_positives: the number of positives, if the caller knows it. Without it targets are read twice, and on a GPU
            the host waits for it.
        background: the class index that stands for background; default C.
        ignore_index: the class index that stands for an ignored anchor.
        groups: as for :func:`alrp_loss`.
        process_group: as for :func:`alrp_loss`.
        gradient_reduction: as for :func:`alrp_loss`.
        backend: as for :func:`alrp_loss`.

    Returns:
        0-d, in the wider dtype of logits and float32; in [0, 1].

    Defined behaviour: that of the classification part of :func:`alrp_loss`: no positives, no negatives, ties, values
    that are not finite, second derivatives.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: as :func:`alrp_loss`; ``num_positives`` that is not the number of positives (on a GPU an
            asynchronous device assertion).

    Reference:
        Chen, Li, Lin, See, Wang, Duan, Chen, He, Zou: "Towards Accurate One-Stage Object Detection with AP-Loss",
        CVPR 2019, arXiv:1904.06373; Section 3. Interpolation: the published implementation.
    """
    check_tensor("logits", logits, "floating")
    check_bool("interpolate", interpolate)
    if num_positives is not None:
        num_positives = check_integer("num_positives", num_positives, 0, logits.numel())
    name, loss = ("interpolated ap_loss", "interpolated_ap") if interpolate else ("ap_loss", "ap")
    settings = _settings(name, loss, logits, groups, delta, 0.0, backend, process_group, gradient_reduction)
    form = check_form(logits, targets, background, ignore_index)
    hint(logits)
    return ranking_loss(logits, targets, form, Positives(None, num_positives, "num_positives"), groups, settings)[0]


@propagates_errors
@no_reduction
def rank_sort_loss(
    logits: Tensor,
    targets: Tensor,
    ious: Tensor | None = None,
    *,
    delta: float = DELTA_RS,
    eps: float = EPS_RS,
    num_positives: int | None = None,
    background: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    groups: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    gradient_reduction: GradientReduction = "mean",
    backend: Backend = "auto",
) -> RankSortLossOutput:
    r"""Rank & Sort Loss over all anchors and classes of a batch.

    It ranks positives above negatives, and sorts positives by their IoUs t. With the step h of half-width delta,
    H_ij = h(s_j - s_i), for each positive i, over negatives j and all positives k, i itself included::

        FP_i      = sum_j H_ij
        ranking_i = FP_i / (sum_k H_ik + FP_i)
        sorting_i = mean of 1 - t_k over k weighed by H_ik,
                    less the same over those of t_k >= t_i
        ranking, sorting = their means over i

    The gradient is **the error-driven update** of the paper and not the derivative of the values. Of the ranking error:
    a positive of FP_i > eps is pulled up by ranking_i, the negatives that outrank it are pushed down by
    H_ij ranking_i / FP_i. Of the sorting error: a positive is pulled up by sorting_i, the positives of lower IoU that
    outrank it are pushed down by H_ik / sum H_ik of it. **The incoming gradients of both results are honoured**: that
    of ``ranking`` scales the first update, that of ``sorting`` the second. The published code scales both by that of
    the ranking error; for ``(ranking + sorting).backward()`` there is no difference.

    Dense equivalent, for some thousand logits::

        def dense_rank_sort_loss(logits, targets, ious, delta=0.5, eps=1e-10):
            positives, negatives = logits[targets == 1], logits[targets == 0]
            s, p = positives.detach(), len(positives)

            def step(x):
                return ((x - s[:, None]) / (2 * delta) + 0.5).clamp(0, 1)

            false, above = step(negatives.detach()), step(s)
            fp, worse = false.sum(1), above * (ious < ious[:, None])
            better = above - worse
            ranking = fp / (above.sum(1) + fp)
            sorting = above @ (1 - ious) / above.sum(1)
            sorting = sorting - better @ (1 - ious) / better.sum(1)
            up = torch.where(fp > eps, ranking, 0)
            down = (up / fp.clamp(min=eps)) @ false  # of each negative
            of_ranking = (down @ negatives - up @ positives) / p
            missorted = worse.sum(1)
            up = torch.where(missorted > eps, sorting, 0)
            down = (up / missorted.clamp(min=eps)) @ worse  # of each positive
            of_sorting = (down - up) @ positives / p
            return (
                ranking.mean() + of_ranking - of_ranking.detach(),
                sorting.mean() + of_sorting - of_sorting.detach(),
            )

    Args:
        logits: as for :func:`alrp_loss`.
        targets: with ``ious`` as for :func:`alrp_loss`, in either form. Without, the shape of ``logits``: the IoU of a
            positive, in (0, 1], 0 for negatives, -1 for ignored. A positive whose IoU is 0 needs the other form.
        ious: IoUs of the positives with their ground truth, ``(P,)``, in the order of their flat index, floating; in
            [0, 1]. Labels: they get no gradient.
        delta: half-width of the step; 0 (a hard step) or in [2**-126, 2**125].
        eps: a positive with no more false positives than that causes no gradient of the ranking error; with no more
            missorted positives (sum of H_ik over those of lower IoU), none of the sorting error.
        num_positives: the number of positives, if the caller knows it and does not pass ``ious``. Without either,
            targets are read twice, and on a GPU the host waits for it.
        background: the class index that stands for background; default C.
        ignore_index: the class index that stands for an ignored anchor.
        groups: as for :func:`alrp_loss`.
        process_group: as for :func:`alrp_loss`.
        gradient_reduction: as for :func:`alrp_loss`.
        backend: as for :func:`alrp_loss`.

    Returns:
        ``ranking`` and ``sorting``, 0-d, in the widest dtype of logits, IoUs and float32.

    Positives are compared with positives pair by pair on a GPU by Triton, and on a CPU, if they are few (2048 by numba,
    400 by torch); beyond in O(P log P).

    Defined behaviour: that of :func:`alrp_loss` for no positives, no negatives, ties and second derivatives. NaN in a
    negative's logit makes ``ranking`` NaN and all gradients that come of it; a positive's logit that is not finite, and
    an IoU that is NaN, make both results NaN, and all gradients that come of them.

    Raises:
        TypeError: an argument of the wrong type or dtype; targets that are not floating, without ``ious``.
        ValueError: as :func:`alrp_loss`, with ``ious`` in place of the box errors; ``ious`` out of range (by more than
            rounding; on a GPU an asynchronous device assertion); ``num_positives`` beside ``ious``, or not the number
            of positives.

    Reference:
        Oksuz, Cam, Akbas, Kalkan: "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021,
        arXiv:2107.11669; Section 4.
    """
    check_tensor("logits", logits, "floating")
    if ious is not None:
        _check_logits_and("ious", logits, ious)
        if num_positives is not None:
            raise ValueError(f"num_positives must not be given beside ious, which tell it; got {num_positives}")
    elif num_positives is not None:
        num_positives = check_integer("num_positives", num_positives, 0, logits.numel())
    settings = _settings(
        "rank_sort_loss", "rank_sort", logits, groups, delta, eps, backend, process_group, gradient_reduction
    )
    form = check_form(logits, targets, background, ignore_index, graded=ious is None)
    hint(logits)
    known = Positives(None, num_positives, "num_positives")
    if ious is not None:
        known = Positives(ious.detach(), ious.numel(), "ious", ious=True)
    return RankSortLossOutput(*ranking_loss(logits, targets, form, known, groups, settings))
