"""Per-sample Jacobians over a subset of the parameters, in chunks that respect a memory budget; and their kernel."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from effnb.common import check_choice, kind, near

__all__ = ["empirical_ntk", "iter_jacobian", "peft_parameters", "per_sample_jacobian"]

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
MEMORY_BUDGET = 2**26


def head_of(model: nn.Module) -> nn.Linear:
    """Return the classifier head: the last linear layer in the order of registration."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError("model must have a linear layer to have a head, got none")
    return linear[-1]


def _owned(model: nn.Module, kinds: tuple[type, ...]) -> set[int]:
    """Return the ids of the parameters of all modules of some kinds."""
    return {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}


SUBSETS: dict[str, Callable[[nn.Module], set[int]]] = {
    "bn": lambda model: _owned(model, BATCH_NORMS),
    "norm": lambda model: _owned(model, NORMS),
    "head": lambda model: {id(p) for p in head_of(model).parameters()},
    "prompt": lambda model: {id(p) for n, p in model.named_parameters() if n.split(".")[-1].startswith("prompt")},
    "all": lambda model: {id(p) for p in model.parameters()},
}


def peft_parameters(model: nn.Module, which: str | Callable[..., bool] = "bn+head") -> list[str]:
    """Return the names of a parameter-efficient subset, in the order of ``model.named_parameters()``; at least one.

    Args:
        model: any module.
        which: ``"bn"`` (affine parameters of batch norms), ``"norm"`` (of batch, layer, group, instance and RMS
            norms), ``"head"`` (the last linear layer), ``"prompt"`` (parameters whose own name starts with
            ``prompt``), ``"all"``, several of them joined by ``+`` such as ``"bn+head"``, or a predicate
            ``which(name)`` or ``which(name, parameter)``.

    Raises:
        TypeError: ``which`` is neither a string nor callable.
        ValueError: an unknown subset, or one that is empty for this model.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    >>> peft_parameters(model, "bn+head")
    ['1.weight', '1.bias', '2.weight', '2.bias']
    """
    named = list(model.named_parameters())
    if callable(which):
        required = [q for q in inspect.signature(which).parameters.values() if q.default is q.empty]
        names = [name for name, p in named if (which(name) if len(required) == 1 else which(name, p))]
    elif isinstance(which, str):
        parts = which.split("+")
        if any(part not in SUBSETS for part in parts):
            raise ValueError(f"which must be one of {', '.join(SUBSETS)}, joined by +, got {which!r}")
        chosen = {part: SUBSETS[part](model) for part in parts}
        if empty := [part for part, ids in chosen.items() if not ids]:
            raise ValueError(f"which must select parameters of the model, got none for {empty[0]!r}")
        names = [name for name, p in named if id(p) in set().union(*chosen.values())]
    else:
        raise TypeError(f"which must be a string or a predicate, got {kind(which)}")
    if not names:
        raise ValueError(f"which must select at least one parameter, got none for {which!r}")
    return names


def resolve(model: nn.Module, params: str | Callable[..., bool] | Iterable[str]) -> list[str]:
    """Return checked names from a list of names or anything that :func:`peft_parameters` takes."""
    known = dict(model.named_parameters())
    names = peft_parameters(model, params) if isinstance(params, str) or callable(params) else list(params)
    if not names:
        raise ValueError("params must name at least one parameter, got none")
    for name in names:
        if name not in known:
            hint = near(str(name), list(known))
            raise ValueError(f"params must be names of model.named_parameters(), got {name!r}; {hint}")
    if len(set(names)) < len(names):
        raise ValueError(f"params must be distinct, got {names}")
    dtypes = {known[name].dtype for name in names}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise TypeError(f"params must be real floating-point parameters of one dtype, got {sorted(map(str, dtypes))}")
    return names


