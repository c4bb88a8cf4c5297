"""Proxies that read gradients: norm, SNIP, plain and Fisher off one backward pass; GraSP, SynFlow, jacob_cov."""

import contextlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from effnb.common import check_choice
from effnb.nas.proxies.activations import CodeKernel, ReluWatch, log_determinant, watched
from effnb.nas.zico.passes import Loss, check_model, find_layers, free_weights, mean_loss, pure, read_batch, read_images

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
OFFSET = 1e-5  # added to eigenvalues by the official code


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weights of convolution and linear layers by the layer's name, a tied weight once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, weight in free_weights(model).items():
        found.setdefault(id(weight), (name, weight))
    return dict(found.values())


def gradients(output: Tensor | list[Tensor], inputs: list[Tensor], zeros: bool = True, **options: Any) -> list:
    """Return gradients; zeros, or else None, for inputs that ``output`` does not depend on."""
    outputs = [output] if isinstance(output, Tensor) else output
    if any(tensor.requires_grad for tensor in outputs):
        return list(torch.autograd.grad(outputs, inputs, allow_unused=True, materialize_grads=zeros, **options))
    return [torch.zeros_like(tensor) if zeros else None for tensor in inputs]


def total(values: Iterable[Tensor]) -> float:
    """Return the sum of scalars, added in double precision."""
    return float(torch.stack([value.double() for value in values]).sum())


class FisherWatch:
    """Collects ``F_c = mean_n g_nc^2 / 2`` of every convolution and linear output during a backward pass.

    ``overwritten`` tells that an output was changed in place (an in-place ReLU, a ``+=``) before its gradient came;
    the values are wrong then, and the pass must be repeated with ``copy``, which costs a copy of each output.
    """

    def __init__(self, copy: bool) -> None:
        self.copy, self.overwritten = copy, False
        self.found: dict[nn.Module, Tensor] = {}

    def see(self, layer: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> None:
        """Wait for the gradient of the output ``z``."""
        if not z.requires_grad:
            return
        value, version = (z.detach().clone() if self.copy else z.detach()), z._version

        def arrived(grad: Tensor) -> None:
            # A hook on a tensor sees the gradient of what it was before it was overwritten, but not that value.
            self.overwritten |= not self.copy and value._version != version
            product = (value * grad).movedim(-1 if isinstance(layer, nn.Linear) else 1, 1)
            sums = product.flatten(2).sum(2) if product.ndim > 2 else product
            fisher = sums.square().mean(0) / 2
            self.found[layer] = self.found[layer] + fisher if layer in self.found else fisher

        z.register_hook(arrived)


class GradientPass:
    """One forward and backward pass of the mean loss in train mode, from which several proxies are read.

    ``grads`` holds the gradient of each trainable convolution and linear weight by the name of its layer, zeros where
    the loss does not depend on it; ``reached`` tells whether it depends on any. ``loss`` is the mean loss. The
    model stays as it was.

    Args:
        model: network from ``x`` to logits, or to a tuple that ends in them.
        batch: ``(x, y)``.
        loss_fn: mean loss of a batch.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.
        fisher: also collect what `fisher` needs.
        codes: also collect what `naswot` needs, from two samples or more.

    Raises:
        ValueError: an empty batch, labels out of range, inputs or a loss that are not finite, no trainable weight.
        TypeError: complex numbers, or a batch of another kind.

    >>> model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    >>> step = GradientPass(model, batch)
    >>> step.snip() >= abs(step.plain()), step.snip() == snip(model, batch)
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        loss_fn: Loss = F.cross_entropy,
        seed: int | None = 0,
        fisher: bool = False,
        codes: bool = False,
    ) -> None:
        x, y = read_batch(batch, 2 if codes else 1)
        self.weights = weights(model)
        self.layers = list(find_layers(model).values()) if fisher else None
        self.codes = CodeKernel() if codes else None
        for copy in (False, True):
            channels = FisherWatch(copy)
            with pure(model, seed) as call, watched(self.layers or (), channels.see):
                with ReluWatch(self.codes.add) if codes else contextlib.nullcontext():
                    output = call(x)
                loss = mean_loss(loss_fn, output, y)
                found = gradients(loss, list(self.weights.values()), zeros=False)
            if not channels.overwritten:
                break
            codes = False  # they are known
        self.loss, self.channels = float(loss.detach()), channels.found
        self.reached = any(grad is not None for grad in found)
        pairs = zip(self.weights.items(), found, strict=True)
        self.grads = {name: torch.zeros_like(w) if g is None else g for (name, w), g in pairs}

    def grad_norm(self) -> float:
        """Return the sum of the layers' gradient norms."""
        return total(torch._foreach_norm(list(self.grads.values())))

    def snip(self) -> float:
        """Return the sum of ``|weight * gradient|``."""
        return total((self.weights[n].detach() * g).abs().sum(dtype=torch.float64) for n, g in self.grads.items())

    def plain(self) -> float:
        """Return the sum of ``weight * gradient``."""
        return total((self.weights[n].detach() * g).sum(dtype=torch.float64) for n, g in self.grads.items())

    def fisher(self, broadcast: bool = True) -> float:
        """Return the sum over channels, each times its number of weights if ``broadcast``; needs ``fisher=True``."""
        seen = [layer for layer in self.layers if layer in self.channels]
        sums = [self.channels[m].sum(dtype=torch.float64) * (m.weight[0].numel() if broadcast else 1) for m in seen]
        return total(sums) if sums else 0.0

    def naswot(self) -> float:
        """Return the log-determinant of the code kernel; needs ``codes=True``."""
        return log_determinant(self.codes.matrix())


def grad_norm(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return :math:`\sum_l \lVert \partial L / \partial \theta_l \rVert_2`; higher is better.

    The sum of the layers' norms, not the norm of all gradients; convolution and linear weights only.

    Args:
        model, batch, loss_fn, seed: as for `GradientPass`, which also says what raises.

    Reference: abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(1, 1), torch.tensor([0]))
    >>> _ = nn.init.zeros_(model.weight)
    >>> round(grad_norm(model, batch), 4)  # gradient (-1/2, 1/2)
    0.7071
    """
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).grad_norm()


def snip(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return SNIP, :math:`\sum |\theta \, \partial L / \partial \theta|` over the weights; higher is better.

    Args:
        model, batch, loss_fn, seed: as for `GradientPass`, which also says what raises.

    Reference: lee2019snip.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(1, 1), torch.tensor([0]))
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> snip(model, batch)  # gradient (-1/2, 1/2)
    3.0
    """
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).snip()


