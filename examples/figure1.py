"""Figure 1 of the aLRP paper: three detectors that rank alike and localise differently.

AP Loss, which is the classification part of aLRP Loss, cannot tell them apart; aLRP Loss prefers the one whose
confident detections have the better boxes. Run ``python -m examples.figure1``.

Reference: Oksuz et al., NeurIPS 2020, Figure 1.
"""

import torch

from alrp_triton import alrp_loss, localisation_error

SCORES = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
TARGETS = [1, 0, 1, 0, 0, 1, 0, 0, 0, 1]  # anchors 1, 3, 6 and 10 are positives
IOUS = {"R1": [0.95, 0.80, 0.65, 0.50], "R2": [0.80, 0.65, 0.50, 0.95], "R3": [0.50, 0.65, 0.80, 0.95]}


def losses(ranking: str) -> tuple[float, float]:
    """AP Loss and aLRP Loss of one of the three detectors, with a hard step."""
    errors = localisation_error(torch.tensor(IOUS[ranking]))
    out = alrp_loss(torch.tensor(SCORES), torch.tensor(TARGETS), errors, delta=0.0)
    return out.classification.item(), (out.classification + out.localisation).item()


def main() -> None:
    """Print the table."""
    print("detector  IoUs of its positives, best score first  AP Loss  aLRP Loss")
    for ranking, ious in IOUS.items():
        ap, alrp = losses(ranking)
        print(f"{ranking:<8}  {'  '.join(f'{iou:.2f}' for iou in ious):<40}  {ap:7.2f}  {alrp:9.2f}")


if __name__ == "__main__":
    main()