def flatten(values: Mapping[str, Tensor], names: list[str], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the named tensors as one detached vector ``(P,)``."""
    return torch.cat([values[name].detach().reshape(-1).to(dtype) for name in names])


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is finite, in eval mode throughout, and no layer mixes the samples of a batch."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {kind(model)}")
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            raise ValueError(f"model must have running statistics in its batch norms, {name!r} has none")
        if module.training:
            dropout = isinstance(module, nn.modules.dropout._DropoutNd)
            found = "active dropout" if dropout else "a module in train mode"
            raise ValueError(f"model must be in eval mode (call model.eval()), got {found}: {name or 'the model'!r}")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"model must be finite, got NaN or infinity in {name!r}")


def check_options(method: str, chunk_size: int | str, memory_budget: int) -> None:
    """Raise unless the options of a Jacobian are in range."""
    check_choice("method", method, METHODS)
    sizes = {"memory_budget": memory_budget} | ({} if chunk_size == "auto" else {"chunk_size": chunk_size})
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            what = "'auto' or an integer" if name == "chunk_size" else "an integer number of bytes"
            raise ValueError(f"{name} must be {what} >= 1, got {value!r}")


def probe(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> tuple[int, int, int]:
    """Return what one sample costs: outputs, and values that all layers together and the largest one return.

    Raises if the output is not ``(1, K)`` or the model draws random numbers.
    """
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
        # Functional dropout shows in no module's flag, but it moves the stream.
        drawn = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
    if drawn:
        raise ValueError("model must be deterministic, got one that draws random numbers (dropout active?)")
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 1:
        raise ValueError(f"model must map (n, ...) to outputs (n, K), got {kind(out)} for one sample")
    if not out.is_floating_point():
        raise TypeError(f"model must have floating-point outputs, got {out.dtype}")
    return out.shape[1], sum(sizes), max(sizes)


def sample_bytes(method: str, cost: tuple[int, int, int], parameters: int, itemsize: int) -> int:
    """Return an estimate of the peak bytes a sample: its Jacobian, the graph, and the gradients in flight."""
    outputs, activations, largest = cost
    if method == "vmap":  # all K cotangents travel at once, and the rows are assembled from parts
        return itemsize * (outputs * (2 * parameters + 4 * largest) + 3 * activations)
    return itemsize * (outputs * parameters + 4 * largest + 3 * activations)


def vmapped(model: nn.Module, names: list[str], values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and Jacobian by ``vmap`` over samples of ``jacrev`` over the subset; the rest is closed over."""
    subset = {name: values[name] for name in names}
    frozen = {name: value for name, value in values.items() if name not in subset}

    def single(inner: dict[str, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
        out = functional_call(model, {**frozen, **inner}, (sample[None],))[0]
        return out, out

    jac, out = vmap(jacrev(single, has_aux=True), in_dims=(None, 0))(subset, x)
    return out.detach(), torch.cat([jac[name].reshape(*out.shape, -1) for name in names], 2).detach()


@torch.enable_grad()
def looped(model: nn.Module, names: list[str], values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and Jacobian the official way: batches of one and ``K`` calls of ``autograd.grad`` each."""
    leaves, outs, jac = {name: values[name].clone().requires_grad_() for name in names}, [], []
    for sample in x.split(1):
        out = functional_call(model, {**values, **leaves}, (sample,))[0]
        for each in out:
            grads = torch.autograd.grad(each, list(leaves.values()), retain_graph=True, materialize_grads=True)
            jac.append(torch.cat([grad.flatten() for grad in grads]))
        outs.append(out.detach())
    return torch.stack(outs), torch.stack(jac).view(len(x), len(out), -1)


def plan(model: nn.Module, names: list[str]) -> list[tuple[nn.Module, slice | None, slice | None]]:
    """Return the layers behind ``names`` with the Jacobian's columns of weight and bias, None where not wanted.

    Raises where a name is neither a norm's affine parameter nor the head's.
    """
    columns, start, known = {}, 0, dict(model.named_parameters())
    for name in names:
        columns[name] = slice(start, start := start + known[name].numel())
    head = head_of(model) if any(isinstance(m, nn.Linear) for m in model.modules()) else None
    layers, seen = [], set()
    for prefix, module in model.named_modules():
        # A subclass with a forward of its own (timm's BatchNormAct2d) does not compute what its base class does.
        own = type(module).forward.__module__.startswith("torch.nn.") and "forward" not in vars(module)
        if own and (isinstance(module, NORMS) or module is head):
            keys = [f"{prefix}.{part}" if prefix else part for part in ("weight", "bias")]
            if any(key in columns for key in keys):
                layers.append((module, *map(columns.get, keys)))
                seen.update(keys)
    if other := [name for name in names if name not in seen]:
        raise ValueError(f"norm_affine needs parameters of torch's norm layers and the head only, got {other[0]!r}")
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if tied := [name for name in names if owners.count(id(known[name])) > 1]:
        raise ValueError(f"norm_affine needs parameters that no other layer shares, got {tied[0]!r}")
    return layers


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a norm layer, or a linear one, multiplies by its weight."""
    if isinstance(module, nn.Linear):
        return x
    if isinstance(module, INSTANCE_NORMS):
        own = not module.track_running_stats  # without running statistics it takes each sample's own, in eval mode too
        return F.instance_norm(x, module.running_mean, module.running_var, use_input_stats=own, eps=module.eps)
    if isinstance(module, BATCH_NORMS):
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    return F.layer_norm(x, module.normalized_shape, eps=module.eps)


def _per_sample(module: nn.Module, values: Tensor) -> Tensor:
    """Return the sum over everything but samples and the layer's own axes, flat: ``(n, channels)``."""
    last = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    axes = range(1, values.ndim - len(module.normalized_shape)) if last else range(2, values.ndim)
    # Without axes, `sum` would take all of them.
    return (values.sum(tuple(axes)) if axes else values).flatten(1)


@torch.enable_grad()
def norm_affine(model: nn.Module, names: list[str], values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return both by the fast path for norms and head: one forward, ``K`` backward passes, no graph for each sample.

    In eval mode samples do not interact, so the gradient of ``outputs[:, k].sum()`` at a layer's output holds each
    sample's own gradient; a product with the normalised input turns it into the row of that sample.
    """
    records: list[tuple[nn.Module, tuple, Tensor | None, Tensor]] = []

    def record(columns: tuple, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        factor = normalised(module, args[0].detach()) if columns[0] else None
        out = out if out.requires_grad else out.detach().requires_grad_()
        records.append((module, columns, factor, out))
        return out.clone()  # the network may go on in place (ReLU(inplace=True), out += shortcut)

    # In front of the user's own hooks: they may change what the layer returns.
    layers = plan(model, names)
    handles = [m.register_forward_hook(partial(record, columns), prepend=True) for m, *columns in layers]
    try:
        out = functional_call(model, values, (x,))
    finally:
        for handle in handles:
            handle.remove()
    for module, *_, recorded in records:
        if len(recorded) != len(x) or (isinstance(module, nn.Linear) and recorded.ndim != 2):
            raise ValueError(f"norm_affine needs layers that see one row a sample, got {kind(recorded)}")
    targets, size = [recorded for *_, recorded in records], sum(values[name].numel() for name in names)
    jac = torch.zeros(len(x), out.shape[1], size, dtype=out.dtype, device=out.device)
    for k in range(out.shape[1]):
        more = k + 1 < out.shape[1]
        grads = torch.autograd.grad(out[:, k].sum(), targets, retain_graph=more, allow_unused=True)
        for (module, (weight, bias), factor, _), grad in zip(records, grads, strict=True):
            if grad is None:
                continue
            # `+=`: a layer that the network calls twice has two records.
            if weight and isinstance(module, nn.Linear):
                jac[:, k, weight] += (grad.unsqueeze(2) * factor.unsqueeze(1)).flatten(1)
            elif weight:
                jac[:, k, weight] += _per_sample(module, grad * factor)
            if bias:
                jac[:, k, bias] += _per_sample(module, grad)
    return out.detach(), jac


KERNELS = {"vmap": vmapped, "norm_affine": norm_affine, "loop": looped}
METHODS = ("auto", *KERNELS)


def choose(model: nn.Module, names: list[str], method: str) -> str:
    """Return ``"norm_affine"`` where it applies, ``"vmap"`` elsewhere; a method asked for by name is kept."""
    if method in ("vmap", "loop"):
        return method
    try:
        plan(model, names)
    except ValueError:
        if method == "norm_affine":
            raise
        return "vmap"
    return "norm_affine"


def pairs(
    model, params, x, *, method="auto", chunk_size="auto", memory_budget=MEMORY_BUDGET, point=None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return what :func:`iter_jacobian` does with the outputs ``(n, K)`` before each chunk, checked at once.

    ``point`` overrides parameters by name.
    """
    check_model(model)
    names = resolve(model, params)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {kind(x)}")
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"x must hold at least one sample, got {kind(x)}")
    check_options(method, chunk_size, memory_budget)
    # Detached, and put in by functional_call: the model's own flags and gradients play no part and stay as they are.
    values = {name: p.detach() for name, p in model.named_parameters()} | (point or {})
    cost = probe(model, values, x)
    chosen = choose(model, names, method)
    if chunk_size == "auto":
        parameters, itemsize = sum(values[name].numel() for name in names), values[names[0]].element_size()
        chunk_size = max(1, memory_budget // sample_bytes(chosen, cost, parameters, itemsize))

    def chunks(kernel: str) -> Iterator[tuple[Tensor, Tensor]]:
        for part in x.split(chunk_size):
            try:
                out, jac = KERNELS[kernel](model, names, values, part)
            except ValueError:
                if method != "auto" or kernel != "norm_affine":
                    raise
                kernel = "vmap"  # a layer whose rows are not samples shows only in the forward
                out, jac = vmapped(model, names, values, part)
            if not torch.isfinite(jac).all() or not torch.isfinite(out).all():
                raise ValueError("Jacobian must be finite, got NaN or infinity")
            yield out, jac

    return chunks(chosen)


def iter_jacobian(
    model: nn.Module,
    params: str | Iterable[str],
    x: Tensor,
    *,
    method: str = "auto",
    chunk_size: int | str = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> Iterator[Tensor]:
    """Return an iterator over chunks ``(n, K, P)`` of :func:`per_sample_jacobian`, which need not fit in memory.

    Args:
        model, params, x, method, chunk_size, memory_budget: see :func:`per_sample_jacobian`, also for the errors; they
            come at once, not at the first chunk.

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
    r"""Return the Jacobian of every output of every sample, ``J[i, k] = d f_k(x_i) / d params``, ``(N, K, P)``.

    The columns follow ``params``, each parameter flattened. The model's parameters, buffers, mode, ``requires_grad``
    flags and the global random state stay as they are.

    Args:
        model: in eval mode, maps ``(n, ...)`` to ``(n, K)`` without mixing samples.
        params: names of parameters, or a subset for :func:`peft_parameters`.
        x: inputs ``(N, ...)``, ``N`` >= 1.
        method: ``"vmap"`` (any subset), ``"norm_affine"`` (affine parameters of torch's own norm layers and the head
            only: one forward and ``K`` backward passes), ``"loop"`` (one sample and one output at a time), or
            ``"auto"`` (``"norm_affine"`` where it applies, else ``"vmap"``).
        chunk_size: samples at once; ``"auto"`` takes as many as fit ``memory_budget``.
        memory_budget: bytes for the Jacobian of a chunk, the graph and the gradients in flight; an estimate.

    Raises:
        TypeError: ``model``, ``x`` or a parameter of a wrong type.
        ValueError: a module in train mode, batch norm without running statistics, active dropout, an empty or unknown
            subset, outputs not ``(n, K)``, ``"norm_affine"`` with other parameters, a Jacobian that is not finite, or
            an option out of range.

    >>> model = nn.Linear(2, 3).eval()
    >>> per_sample_jacobian(model, ["bias"], torch.ones(4, 2))[0]
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    options = {"method": method, "chunk_size": chunk_size, "memory_budget": memory_budget}
    return torch.cat(list(iter_jacobian(model, params, x, **options)))


def empirical_ntk(
    model: nn.Module,
    params: str | Iterable[str],
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    trace: bool = False,
    method: str = "auto",
    chunk_size: int | str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Return the kernel blocks :math:`\Theta_{ij} = J(x_i) J(x_j)^\top`, ``(N1, N2, K, K)``.

    ``theta.transpose(1, 2).reshape(N1 * K, N2 * K)`` is the Gram matrix of the Jacobian's rows.

    Args:
        model, params, method, chunk_size, memory_budget: see :func:`per_sample_jacobian`, also for the errors.
        x1, x2: inputs ``(N1, ...)`` and ``(N2, ...)``; the same ones if ``x2`` is not given.
        trace: return the trace of each block instead of the block, ``(N1, N2)``.
        dtype: of the products; float32 Jacobians are cast before they are multiplied.

    Reference: jacot2018neural, novak2022fast

    >>> empirical_ntk(nn.Linear(2, 1).eval(), "all", torch.tensor([[1.0, 2.0]])).flatten()  # |x|^2 + 1
    tensor([6.], dtype=torch.float64)
    """
    options = {"method": method, "chunk_size": chunk_size, "memory_budget": memory_budget}
    second = torch.cat([jac.to(dtype) for jac in iter_jacobian(model, params, x1 if x2 is None else x2, **options)])
    # The first side is never whole in memory, unless it is the second one.
    first = [second] if x2 is None else (jac.to(dtype) for jac in iter_jacobian(model, params, x1, **options))
    if trace:
        return torch.cat([jac.flatten(1) @ second.flatten(1).T for jac in first])
    outputs = second.shape[1]
    grams = [jac.flatten(0, 1) @ second.flatten(0, 1).T for jac in first]
    return torch.cat(grams).view(-1, outputs, len(second), outputs).transpose(1, 2).contiguous()
