"""One forward and backward pass a batch on a network that stays as it was."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .bucket import Bucket
from .moments import GradientMoments

LAYERS = (nn.Conv2d, nn.Linear)
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def gradient_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Loss = F.cross_entropy,
    *,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    init: str | None = None,
    generator: Generator | None = None,
    seed: int | None = None,
    absolute: bool = False,
    accumulate: bool = False,
) -> Iterator[GradientMoments]:
    """Yield the moments of the weights' gradients after each batch: the same object, fuller each time.

    The network runs in training mode (normalisation by the batch), without an update between batches. Parameters,
    buffers, gradients, modes and the global random state are untouched, also after an exception. A gradient is folded
    in, and freed, as soon as the backward pass has made it.

    Args:
        model: network from ``x`` to the input of ``loss_fn``.
        batches: pairs ``(x, y)``, two or more; ``y`` class numbers for the default loss.
        loss_fn: mean loss of a batch.
        layers: classes whose ``weight`` counts, where it is a parameter with ``requires_grad``.
        init: ``"kaiming"`` draws convolution and linear weights anew (biases zero); ``None`` takes them as they are.
        generator: stream for ``init``, on the CPU.
        seed: instead of ``generator``; also seeds what the network draws itself, such as dropout.
        absolute: see `GradientMoments`.
        accumulate: do not clear gradients between batches, as the official code: sample i is the sum of the first i.

    Yields:
        The moments of the batches so far, by name of the layer.

    Raises:
        ValueError: fewer than 2 batches, an empty batch, targets out of range, a loss that is not finite, no counted
            layer that is trained, or none that receives a gradient; ``init`` without ``generator`` or ``seed``.
        TypeError: a batch that is not a pair of tensors.

    Reference: li2023zico.

    >>> model, y = nn.Linear(3, 2), torch.tensor([0, 1])
    >>> [moments.count for moments in gradient_moments(model, [(torch.randn(2, 3), y) for _ in range(3)])]
    [1, 2, 3]
    """
    batches = check_batches(batches)
    leaves, constants = parts(model, layers, init, stream(init, generator, seed))
    moments = GradientMoments(absolute)
    moments.lay_out(leaves)
    inbox = Inbox(moments.buckets, leaves, accumulate)
    state, mode = aliases(model, leaves | constants), TrainingMode(model, seed)
    for x, y in batches:
        with torch.enable_grad(), mode.on():
            inbox.receive(forward_loss(model, state, loss_fn, x, y))
        yield moments


class Inbox:
    """Hands gradients to their bucket as the backward pass makes them, and frees them."""

    def __init__(self, buckets: list[Bucket], leaves: Mapping[str, Tensor], accumulate: bool) -> None:
        self.buckets, self.accumulate, self.leaves = buckets, accumulate, leaves
        self.waiting: list[dict[str, Tensor]] = [{} for _ in buckets]
        for i, bucket in enumerate(buckets):
            for name in bucket.shapes:
                leaves[name].register_post_accumulate_grad_hook(self._hook(i, name))

    def _hook(self, i: int, name: str) -> Callable[[Tensor], None]:
        def arrived(leaf: Tensor) -> None:
            self.waiting[i][name] = leaf.grad
            if not self.accumulate:
                leaf.grad = None
            if len(self.waiting[i]) == len(self.buckets[i].shapes):
                self._empty(i)

        return arrived

    def _empty(self, i: int) -> None:
        bucket, found = self.buckets[i], self.waiting[i]
        # A weight outside the graph has gradient zero; the official code stops there.
        grads = [torch.zeros_like(self.leaves[n]) if n not in found else found[n] for n in bucket.shapes]
        bucket.add(grads, owned=not self.accumulate)
        found.clear()

    def receive(self, loss: Tensor) -> None:
        """Run the backward pass of one batch."""
        count = self.buckets[0].count
        loss.backward(inputs=list(self.leaves.values()))
        if not any(self.waiting) and all(bucket.count == count for bucket in self.buckets):
            raise ValueError("model must have a counted layer that receives a gradient, got none")
        for i, bucket in enumerate(self.buckets):
            if bucket.count == count:
                self._empty(i)


def aliases(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with every name of a shared parameter; finding them out in every pass would take longer."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return dict(state) | {name: state[first[id(parameter)]] for name, parameter in every}


def forward_loss(model: nn.Module, state: dict[str, Tensor], loss_fn: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Return the finite, differentiable loss of one batch."""
    logits = functional_call(model, state, (x,), tie_weights=False)
    # NAS-Bench-201's own networks return (features, logits).
    logits = logits[-1] if isinstance(logits, tuple | list) else logits
    if loss_fn is F.cross_entropy and not y.is_floating_point() and logits.ndim >= 2:
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"targets must be classes in 0..{logits.shape[1] - 1}, got {low}..{high}")
    loss = loss_fn(logits, y)
    if not math.isfinite(loss.item()):
        raise ValueError(f"loss must be finite, got {loss.item()}")
    if not loss.requires_grad:
        raise ValueError("model must have a counted layer that receives a gradient, got none")
    return loss