def plain(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return :math:`\sum \theta \, \partial L / \partial \theta`, `snip` without the bars; higher is better.

    Weights that a batch norm follows add nothing: the loss does not change with their scale.

    Args:
        model, batch, loss_fn, seed: as for `GradientPass`, which also says what raises.

    Reference: abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(1, 1), torch.tensor([0]))
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> plain(model, batch)
    0.0
    """
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).plain()


def fisher(
    model: nn.Module, batch: Any, *, broadcast: bool = True, loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    r"""Return the Fisher score, :math:`\sum_l \sum_c F_c`; higher is better.

    :math:`F_c = \frac12 \operatorname{mean}_n g_{nc}^2` for each channel of the output z of a convolution or linear
    layer, with :math:`g_{nc}` the sum over places of :math:`z \, \partial L / \partial z`. The official code gives
    :math:`F_c` to every weight of the channel before it sums; so does this by default. A layer that is used several
    times counts each use.

    Args:
        model, batch, loss_fn, seed: as for `GradientPass`, which also says what raises.
        broadcast: multiply each channel by its number of weights, as the official code.

    Reference: turner2020blockswap, abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(1, 1), torch.tensor([0]))
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> fisher(model, batch)  # z = (2, 2), gradient (-1/2, 1/2)
    1.0
    """
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed, fisher=True).fisher(broadcast)


def grasp(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return GraSP, :math:`\sum -\theta \, (H g)` with the Hessian H and the gradient g of the loss; higher is better.

    g is a constant in the product. The original prunes by the opposite sign; this is the sign of the official code of
    zero-cost proxies, with its temperature 1, and both derivatives on the same batch.

    Args:
        model: network, differentiable twice; it stays as it was.
        batch, loss_fn, seed: as for `GradientPass`, which also says what raises.

    Reference: wang2020grasp, abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(1, 1, bias=False), (torch.ones(1, 1), torch.zeros(1, 1))
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> grasp(model, batch, loss_fn=nn.functional.mse_loss)  # loss w^2: -w (2 (2 w))
    -36.0
    """
    x, y = read_batch(batch)
    with pure(model, seed) as call:
        theta = list(weights(model).values())
        grads = gradients(mean_loss(loss_fn, call(x), y), theta, create_graph=True)
        curved = gradients(grads, theta, grad_outputs=[grad.detach() for grad in grads])
    return -total((w.detach() * h).sum(dtype=torch.float64) for w, h in zip(theta, curved, strict=True))


