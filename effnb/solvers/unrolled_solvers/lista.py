"""The trained networks: LISTA, LISTA-CP and -CPSS, TiLISTA, ALISTA, and their training layer by layer."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from effnb.common import check_count, check_number
from effnb.solvers.unrolled_solvers.classic import select_unchecked, soft_unchecked
from effnb.solvers.unrolled_solvers.problem import analytic_weights, check_matrix, check_weights, unit_dictionary

SCHEDULE = (0.012, 0.13)  # of n: growth per layer and ceiling of the entries that pass unchanged (noiseless default)
STAGES = ((100, 1.0), (40, 0.2), (20, 0.02))  # steps and factor on lr; the papers' stages end by patience instead
Sampler = Callable[[int], tuple[Tensor, Tensor]]


def _copies(value: Tensor, count: int) -> nn.ParameterList:
    """Return ``count`` learnable copies of a tensor."""
    return nn.ParameterList([nn.Parameter(value.clone()) for _ in range(count)])


class Unrolled(nn.Module):
    """Shared frame of the networks: the dictionary, thresholds, input checks and the loop over layers.

    Every parameter lives in a ``ParameterList`` of one entry per layer, or of a single entry if layers share it.
    """

    def __init__(self, A: Tensor, layers: int, lam: float, select: tuple[float, float] | None, normalize: bool):
        super().__init__()
        check_count("layers", layers)
        check_number("lam", lam, ge=0)
        A, norms = unit_dictionary(A, normalize)
        self.register_buffer("A", A)
        self.register_buffer("column_norms", norms)
        self.layers, self.normalize = layers, normalize
        self.lipschitz = float(torch.linalg.matrix_norm(A, 2)) ** 2
        self.theta = _copies(A.new_tensor(lam / self.lipschitz), layers)
        self.counts = [0] * layers
        if select is not None:
            growth, ceiling = select
            check_number("select[0]", growth, ge=0)
            check_number("select[1]", ceiling, ge=0, le=1)
            n = A.shape[1]  # 0.29 * 100 is 28.999999999999996: the margin keeps the whole number
            self.counts = [math.floor(min(growth * (k + 1), ceiling) * n + 1e-9) for k in range(layers)]

    def _shrink(self, k: int, z: Tensor) -> Tensor:
        """Apply layer ``k``'s threshold and support selection."""
        theta = self.theta[k].clamp_min(0)  # the official code does not clamp where it selects a support
        return select_unchecked(z, theta, self.counts[k]) if self.counts[k] else soft_unchecked(z, theta)

    def _prepare(self, b: Tensor) -> Tensor:
        """Return what every layer needs of the measurements."""
        return b

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        """Return the estimate after layer ``k``, from the one before and what ``_prepare`` returned."""
        raise NotImplementedError

    def layer_parameters(self, k: int) -> list[nn.Parameter]:
        """Return the parameters that layer ``k`` uses, shared ones included."""
        # By the lists and not by name, so that a network only declares its parameters; a readout is none of them.
        lists = [part for part in self.children() if isinstance(part, nn.ParameterList)]
        return [part[min(k, len(part) - 1)] for part in lists]

    @torch.no_grad()
    def warm_start(self, k: int) -> None:
        """Copy the parameters of layer ``k - 1`` into layer ``k``."""
        for new, old in zip(self.layer_parameters(k), self.layer_parameters(k - 1), strict=True):
            new.copy_(old)  # a shared parameter is copied onto itself

    def forward(self, b: Tensor, n_layers: int | None = None, return_all: bool = False) -> Tensor:
        """Return the estimate ``(batch, n)``, or with ``return_all`` every layer's ``(n_layers, batch, n)``.

        Args:
            b: ``(batch, m)``.
            n_layers: use only the first layers.
            return_all: return the estimates of all layers.

        Raises:
            ValueError: for a wrong shape, values that are not finite or too many layers.
        """
        check_matrix(b, "b", self.A.shape[0])
        n_layers = self.layers if n_layers is None else n_layers
        check_count("n_layers", n_layers, 0, self.layers)
        outputs = self.iterate(b, n_layers)
        if not outputs:
            return b.new_zeros(b.shape[0], self.A.shape[1])
        return torch.stack(outputs) if return_all else outputs[-1]

    def iterate(self, b: Tensor, n_layers: int, first_trained: int = 0) -> list[Tensor]:
        """Return the estimates of the first layers; those before ``first_trained`` run without gradient."""
        x, outputs = b.new_zeros(b.shape[0], self.A.shape[1]), []
        prepared = self._prepare(b)  # always with gradient: its parameters are shared with the trained layers
        for k in range(n_layers):
            with torch.set_grad_enabled(torch.is_grad_enabled() and k >= first_trained):
                x = self._layer(k, x, prepared)
            outputs.append(x)
        return [x / self.column_norms for x in outputs] if self.normalize else outputs


