"""Proxies on the gradient of every sample: condition of the tangent kernel, GradSign and KNAS."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from effnb.common import check_choice
from effnb.nas.proxies.activations import watched
from effnb.nas.proxies.gradient import gradients, total, weights
from effnb.nas.zico.passes import Call, Loss, check_model, mean_loss, pure, read_batch, read_images

UNDEFINED = 1e5  # what the official code returns for a condition number that is NaN
CACHE = {"cpu": 2**18, "cuda": 2**26}  # elements of a batched activation that are still worth batching
LEAST = 4  # below so many samples at a time a loop is as fast


def per_sample(output: Tensor, rows: Tensor, parameters: list[Tensor], chunk: int = 1) -> list[Tensor]:
    """Return for each sample i the vector-Jacobian product with ``rows[i]`` at output i and zero at the others.

    Samples couple through batch norm in train mode, so each product is a backward pass through the whole batch. They
    are taken ``chunk`` at a time by one batched backward pass, or one after the other where that is as fast. Output and
    rows are ``(batch, ...)``; the result is one tensor ``(batch, *parameter.shape)`` a parameter.
    """
    if not output.requires_grad:
        return [p.new_zeros(len(output), *p.shape) for p in parameters]
    one_hot = torch.diag_embed(rows.flatten(1).T).movedim(0, -1).reshape(len(rows), *rows.shape)

    def product(cotangent: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradients(output, parameters, grad_outputs=cotangent, retain_graph=True))

    if min(chunk, len(rows)) > 1:
        try:
            with warnings.catch_warnings():
                # An operation without a batching rule is looped over, and says so.
                warnings.simplefilter("ignore", UserWarning)
                return list(vmap(product, chunk_size=chunk)(one_hot))
        except RuntimeError:
            pass  # a custom operation that cannot be batched at all
    return [torch.stack(grads) for grads in zip(*map(product, one_hot), strict=True)]


def run_measured(call: Call, model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return the output, and how many samples' products to batch by the largest layer's output; 1 where it costs."""
    sizes, kinds = [(1, "cpu")], (nn.modules.conv._ConvNd, nn.Linear)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    with watched(layers, lambda layer, args, out: sizes.append((out.numel(), out.device.type))):
        output = call(x)
    elements, device = max(sizes, key=lambda size: size[0])
    found = CACHE.get(device, CACHE["cuda"]) // elements
    return output, found if found >= LEAST else 1


def named_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return all trainable parameters with ``weight`` in their name: those of norms, but no biases."""
    parameters, _ = check_model(model)
    found = [p for name, p in parameters.items() if "weight" in name and p.requires_grad]
    if not found:
        raise ValueError("model must have a parameter named weight that requires a gradient, it has none")
    return found


def tangent_kernel(model: nn.Module, batch: Any, seed: int | None = 0) -> Tensor:
    """Return ``G G^T``, ``(batch, batch)`` in double precision, for the gradients G of each sample's summed logits."""
    x, parameters = read_images(batch, 2), named_weights(model)
    with pure(model, seed) as call:
        output, chunk = run_measured(call, model, x)
        rows = per_sample(output, torch.ones_like(output), parameters, chunk)
    kernel = sum(g @ g.T for g in (row.detach().flatten(1).double() for row in rows))
    return (kernel + kernel.T) / 2  # a product of matrices is symmetric up to rounding only


def ntk_condition(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return the condition number :math:`\lambda_{\max} / \lambda_{\min}` of the tangent kernel; LOWER is better.

    The kernel is :math:`G G^\top` with row i of G the gradient of the sum of the logits of sample i by all parameters
    named ``weight``, those of norms included. The network is in train mode, so the gradient of one sample flows
    through the batch statistics to all others, as in the official code.

    Args:
        model, batch, loss_fn, seed: as for `naswot`.

    Returns:
        At least 1, infinite for a singular kernel; 1e5 where it is not defined, as for a kernel of zeros.

    Raises:
        ValueError: fewer than two samples, inputs that are not finite, or no trainable weight.
        TypeError: as `naswot`.

    Reference: chen2021tenas.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> round(ntk_condition(model, torch.tensor([[1.0, 0.0], [0.0, 2.0]])), 4)  # K = diag(1, 4)
    4.0
    """
    kernel = tangent_kernel(model, batch, seed)
    if not kernel.isfinite().all() or not kernel.any():
        return UNDEFINED
    values = torch.linalg.eigvalsh(kernel)
    return float(values[-1] / values[0].clamp(min=0))


def grad_sign(
    model: nn.Module, batch: Any, *, coupled: bool = True, loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    r"""Return GradSign, :math:`\sum_\theta |\sum_i \operatorname{sign} \partial L_i / \partial \theta|`.

    Higher is better: the samples agree in which way a weight should go.

    Args:
        model, batch, seed: as for `GradientPass`, which also says what raises.
        coupled: run the samples as one batch, so that batch norms couple them; ``False`` runs each sample alone, as the
            official code, which then normalises over its own places.
        loss_fn: mean loss of a batch; it is called with one sample at a time.

    Returns:
        A whole number, over convolution and linear weights.

    Reference: zhang2022gradsign.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(2, 1), torch.tensor([0, 1]))
    >>> grad_sign(model, batch), grad_sign(model, (torch.ones(2, 1), torch.tensor([0, 0])))
    (0.0, 4.0)
    """
    x, y = read_batch(batch)
    theta = list(weights(model).values())
    with pure(model, seed) as call:
        if coupled:
            output, chunk = run_measured(call, model, x)
            leaf = output.detach().requires_grad_()
            mean_loss(loss_fn, leaf, y)  # for its checks
            apart = sum(loss_fn(leaf[i : i + 1], y[i : i + 1]) for i in range(len(y)))
            rows = per_sample(output, gradients(apart, [leaf])[0], theta, chunk)
        else:
            pairs = zip(x.split(1), y.split(1), strict=True)
            found = [gradients(mean_loss(loss_fn, call(one), label), theta) for one, label in pairs]
            rows = [torch.stack(grads) for grads in zip(*found, strict=True)]
    return total(g.sign().sum(0).abs().sum(dtype=torch.float64) for g in rows)


def knas(
    model: nn.Module, batch: Any, *, of: str = "logits", loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    r"""Return KNAS, the mean of the entries of the tangent kernel :math:`G G^\top`; higher is better.

    The mean over all pairs is :math:`\lVert \frac1n \sum_i g_i \rVert^2`: one backward pass, no gradient per sample.

    Args:
        model, loss_fn, seed: as for `GradientPass`; the loss is needed for ``of="loss"`` only.
        batch: ``(x, y)``, or ``x`` alone for ``of="logits"``.
        of: what is differentiated for each sample: the sum of its ``"logits"``, as in `ntk_condition` and in the
            paper, or its ``"loss"``, as in the official code (which samples and centres further).

    Returns:
        The score, over all parameters named ``weight``.

    Raises:
        ValueError: an unknown ``of``, or what `GradientPass` raises.
        TypeError: as `GradientPass`.

    Reference: xu2021knas.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> knas(model, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # mean of [[1, 0], [0, 4]]
    1.25
    """
    check_choice("of", of, ("logits", "loss"))
    x, y = (read_images(batch), None) if of == "logits" else read_batch(batch)
    with pure(model, seed) as call:
        output = call(x)
        mean = output.sum() / len(x) if of == "logits" else mean_loss(loss_fn, output, y)
        grads = gradients(mean, named_weights(model))
    return total(grad.square().sum(dtype=torch.float64) for grad in grads)
