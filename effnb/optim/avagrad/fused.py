"""The kernel of the fused path: one compiled pass that updates everything and sums the next step's squared rates."""

import functools
import types
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = list[Tensor]
DTYPES = (torch.float32, torch.float64)
_compiled: dict[tuple, Callable] = {}
_ready: set[tuple] = set()
_unavailable: str | None = None


def can_compile() -> bool:
    """Whether no compilation has failed in this process yet."""
    return _unavailable is None


def check_fusable(params: Tensors) -> None:
    """Raise ValueError unless every tensor is float32 or float64 (or complex of these), on one device, one dtype."""
    real = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    for p, r in zip(params, real, strict=True):
        if r.dtype not in DTYPES:
            raise ValueError(f"fused=True needs float32 or float64 parameters, got {p.dtype}")
    if len({(r.dtype, r.device) for r in real}) > 1:
        found = sorted({str(p.dtype) for p in params})
        raise ValueError(f"fused=True needs one dtype and device per group, got {found}")


def _kernel(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    table: Tensor,
    hyper: Tensor,
    coupled: bool,
    norm: str | None,
) -> Tensor:
    """Update everything in place; returns the sums of squared rates of the next step, one per tensor.

    Numbers come in tensors, ``table`` (tensors, 4) and ``hyper`` (6,): constants would be compiled in.
    """
    keep1, beta2, eps, decay, sign, untouched = hyper.unbind()
    sums = []
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        v_scale, next_v_scale, factor, shrink = table[i].unbind()
        g = g * sign + p * decay if coupled else g * sign
        mean = m + (g - m) * keep1
        before = v.sqrt()
        eta = 1 / (before * v_scale + eps)
        used = torch.where(v == 0, untouched, eta) if norm is None else eta
        p.copy_(p * shrink + mean * used * factor)
        m.copy_(mean)
        after = v * beta2 + (1 - beta2) * g * g
        v.copy_(after)
        rate = 1 / ((before if norm == "lagged" else after.sqrt()) * next_v_scale + eps)
        sums.append((rate * rate).sum())
    return torch.stack(sums)


def compiled_kernel(key: tuple) -> Callable:
    """Return a compiled kernel of its own for each list of shapes; torch.compile itself guards the strides.

    torch.compile counts recompilations per code object and gives up after a few, hence the copy of the code.
    """
    if key not in _compiled:
        code = _kernel.__code__.replace(co_name=f"avagrad_kernel_{len(_compiled)}")
        function = types.FunctionType(code, _kernel.__globals__, code.co_name)
        _compiled[key] = torch.compile(function, fullgraph=True, dynamic=False)
    return _compiled[key]


@functools.lru_cache(maxsize=64)
def _hyper_tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What rarely changes between steps, made once."""
    return torch.tensor(values, dtype=dtype, device=device)


def fused_update(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    rows: Sequence[tuple],
    hyper: tuple[float, ...],
    coupled: bool,
    norm: str | None,
) -> Tensor | None:
    """Run the compiled kernel; returns ``None`` where nothing can be compiled, with nothing changed.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: real tensors of one dtype on one device.
        rows: per tensor the scale of the root of v now and at the next step, -lr gamma / bias correction, and the
            decoupled shrinkage; floats or 0-d tensors.
        hyper: 1 - beta1, beta2, eps, the L2 penalty, the sign of the gradient, and the rate of an entry without a
            second moment under ``norm=None``.
        coupled: whether the penalty enters the gradient.
        norm: ``"lagged"`` makes the sums those of the official code.
    """
    global _unavailable
    dtype, device = params[0].dtype, params[0].device
    key = tuple([p.shape for p in params]), dtype, device, coupled, norm
    if any(isinstance(x, Tensor) for x in rows[0]):
        entries = [torch.as_tensor(x, dtype=dtype, device=device) for row in rows for x in row]
        table = torch.stack(entries).view(-1, len(rows[0]))
    else:
        table = torch.tensor(rows, dtype=dtype, device=device)
    kernel = compiled_kernel(key)
    try:
        sums = kernel(params, grads, exp_avgs, exp_avg_sqs, table, _hyper_tensor(hyper, dtype, device), coupled, norm)
    except Exception as error:
        if key in _ready:  # it ran before: this is no failure to compile
            raise
        _unavailable = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        warnings.warn(f"fused=True falls back to foreach, torch.compile failed ({_unavailable})", stacklevel=4)
        return None
    _ready.add(key)
    return sums