class LISTA(Unrolled):
    r"""Network of :math:`x_{k+1} = S_{\theta_k}(W_1 b + W_{2,k} x_k)`, at first exactly ISTA.

    ``W1`` is shared, ``W2`` free in every layer: ``n m + K n^2 + K`` parameters.

    Args:
        A: ``(m, n)``, columns of length one.
        layers: K.
        lam: the thresholds start at ``lam / L``; the official TensorFlow code takes 0.4, the PyTorch code 0.1.
        tied: share ``W2`` over the layers.
        select: ``None``, or growth and ceiling of the support selection, in fractions of ``n``: with the papers'
            ``(0.012, 0.13)`` the network is LISTA-SS.
        normalize: rescale the columns of ``A`` first, and the solution back.

    Raises:
        ValueError: for a dictionary or a setting outside its rules.

    Reference: gregor2010learning

    >>> sum(p.numel() for p in LISTA(torch.eye(4), layers=3).parameters())
    67
    """

    def __init__(
        self,
        A: Tensor,
        layers: int = 16,
        *,
        lam: float = 0.1,
        tied: bool = False,
        select: tuple[float, float] | None = None,
        normalize: bool = False,
    ):
        super().__init__(A, layers, lam, select, normalize)
        A = self.A
        eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        self.W1 = _copies((A / self.lipschitz).T.contiguous(), 1)
        self.W2 = _copies(eye - A.T @ A / self.lipschitz, 1 if tied else layers)

    def _prepare(self, b: Tensor) -> Tensor:
        return b @ self.W1[0].T  # once for all layers

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        W2 = self.W2[min(k, len(self.W2) - 1)]
        return self._shrink(k, torch.addmm(b, x, W2.T))


class LISTACP(Unrolled):
    r"""Network with coupled weights: :math:`x_{k+1} = S_{\theta_k}(x_k + W_k^T(b - A x_k))`.

    ``W`` starts at ``A / L``, which is ISTA: ``K n m + K`` parameters, tied (one ``W`` for all layers) ``n m + K``.
    Takes the arguments of ``LISTA``.

    Reference: chen2018theoretical

    >>> sum(p.numel() for p in LISTACP(torch.eye(4), layers=3).parameters())
    51
    """

    def __init__(
        self,
        A: Tensor,
        layers: int = 16,
        *,
        lam: float = 0.1,
        tied: bool = False,
        select: tuple[float, float] | None = None,
        normalize: bool = False,
    ):
        super().__init__(A, layers, lam, select, normalize)
        self.W = _copies(self.A / self.lipschitz, 1 if tied else layers)

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        # W has the shape of A, the transpose of the official code's: a batch of rows needs no transposed copy.
        W = self.W[min(k, len(self.W) - 1)]
        return self._shrink(k, torch.addmm(x, b - x @ self.A.T, W))


class LISTACPSS(LISTACP):
    """LISTA-CP with support selection by the papers' schedule: 1.2% of ``n`` more a layer, at most 13%.

    Reference: chen2018theoretical

    >>> LISTACPSS(torch.eye(100), layers=16, tied=True).counts[-3:]
    [13, 13, 13]
    """

    def __init__(self, A: Tensor, layers: int = 16, *, select: tuple[float, float] | None = SCHEDULE, **options):
        super().__init__(A, layers, select=select, **options)


class TiLISTA(Unrolled):
    r"""Network with one learned matrix and a step per layer: :math:`S^{ss}_{\theta_k}(x_k + \gamma_k W^T(b - A x_k))`.

    ``n m + 2 K`` parameters. ``W`` starts at ``A / L``. Takes the arguments of ``LISTA`` but ``tied``.

    Reference: liu2019alista

    >>> sum(p.numel() for p in TiLISTA(torch.eye(4), layers=3).parameters())
    22
    """

    def __init__(
        self,
        A: Tensor,
        layers: int = 16,
        *,
        lam: float = 0.1,
        select: tuple[float, float] | None = SCHEDULE,
        normalize: bool = False,
    ):
        super().__init__(A, layers, lam, select, normalize)
        self.gamma = _copies(self.A.new_tensor(1.0), layers)
        self.W = _copies(self.A / self.lipschitz, 1)

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        return self._shrink(k, x + self.gamma[k] * ((b - x @ self.A.T) @ self.W[0]))


