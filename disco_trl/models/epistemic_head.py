"""What the training data leave open about the location row: its posterior."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init


class EpistemicHead(nn.Module):
    """
    Error of the location over the posterior of the location row w.

    The posterior is normal, N(w, A⁻¹), over features φ = (h - mean) / unit of the hidden state h. A is the precision λ
    of the prior plus the information of the training pairs, of which the R strongest directions are kept. In all other
    directions the prior holds. `disco_trl.trainer.epistemic` fits it.

    Args:
        hidden_size (`int`):
            Size H of the hidden states.
        rank (`int`):
            Number R of directions.
        device (`torch.device`, *optional*):
            Device of the buffers.

    Attributes:
        mean, unit (`torch.Tensor` of shape `(H,)`):
            Mean and unit of the hidden states.
        directions (`torch.Tensor` of shape `(R, H)`):
            Orthonormal directions.
        variances (`torch.Tensor` of shape `(R,)`):
            Posterior variance of w along each direction.
        prior_variance (`torch.Tensor` of shape `()`):
            1/λ, or 0 if the posterior has not been fitted.
    """

    mean: Tensor
    unit: Tensor
    directions: Tensor
    variances: Tensor
    prior_variance: Tensor

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None):
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {"mean": (hidden_size,), "unit": (hidden_size,)}
        shapes |= {"directions": (rank, hidden_size), "variances": (rank,), "prior_variance": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))

    def init_weights(self) -> None:
        """Set to zero what a checkpoint did not load."""
        for tensor in self.buffers():
            init.zeros_(tensor)

    @property
    def is_fitted(self) -> bool:
        """Whether the posterior has been fitted."""
        return bool(self.prior_variance > 0)

    def rescale(self, factor: float) -> None:
        """
        Multiply the standard deviations, in place.

        Args:
            factor (`float`):
                Factor that the locations are multiplied by.
        """
        self.variances.mul_(factor**2)
        self.prior_variance.mul_(factor**2)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """
        Compute factors of the errors of locations.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., H)`):
                Pooled hidden states, or those of every token.

        Returns:
            `torch.Tensor` of shape `(..., H)`, float32: A^(-1/2) φ, in reward units. Its norm is the standard
            deviation of the location, and the inner product of two of them the covariance of two locations.
        """
        features = (hidden_states.float() - self.mean) / self.unit
        along = features @ self.directions.T
        rest = features - along @ self.directions
        return self.prior_variance.sqrt() * rest + (along * self.variances.sqrt()) @ self.directions
