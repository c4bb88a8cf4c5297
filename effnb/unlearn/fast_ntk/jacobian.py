"""Per-sample Jacobians over a subset of the parameters, in chunks that respect a memory budget."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from .checks import check_choice, check_inputs, check_model
from .norm_affine import norm_affine, plan
from .subset import resolve

METHODS = ("auto", "vmap", "norm_affine", "loop")
MEMORY_BUDGET = 2**26
Chunk = Callable[[Tensor], tuple[Tensor, Tensor]]


class Probe(NamedTuple):
    """What one sample costs: outputs, and values that all layers together and the largest one return."""

    outputs: int
    activations: int
    largest: int


def probe(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> Probe:
    """Run one sample; raises if the output is not ``(1, K)`` or the model draws random numbers."""
    sizes = [x[:1].numel()]
    leaves = [m for m in model.modules() if not any(m.children())]
    handles = [m.register_forward_hook(lambda m, i, o: sizes.append(getattr(o, "numel", int)())) for m in leaves]
    before = torch.get_rng_state()
    try:
        with torch.no_grad():
            out = functional_call(model, values, (x[:1],))
    finally:
        for handle in handles:
            handle.remove()
        drawn = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
    if drawn:
        raise ValueError("model must be deterministic, got one that draws random numbers (dropout active?)")
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 1:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"model must map (n, ...) to outputs (n, K), got {shape} for one sample")
    if not out.is_floating_point():
        raise TypeError(f"model must have floating-point outputs, got {out.dtype}")
    return Probe(out.shape[1], sum(sizes), max(sizes))


def sample_bytes(method: str, cost: Probe, parameters: int, itemsize: int) -> int:
    """Estimate of the peak bytes a sample: its Jacobian, the graph, and the gradients in flight."""
    graph = 3 * cost.activations
    flight = 4 * cost.largest
    if method == "vmap":  # all K cotangents travel at once, and the rows are assembled from parts
        return itemsize * (cost.outputs * (2 * parameters + flight) + graph)
    return itemsize * (cost.outputs * parameters + flight + graph)


def _flat(parts: Iterable[Tensor], lead: int) -> Tensor:
    return torch.cat([part.flatten(lead) for part in parts], dim=lead)


def vmapped(model: nn.Module, names: list[str], values: dict[str, Tensor]) -> Chunk:
    """``vmap`` over samples of ``jacrev`` over the subset alone; the rest is closed over."""
    subset = {name: values[name] for name in names}
    frozen = {name: value for name, value in values.items() if name not in subset}

    def single(inner: dict[str, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
        out = functional_call(model, {**frozen, **inner}, (sample[None],))[0]
        return out, out

    both = vmap(jacrev(single, has_aux=True), in_dims=(None, 0))

    def chunk(x: Tensor) -> tuple[Tensor, Tensor]:
        jac, out = both(subset, x)
        return out.detach(), _flat((jac[name].flatten(2) for name in names), 2).detach()

    return chunk


def looped(model: nn.Module, names: list[str], values: dict[str, Tensor]) -> Chunk:
    """Batches of one and ``K`` calls of ``autograd.grad`` each, as the official code does it."""
    leaves = {name: values[name].clone().requires_grad_() for name in names}

    def row(out: Tensor, k: int) -> Tensor:
        more = k + 1 < out.shape[1]
        wanted = list(leaves.values())
        grads = torch.autograd.grad(out[0, k], wanted, retain_graph=more, allow_unused=True, materialize_grads=True)
        return _flat(grads, 0)

    @torch.enable_grad()
    def chunk(x: Tensor) -> tuple[Tensor, Tensor]:
        outs, rows = [], []
        for i in range(len(x)):
            out = functional_call(model, {**values, **leaves}, (x[i : i + 1],))
            rows.append(torch.stack([row(out, k) for k in range(out.shape[1])]))
            outs.append(out[0].detach())
        return torch.stack(outs), torch.stack(rows)

    return chunk


KERNELS = {"vmap": vmapped, "norm_affine": norm_affine, "loop": looped}


def choose(model: nn.Module, names: list[str], method: str) -> str:
    """``"norm_affine"`` where it applies, ``"vmap"`` elsewhere; a method asked for by name is kept."""
    check_choice("method", method, METHODS)
    if method != "auto":
        return method
    try:
        plan(model, names)
    except ValueError:
        return "vmap"
    return "norm_affine"


def pairs(
    model: nn.Module,
    params: Iterable[str],
    x: Tensor,
    *,
    method: str = "auto",
    chunk_size: int | str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    point: dict[str, Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs ``(n, K)`` and Jacobians ``(n, K, P)`` chunk by chunk; ``point`` overrides parameters by name."""
    check_model(model)
    names = resolve(model, params)
    check_inputs(x)
    chosen = choose(model, names, method)
    if chunk_size != "auto" and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be 'auto' or an integer >= 1, got {chunk_size!r}")
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 1:
        raise ValueError(f"memory_budget must be an integer number of bytes >= 1, got {memory_budget!r}")
    values = {name: p.detach() for name, p in model.named_parameters()} | (point or {})
    cost = probe(model, values, x)
    kernel = KERNELS[chosen](model, names, values)
    if chunk_size == "auto":
        parameters, itemsize = sum(values[name].numel() for name in names), values[names[0]].element_size()
        chunk_size = max(1, memory_budget // sample_bytes(chosen, cost, parameters, itemsize))
    return _run(kernel, chosen, method, x, chunk_size, (model, names, values))


def _run(kernel: Chunk, chosen: str, method: str, x: Tensor, size: int, parts: tuple) -> Iterator[tuple]:
    for part in x.split(size):
        try:
            out, jac = kernel(part)
        except ValueError:
            if method != "auto" or chosen != "norm_affine":
                raise
            kernel = vmapped(*parts)  # a layer whose rows are not samples
            out, jac = kernel(part)
        if not torch.isfinite(jac).all() or not torch.isfinite(out).all():
            raise ValueError("Jacobian must be finite, got NaN or infinity")
        yield out, jac


def iter_jacobian(
    model: nn.Module,
    params: str | Iterable[str],
    x: Tensor,
    *,
    method: str = "auto",
    chunk_size: int | str = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> Iterator[Tensor]:
    """Per-sample Jacobians chunk by chunk, so that the whole never has to fit in memory.

    Args:
        model: in eval mode, maps ``(n, ...)`` to ``(n, K)``.
        params: names of parameters, or a subset for :func:`peft_parameters`.
        x: inputs ``(N, ...)``, ``N`` >= 1.
        method: see :func:`per_sample_jacobian`.
        chunk_size: samples at once, or ``"auto"``.
        memory_budget: bytes that ``"auto"`` may use, >= 1.

    Returns:
        An iterator over tensors ``(n, K, P)``; input is checked at once, not at the first chunk.

    Raises:
        TypeError: ``x`` or a parameter of a wrong type.
        ValueError: see :func:`per_sample_jacobian`.

    Reference: li2023fastntk

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).eval()
    >>> [tuple(j.shape) for j in iter_jacobian(model, "norm", torch.zeros(5, 4), chunk_size=2)]
    [(2, 3, 6), (2, 3, 6), (1, 3, 6)]
    """
    found = pairs(model, params, x, method=method, chunk_size=chunk_size, memory_budget=memory_budget)
    return (jac for _, jac in found)


def per_sample_jacobian(
    model: nn.Module,
    params: str | Iterable[str],
    x: Tensor,
    *,
    method: str = "auto",
    chunk_size: int | str = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    r"""Jacobian of every output of every sample, ``J[i, k] = d f_k(x_i) / d params``.

    The columns follow ``params``, each parameter flattened. The model's parameters, buffers, mode, ``requires_grad``
    flags and the global random state stay as they are.

    Args:
        model: in eval mode, maps ``(n, ...)`` to ``(n, K)`` without mixing samples.
        params: names of parameters, or a subset for :func:`peft_parameters`.
        x: inputs ``(N, ...)``, ``N`` >= 1.
        method: ``"vmap"`` (any subset), ``"norm_affine"`` (affine parameters of norm layers and the head only: one
            forward and ``K`` backward passes), ``"loop"`` (one sample and one output at a time), or ``"auto"``
            (``"norm_affine"`` where it applies, else ``"vmap"``).
        chunk_size: samples at once; ``"auto"`` takes as many as fit ``memory_budget``.
        memory_budget: bytes for the Jacobian of a chunk, the graph and the gradients in flight; an estimate.

    Returns:
        ``(N, K, P)`` in the model's dtype.

    Raises:
        TypeError: ``model``, ``x`` or a parameter of a wrong type.
        ValueError: a module in train mode, batch norm without running statistics, active dropout, an empty or unknown
            subset, outputs that are not ``(n, K)``, ``"norm_affine"`` with other parameters, a Jacobian that is not
            finite, or an option out of range.

    Reference: li2023fastntk

    >>> model = nn.Linear(2, 3).eval()
    >>> per_sample_jacobian(model, ["bias"], torch.ones(4, 2))[0]
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    return torch.cat(
        list(iter_jacobian(model, params, x, method=method, chunk_size=chunk_size, memory_budget=memory_budget))
    )