class ALISTA(Unrolled):
    r"""TiLISTA with analytic weights: two learned numbers a layer, ``2 K`` in all.

    The steps start at 1, as in the official TensorFlow code; the PyTorch code starts at ``1 / L``, far too short for
    weights with a unit diagonal of ``W^T A``.

    Args:
        A: ``(m, n)``, columns of length one, rows independent.
        layers, lam, select, normalize: as in ``LISTA``.
        weights: ``W (m, n)`` with a unit diagonal of ``W^T A``; ``analytic_weights(A)`` by default.

    Raises:
        ValueError: for a dictionary, weights or a setting outside its rules.

    Reference: liu2019alista

    >>> sum(p.numel() for p in ALISTA(torch.eye(4)).parameters())
    32
    """

    def __init__(
        self,
        A: Tensor,
        layers: int = 16,
        *,
        lam: float = 0.4,
        select: tuple[float, float] | None = SCHEDULE,
        weights: Tensor | None = None,
        normalize: bool = False,
    ):
        super().__init__(A, layers, lam, select, normalize)
        weights = analytic_weights(self.A) if weights is None else weights.detach().clone()
        check_weights(weights, self.A)
        self.gamma = _copies(self.A.new_tensor(1.0), layers)
        self.register_buffer("W", weights)  # saved, not trained

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        return self._shrink(k, x + self.gamma[k] * ((b - x @ self.A.T) @ self.W))


def train_layerwise(
    net: Unrolled,
    sampler: Sampler,
    stages: Sequence[tuple[int, float]] = STAGES,
    *,
    lr: float = 5e-4,
    batch: int = 64,
    decay: float = 0.3,
    validation: tuple[Tensor, Tensor] | None = None,
    check_every: int = 10,
    patience: int | None = None,
    readout: nn.Module | None = None,
    warm_start: bool = True,
) -> list[float]:
    r"""Train the layers one after the other, each in stages, on :math:`\|x_{k+1}-x^*\|^2`; return their losses.

    Stage 1 trains the newest layer alone, the others all layers up to it, with smaller steps (Adam). With a
    validation set the best state of a stage is kept, so that no stage makes the network worse on it. A layer's loss,
    taken after its stages, is that of the validation set, or of the last batch.

    Args:
        net: one of the LISTA family.
        sampler: ``sampler(batch)`` returns fresh targets ``(batch, n)`` and measurements ``(batch, m)``.
        stages: steps and learning-rate factor of each stage.
        lr: learning rate; the official TensorFlow code uses 5e-4, the PyTorch code 0.1.
        batch: instances a step.
        decay: factor on the learning rate for each layer further back (stages 2 on).
        validation: targets and measurements on which states are compared.
        check_every: steps between two looks at the validation set.
        patience: end a stage after so many steps without improvement.
        readout: applied to the estimate before the loss and trained with it (targets then have its width).
        warm_start: start a layer from its predecessor.

    Raises:
        TypeError: if ``net`` is not of the LISTA family.
        ValueError: for settings outside their ranges.

    Reference: chen2018theoretical

    >>> from effnb.solvers import ALISTA, SparseProblem
    >>> problem = SparseProblem(20, 40)
    >>> losses = train_layerwise(ALISTA(problem.A, layers=2), problem.sample, stages=[(20, 1.0)], lr=0.01)
    >>> losses[1] < losses[0]
    True
    """
    if not isinstance(net, Unrolled):
        raise TypeError(f"net must be of the LISTA family, got {type(net).__name__}")
    check_number("lr", lr, gt=0)
    check_number("decay", decay, ge=0)
    check_count("batch", batch)
    check_count("check_every", check_every)

    def loss_of(estimate: Tensor, target: Tensor) -> Tensor:
        return ((estimate if readout is None else readout(estimate)) - target).square().sum(-1).mean()

    @torch.no_grad()
    def validated(k: int) -> float:
        target, b = validation
        return float(loss_of(net(b, n_layers=k + 1), target))

    losses = []
    for k in range(net.layers):
        if warm_start and k:
            net.warm_start(k)
        final = math.nan
        for stage, (steps, factor) in enumerate(stages):
            first = k if stage == 0 else 0
            groups = [] if readout is None else [{"params": list(readout.parameters()), "lr": lr * factor}]
            seen: set[int] = set()
            for j in range(k, first - 1, -1):  # from the newest: a shared parameter moves at the newest layer's rate
                fresh = [p for p in net.layer_parameters(j) if id(p) not in seen]
                seen.update(map(id, fresh))
                if fresh:
                    groups.append({"params": fresh, "lr": lr * factor * decay ** (k - j)})
            optimizer = torch.optim.Adam(groups)  # anew: moments of another stage's rates and parameters do not fit
            trained = [p for group in groups for p in group["params"]]
            if validation is not None:
                best, since, saved = validated(k), 0, [p.detach().clone() for p in trained]
            for step in range(steps):
                target, b = sampler(batch)
                # Not forward: the layers before `first` run without a graph, which stops the gradient there.
                loss = loss_of(net.iterate(b, k + 1, first)[-1], target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                final = float(loss.detach())
                if validation is not None and ((step + 1) % check_every == 0 or step + 1 == steps):
                    score, since = validated(k), since + check_every
                    if score < best:
                        best, since, saved = score, 0, [p.detach().clone() for p in trained]
                    if patience is not None and since >= patience:
                        break
            if validation is not None:
                final = best
                with torch.no_grad():
                    for p, old in zip(trained, saved, strict=True):
                        p.copy_(old)
            net.zero_grad(set_to_none=True)
        losses.append(final)
    return losses
