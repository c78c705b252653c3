"""Prints what TRL's two distillation losses make of the logits of `inputs`, as test_golden_distillation.py
keeps it. Made with TRL 1.16.0:

    PYTHONPATH=FOLDER_WITH_TRL python tests/golden/distillation_of_trl.py
"""

from __future__ import annotations

import torch
from torch import Tensor


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(2, 4, 7) logits of student and teacher, and (2, 4) whether a position counts."""
    n = torch.arange(56, dtype=torch.float64)
    student, teacher = 2 * torch.sin(1.7 * n), 3 * torch.cos(0.9 * n + 0.5)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    return student.view(2, 4, 7), teacher.view(2, 4, 7), mask


if __name__ == "__main__":
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    student, teacher, mask = inputs()
    eye = torch.eye(7, dtype=torch.float64)
    for beta in (0.0, 0.1, 0.5, 1.0):
        for temperature in (1.0, 0.7):
            logits = student.clone().requires_grad_()
            labels = torch.where(mask, 0, -100)
            gkd = GKDTrainer.generalized_jsd_loss(logits, teacher, labels, beta, temperature)
            (slope,) = torch.autograd.grad(gkd, logits)
            chunked, entropy, counted = _chunked_divergence_loss(
                student, teacher, eye, eye, mask, beta, temperature=temperature
            )
            value = gkd.item()
            print(f"({beta}, {temperature}): ({value}, {float(chunked)}, {float(entropy)},")
            print(f"    {slope[0, 1].tolist()}),  # {int(counted)} positions")