def check_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Return the batches as a list of two or more pairs of tensors that are not empty."""
    batches = list(batches)
    if len(batches) < 2:
        raise ValueError(f"batches must hold at least 2 batches for a standard deviation, got {len(batches)}")
    for i, batch in enumerate(batches):
        if len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
            raise TypeError(f"batches must be pairs of tensors (x, y), got {type(batch).__name__} as number {i}")
        if not len(batch[0]) or len(batch[0]) != len(batch[1]):
            sizes = [len(part) for part in batch]
            raise ValueError(f"batches must have as many targets as inputs, at least one, got {sizes} in number {i}")
    return batches


def counted_weights(model: nn.Module, layers: tuple[type[nn.Module], ...] = LAYERS) -> dict[str, nn.Parameter]:
    """Return the trained ``weight`` of every counted layer by the layer's name; shared ones once for each layer."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, layers)]
    if not found:
        raise ValueError(f"model must have a layer of {', '.join(t.__name__ for t in layers)}, got none")
    weights = {name: module.weight for name, module in found if isinstance(module.weight, nn.Parameter)}
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not trained:
        raise ValueError("model must have a counted layer whose weight requires a gradient, got only frozen ones")
    return trained


def parts(
    model: nn.Module, layers: tuple[type[nn.Module], ...], init: str | None, generator: Generator | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the counted weights as leaves of their own, and all other parameters and copies of the buffers.

    Leaves share the memory of the weights unless they are drawn anew. A weight of two layers is one leaf.
    """
    counted = {id(weight) for weight in counted_weights(model, layers).values()}
    fresh = kaiming(model, generator) if init else {}
    leaves, constants = {}, {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        value = fresh.get(id(parameter), parameter).detach()
        if id(parameter) in counted:
            leaves[name] = value.requires_grad_()
        else:
            constants[name] = value
    return leaves, constants


def kaiming(model: nn.Module, generator: Generator | None) -> dict[int, Tensor]:
    """Return new values by ``id`` of the parameter, drawn as `effnb.models.small.initialize` draws them."""
    fresh = {}
    for module in model.modules():
        if isinstance(module, LAYERS):
            weight = torch.empty(module.weight.shape, dtype=module.weight.dtype)
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
            fresh[id(module.weight)] = weight.to(module.weight.device)
            if module.bias is not None:
                fresh[id(module.bias)] = torch.zeros_like(module.bias)
    return fresh


def stream(init: str | None, generator: Generator | None, seed: int | None) -> Generator | None:
    """Return the generator to draw weights from."""
    if init not in (None, "kaiming"):
        raise ValueError(f"init must be 'kaiming' or None, got {init!r}")
    if generator is not None and seed is not None:
        raise ValueError("generator and seed exclude each other, got both")
    if init and generator is None and seed is None:
        raise ValueError("init='kaiming' needs a seed or a generator, got neither")
    return torch.Generator().manual_seed(seed) if seed is not None else generator


class TrainingMode:
    """Switches a network to training and back; modules and devices are looked up once for all batches."""

    def __init__(self, model: nn.Module, seed: int | None) -> None:
        self.model, self.seed, self.modules = model, seed, list(model.modules())
        self.devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})

    @contextmanager
    def on(self) -> Iterator[None]:
        """Training mode inside; modes and the global random state as before outside."""
        modes = [module.training for module in self.modules]
        try:
            with torch.random.fork_rng(self.devices):
                # Not `torch.manual_seed`: it would also reseed devices that nobody forked.
                for stream in (torch.default_generator, *(torch.cuda.default_generators[i] for i in self.devices)):
                    if self.seed is not None:
                        stream.manual_seed(self.seed)
                self.model.train()
                yield
        finally:
            for module, mode in zip(self.modules, modes, strict=True):
                vars(module)["training"] = mode
