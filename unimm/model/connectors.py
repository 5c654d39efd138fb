"""Connectors: what carries features of a seen image, or a code's vector, to the decoder's width.

Janus's is the two-layer MLP. Another is a class with (in_dim, out_dim) and a line in CONNECTORS.
"""

from torch import Tensor, nn


class Linear(nn.Linear):
    """One matrix with a bias: (…, in_dim) -> (…, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)


class MLP(nn.Module):
    """Janus's adaptor: linear, GELU, linear; (…, in_dim) -> (…, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


CONNECTORS: dict[str, type[nn.Module]] = {"linear": Linear, "mlp": MLP}
