"""Counted cost: FLOPs (2 for a multiply-add), parameters, stored bytes, activations saved for the backward pass."""

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

# Ops of a few operations an element that carry no tag of torch saying so: allocation, data movement, random
# numbers, normalisation, pooling, losses. Whatever is neither counted, tagged nor listed is reported as unknown.
_LINEAR = re.compile(
    r"^_?(empty|new_|zeros|ones|full|fill|scalar_tensor|arange|eye|lift|detach|set_|resize|to_copy|copy|clone|cat$|stack"
    r"|repeat|roll|flip|index|gather|scatter|select|slice|take|embedding|constant_pad|reflection_pad|replication_pad"
    r"|native_(batch|layer|group)_norm|fused_rms_norm|cudnn_batch_norm|batch_norm|.*softmax|nll_loss|nonzero|masked|unique"
    r"|.*pool|upsample|pixel|channel_shuffle|native_dropout|fused_dropout|bernoulli|normal|uniform|rand|exponential"
    r"|random|local_scalar|foreach_|fused_adam|fused_sgd|im2col|col2im|tril|triu|diag|unfold|efficientzerotensor"
    r"|.*_loss|cum(sum|prod|max|min)|logcumsumexp|weight_norm|assert|is_|equal$|split|narrow|as_strided|unsafe_"
    # Reductions by name: older torch has no tag for them.
    r"|(sum|nansum|mean|prod|var|std|var_mean|std_mean|amax|amin|aminmax|max|min|arg(max|min)|any|all|norm|median"
    r"|logsumexp|linalg_vector_norm|count_nonzero)$)"
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products, convolutions and attention; of hand formulas (``extra``); and their sum.

    ``unknown`` names the ops with more than 1 % of all elements that neither covers.
    """

    matmul_conv: int
    extra: int
    total: int
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Params:
    """Numbers of entries: each tensor once however often it is used, buffers apart; ``total`` leaves buffers out.

    ``nonzeros`` is ``None`` for a model on the meta device, which has no values.
    """

    trainable: int
    frozen: int
    buffers: int
    nonzeros: int | None

    @property
    def total(self) -> int:
        """Trainable and frozen entries."""
        return self.trainable + self.frozen


def count_flops(
    fn: Callable[..., Any], *args: Any, backward: bool = False, extra: Mapping[str, float] | None = None
) -> Flops:
    """FLOPs of ``fn(*args)``, twice the multiply-adds, as torch counts them plus hand formulas.

    torch counts matrix products, convolutions and attention, forward and backward. It counts **0** for
    matrix-vector products (``2 m n``), FFTs (``5 N log2 N`` complex, half of it real), Walsh-Hadamard transforms
    (``N log2 N`` additions), sparse and custom kernels: pass those in ``extra``. Pointwise work, reductions,
    normalisation, pooling and data movement are left out. Gradients, the global random state and the buffers of
    modules among ``fn`` and ``args`` stay as they were.

    Args:
        fn: a module or function; called once.
        args: its arguments.
        backward: also run and count the backward pass to every leaf that requires a gradient.
        extra: hand formulas, FLOPs by name; naming an op as torch does (``"mv"``) silences the warning that it is
            ``unknown``.

    Raises:
        ValueError: a negative ``extra``, or ``backward`` without an output that requires a gradient.

    >>> count_flops(nn.Linear(3, 5), torch.zeros(2, 3)).total
    60
    """
    extra = dict(extra or {})
    if any(not value >= 0 for value in extra.values()):
        raise ValueError(f"extra must hold FLOPs >= 0, got {extra}")
    counter, watcher = FlopCounterMode(display=False), _Elements()
    with _untouched(fn, *args), watcher, counter:
        out = fn(*args)
        if backward:
            outputs = [t for t in _tensors(out) if t.requires_grad]
            if not outputs:
                raise ValueError("backward=True needs an output of fn that requires a gradient, got none")
            before = [(leaf, leaf.grad) for leaf in _leaves(out)]
            try:
                for leaf, _ in before:
                    leaf.grad = None  # the counter's module hooks bar autograd.grad, so put .grad aside instead
                torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
            finally:
                for leaf, gradient in before:
                    leaf.grad = gradient
    unknown = tuple(sorted(set(watcher.unknown()) - set(extra)))
    if unknown:
        text = f"no FLOPs counted for {', '.join(unknown)}: pass extra={{'{unknown[0]}': ...}} with a hand formula"
        warnings.warn(text, stacklevel=2)
    counted, by_hand = int(counter.get_total_flops()), round(sum(extra.values()))
    return Flops(counted, by_hand, counted + by_hand, unknown)


def count_params(model: nn.Module) -> Params:
    """Entries of the parameters and buffers of ``model``; tied and shared tensors count once.

    >>> count_params(nn.Linear(3, 2))
    Params(trainable=8, frozen=0, buffers=0, nonzeros=8)
    """
    unique = {_key(p): p for p in model.parameters()}
    trainable = sum(p.numel() for p in unique.values() if p.requires_grad)
    frozen = sum(p.numel() for p in unique.values() if not p.requires_grad)
    buffers = sum(b.numel() for b in {_key(b): b for b in model.buffers()}.values())
    valued = not any(p.is_meta for p in unique.values())
    nonzeros = sum(int(p.detach().count_nonzero()) for p in unique.values()) if valued else None
    return Params(trainable, frozen, buffers, nonzeros)


def stored_bytes(source: str | Path | nn.Module | Mapping[str, Any]) -> int:
    """Bytes on disk: of a file, of all files in a folder, or of what ``torch.save`` makes of a ``state_dict``.

    It is the real size, with index, scales, packing and container; a view is stored with all of its storage.

    Raises:
        ValueError: the path does not exist.
        TypeError: ``source`` is no path, module (whose ``state_dict`` is taken) or ``state_dict``.

    >>> 4000 < stored_bytes({"w": torch.zeros(1000)}) < 6000
    True
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            raise ValueError(f"source must be an existing path, got {path}")
        return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    if not isinstance(source, nn.Module | Mapping):
        raise TypeError(f"source must be a path, a module or a state_dict, got {type(source).__name__}")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(source.state_dict() if isinstance(source, nn.Module) else source, path := Path(folder, "state.pt"))
        return path.stat().st_size


def saved_activation_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes that autograd keeps for the backward pass of ``fn(*args)``: unique storages, parameters left out.

    Left out are the storages of every trainable ``nn.Parameter`` in the graph and of all parameters and buffers of
    modules among ``fn`` and ``args``: hand a model with frozen weights over as an argument. The input counts if it
    is kept. ``fn`` is called once, with gradients on; the global random state and the modules' buffers stay as they
    were.

    >>> saved_activation_bytes(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(2, 4))
    64
    """
    kept: list[Tensor] = []  # holding them keeps freed memory from being counted under a new owner's address

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    with _untouched(fn, *args), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn(*args)
    owned = [leaf for leaf in _leaves(out) if isinstance(leaf, nn.Parameter)]
    for module in (m for m in (fn, *args) if isinstance(m, nn.Module)):
        owned += [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for tensor in owned:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


class _Elements(TorchDispatchMode):
    """Counts, op by op, the elements read and written, under the FLOP counter and so after its decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements[func] += sum(t.numel() for t in _tensors((args, kwargs, out)))
        return out

    def unknown(self) -> list[str]:
        """Names of the ops with more than 1 % of the elements that are neither counted nor a few operations each."""
        floor, found = 0.01 * sum(self.elements.values()), []
        for op in (op for op, count in self.elements.items() if count > floor):
            packet = op.overloadpacket
            named = op.namespace in ("aten", "prim", "prims") and _LINEAR.match(packet.__name__)
            if not (packet in flop_registry or op.is_view or torch.Tag.pointwise in op.tags or named):
                found.append(op.name().partition(".")[0].removeprefix("aten::"))
        return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _leaves(out: Any) -> list[Tensor]:
    """The leaf tensors that the graph behind ``out`` accumulates into."""
    nodes = list({t.grad_fn for t in _tensors(out) if t.grad_fn is not None})
    seen = set(nodes)
    for node in nodes:  # grows while it is walked
        fresh = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= fresh
        nodes += fresh
    return [node.variable for node in nodes if hasattr(node, "variable")]


@contextmanager
def _untouched(*candidates: Any) -> Iterator[None]:
    """Restore the global random state, and the buffers of modules, whatever the call does to them."""
    modules = [c for c in candidates if isinstance(c, nn.Module)]
    buffers = [(b, b.clone()) for module in modules for b in module.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _key(tensor: Tensor) -> Any:
    """Same memory and size, same tensor; an empty or meta tensor has no address and counts by itself."""
    address = 0 if tensor.is_meta else tensor.data_ptr()
    return (address, tensor.numel()) if address else id(tensor)
