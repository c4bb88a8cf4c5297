"""A linear layer that stores and multiplies only the weights that are left (CSR), for inference on a CPU."""

import warnings

import torch
from torch import Tensor, nn


class SparseLinear(nn.Module):
    r"""``x W^T + b`` with ``W`` in compressed-sparse-row form: ``density`` times the multiplications of a dense layer.

    The index traffic is 8 bytes a weight (int32 column and float32 value), so it pays at a few per cent of density
    and small batches. The weight is a buffer: the layer is for inference and cannot be trained.

    Args:
        weight: dense ``(out_features, in_features)``; its zeros are dropped.
        bias: ``(out_features,)`` or ``None``.

    Raises:
        ValueError: the weight is not a matrix.

    Reference: savarese2020winning

    >>> layer = SparseLinear(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), bias=None)
    >>> layer.density, layer(torch.tensor([[1.0, 10.0]]))
    (0.25, tensor([[20.,  0.]]))
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if weight.ndim != 2:
            raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # torch says "beta" once per process
            csr = weight.detach().to_sparse_csr()
        # int32 indices: half the traffic, and what MKL's kernel takes without a conversion in every call.
        rows, columns = csr.crow_indices().to(torch.int32), csr.col_indices().to(torch.int32)
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            matrix = torch.sparse_csr_tensor(rows, columns, csr.values(), weight.shape)
        self.register_buffer("weight", matrix)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def density(self) -> float:
        """Fraction of weights that are stored."""
        return self.weight.values().numel() / (self.out_features * self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        weight, bias = self.weight, self.bias
        if x.numel() == self.in_features:
            column = x.reshape(-1)
            out = torch.mv(weight, column) if bias is None else torch.addmv(bias, weight, column)
        else:
            columns = x.reshape(-1, self.in_features).t()
            out = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
        return out.t().reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and density."""
        return f"in_features={self.in_features}, out_features={self.out_features}, density={self.density:.4f}"


def sparsify_linears(model: nn.Module, names: list[str] | None = None) -> nn.Module:
    """Replace linear layers by :class:`SparseLinear`; convolutions stay dense (there is no CSR convolution).

    Args:
        model: changed in place.
        names: layers to look at; ``None`` for all.

    Returns:
        The model, or the new layer where the model itself is the Linear.

    Reference: savarese2020winning

    >>> sparsify_linears(nn.Sequential(nn.Linear(2, 3)))
    Sequential(
      (0): SparseLinear(in_features=2, out_features=3, density=1.0000)
    )
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or (names is not None and name not in names):
            continue
        new = SparseLinear(layer.weight, layer.bias).train(layer.training)
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model
