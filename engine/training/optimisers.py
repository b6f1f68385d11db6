"""Muon in float32, shared out over workers, next to AdamW for everything that is no hidden matrix.

torch.optim.Muon computes in bfloat16, which CPUs without such instructions emulate eight times slower.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: Newton-Schulz iterations.

    Source: Jordan et al. 2024, "Muon", with their quintic coefficients.
    """
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    flat: Tensor = x.T if tall else x
    return flat


class Muon:
    """Orthogonalised momentum of matrices and of convolutions, whose inputs and places count as columns.

    With several workers each does its share of them and they add up.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, momentum: float = 0.95) -> None:
        self.parameters = list(parameters)
        self.momentum = momentum
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update by the parameters' gradients, which must already be averaged over the workers."""
        rank, workers = world()
        updates = []
        for i, (parameter, buffer) in enumerate(zip(self.parameters, self.buffers, strict=True)):
            assert parameter.grad is not None
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            mine = i % workers == rank
            matrix = parameter.grad.lerp(buffer, self.momentum).flatten(1)
            updates.append(orthogonalise(matrix) if mine else torch.zeros_like(matrix))
        add_over_workers(updates)
        for parameter, update in zip(self.parameters, updates, strict=True):
            rows, columns = update.shape
            parameter.add_(update.view_as(parameter), alpha=-rate * max(1.0, rows / columns) ** 0.5)


def world() -> tuple[int, int]:
    """This worker's rank and the number of workers; (0, 1) outside of a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_over_workers(tensors: list[Tensor]) -> None:
    """Sum tensors over all workers, in place and in one message."""
    if world()[1] == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean gradient over all workers."""
    workers = world()[1]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    add_over_workers(gradients)
    for gradient in gradients:
        gradient.div_(workers)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices and convolutions of the blocks (for Muon), and all others (for AdamW)."""
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_hidden = parameter.ndim in (2, 4) and "blocks." in name and not name.endswith("modulation")
        (hidden if is_hidden else others).append(parameter)
    return hidden, others