def synflow(
    model: nn.Module, batch: Any, *, bn: str = "identity", loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    r"""Return SynFlow, :math:`\sum |\theta \, \partial R / \partial \theta|`; higher is better.

    R is the sum of the outputs for one input of ones, with all floating parameters and buffers replaced by their
    absolute values, in double precision; theta are convolution and linear weights, frozen ones too. For a chain
    without biases the score is the number of layers times R.

    Args:
        model, loss_fn, seed: as for `naswot`, which also says what raises; here a network without such a layer too.
        batch: ``(x, y)`` or ``x`` alone, of which only the shape is used.
        bn: ``"identity"`` takes normalisation layers out; ``"keep"`` leaves them in, as the code of the survey does by
            oversight, which gives a score of another kind.

    Reference: tanaka2020synflow, abdelfattah2021zerocost.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(model[0].weight, -3.0), nn.init.constant_(model[1].weight, 0.5)
    >>> synflow(model, torch.zeros(1, 2))  # 2 layers, R = 3
    6.0
    """
    check_choice("bn", bn, ("identity", "keep"))
    parameters, buffers = check_model(model)
    x = read_images(batch)
    # Masks, indices and counts stay as they are, and all memory is our own.
    positive = {
        name: tensor.detach().double().abs() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in (parameters | buffers).items()
    }
    counted = {id(layer.weight) for layer in find_layers(model).values()}
    theta = [positive[name].requires_grad_() for name, parameter in parameters.items() if id(parameter) in counted]

    norms = [module for module in model.modules() if isinstance(module, NORMS)] if bn == "identity" else []
    # An instance may carry a `forward` of its own, as wrapped modules do; it comes back afterwards.
    hidden = [module.__dict__.get("forward") for module in norms]
    try:
        for module in norms:
            module.forward = lambda x, *args, **kwargs: x
        with pure(model, seed, positive) as call:
            grads = gradients(call(torch.ones_like(x[:1], dtype=torch.float64)).sum(), theta)
    finally:
        for module, own in zip(norms, hidden, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own
    return total((w.detach() * g).abs().sum() for w, g in zip(theta, grads, strict=True))


def jacob_cov(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return :math:`-\sum_i \log(v_i + k) + 1/(v_i + k)` of the eigenvalues v of a correlation matrix.

    Higher is better. The matrix correlates the samples' rows of the Jacobian of the summed logits by the input; k is
    1e-5. The maximum :math:`-n (\log(1 + k) + 1 / (1 + k))` is reached by rows without correlation.

    Args:
        model, batch, loss_fn, seed: as for `naswot`, which also says what raises; it needs no ReLU.

    Returns:
        The score; ``-inf``, with a warning, if the Jacobian of a sample is constant.

    Reference: mellor2021naswot, abdelfattah2021zerocost.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> jacob_cov(model, torch.randn(3, 4)) < -3 * (1 / (1 + 1e-5))
    True
    """
    x = read_images(batch, 2).clone().requires_grad_()
    with pure(model, seed) as call:
        (jacobian,) = gradients(call(x).sum(), [x])
    rows = jacobian.flatten(1).double()
    centred = rows - rows.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    # A mean is exact up to rounding only, so a constant row may leave a trace of it.
    if (norms <= 1e-12 * torch.linalg.vector_norm(rows, dim=1, keepdim=True)).any():
        warnings.warn("jacob_cov: the Jacobian of a sample is constant, the score is -inf", stacklevel=2)
        return -float("inf")
    centred /= norms
    values = torch.linalg.eigvalsh(centred @ centred.T).clamp(min=0) + OFFSET
    return -float((values.log() + 1 / values).sum())
