"""Unlearning in closed form from sufficient statistics, so that a request needs no retained data."""

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Batches, check_choice, check_model, check_number, check_settings
from .jacobian import METHODS, pairs
from .linalg import NotPositive
from .state import check_frozen, check_state, fingerprint, initial_values, same_fingerprint
from .steps import Problem, delta, linear_step, step_of_all, trapezium
from .subset import flatten, resolve, unflatten, write
from .sums import Sums, accumulate

SETTINGS = ("loss", "weight_decay", "form", "hessian", "at", "scale", "centred")


class NTKUnlearner:
    r"""Remove samples from a fine-tuned subset of parameters by one linear solve.

    The model must minimise the mean over ``D`` of the loss plus ``weight_decay / 2 |w - w0|^2``: decay towards ``w0``,
    everything outside ``params`` and all running statistics frozen. With ``A = sum_i J_i^T H_i J_i + N lam I`` and
    ``g = J^T r + N lam (w - w0)`` of a set, the forms are

    - ``"newton-diff"``: :math:`-A_r^{-1} g_r + A^{-1} g`, a Newton step for what stays minus one for all;
    - ``"newton"``: :math:`-A_r^{-1} g_r`;
    - ``"influence"``: :math:`A_r^{-1} g_f`;
    - ``"golatkar"``: :math:`w_{lin}(D_r) - w_{lin}(D)` with :math:`w_{lin} = -(G + N\lambda I)^{-1} J^\top r`, as in
      the official code.

    :meth:`fit` sums up ``G``, ``b = J^T r`` and ``N`` once; a request then takes its own part away again and never
    looks at the retained data. The ridge is ``N lam`` with ``N`` samples, so it differs between ``D`` and ``D_r``;
    with ``weight_decay=0`` each solve is the minimum-norm one.

    Args:
        model: the fine-tuned model in eval mode; it is never changed.
        params: names of the fine-tuned parameters, or a subset for :func:`peft_parameters`.
        loss: ``"mse"`` (half the squared distance to one-hot targets) or ``"ce"``.
        weight_decay: ``lam`` >= 0 of the fine-tuning.
        init_state: values before fine-tuning, a state dict or a model; needs the names in ``params``.
        form: see above.
        hessian: ``"identity"`` or ``"ggn"`` (the loss's own curvature). By default the curvature that is right for
            the loss; ``"golatkar"`` takes the identity, as the official code does.
        at: where to linearise, ``"final"`` (the fine-tuned weights) or ``"init"`` (``w0``).
        scale: factor of the step, >= 0, or ``"trapezium"``, the official heuristic.
        dtype: of the sums and solves.
        centred: targets one-hot minus ``1 / K`` (mse only).
        method, chunk_size, memory_budget: see :func:`per_sample_jacobian`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, a model not in eval mode, or ``init_state`` without a name of ``params``.

    Reference: li2023fastntk, golatkar2020forgetting

    >>> model = nn.Linear(2, 2, bias=False).requires_grad_(False).eval()
    >>> x, y = torch.eye(2), torch.tensor([0, 1])
    >>> init = {"weight": torch.zeros(2, 2)}
    >>> _ = model.weight.copy_(torch.eye(2) / 2)  # the optimum for weight_decay=0.5
    >>> unlearner = NTKUnlearner(model, "all", weight_decay=0.5, init_state=init).fit((x, y))
    >>> unlearner.forget((x[1:], y[1:])).weight.round(decimals=4)  # the optimum on the first sample
    tensor([[0.6667, 0.0000],
            [0.0000, 0.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        params: str | Iterable[str] = "bn+head",
        *,
        loss: str = "mse",
        weight_decay: float,
        init_state: Mapping[str, Tensor] | nn.Module,
        form: str = "newton-diff",
        hessian: str | None = None,
        at: str = "final",
        scale: float | str = 1.0,
        dtype: torch.dtype = torch.float64,
        centred: bool = False,
        method: str = "auto",
        chunk_size: int | str = "auto",
        memory_budget: int = 2**26,
    ) -> None:
        check_settings(loss, form, hessian, at, dtype, centred)
        check_choice("method", method, METHODS)
        check_model(model)
        self.weight_decay = check_number("weight_decay", weight_decay)
        self.scale = scale if scale == "trapezium" else check_number("scale", scale)
        self.model, self.params, self.init_state = model, resolve(model, params), init_state
        self.loss, self.form, self.at, self.centred, self.dtype = loss, form, at, centred, dtype
        self.hessian = hessian or ("ggn" if loss == "ce" and form != "golatkar" else "identity")
        self.options = {"method": method, "chunk_size": chunk_size, "memory_budget": memory_budget}
        self._init = flatten(initial_values(model, self.params, init_state), self.params, dtype)
        self._sums: Sums | None = None
        self._of_all: Tensor | None = None  # the part of the step that no request changes
        self.last_scale = 1.0
        self._observe()

    def _observe(self) -> None:
        """Take over the model's present weights as those that the requests start from."""
        self._final = flatten(dict(self.model.named_parameters()), self.params, self.dtype)
        self._offset = torch.zeros_like(self._final)  # of requests served for good
        self._mark = fingerprint(self.model)

    @property
    def count(self) -> int:
        """Number of samples in the sums."""
        return 0 if self._sums is None else self._sums.count

    def _accumulate(self, data: Batches, name: str) -> Sums:
        if not same_fingerprint(self._mark, fingerprint(self.model)):
            raise ValueError("model must be as it was when fit was called, got other values; call fit again")
        point = unflatten(self._init, dict(self.model.named_parameters()), self.params) if self.at == "init" else None
        jacobians = partial(pairs, self.model, self.params, point=point, **self.options)
        empty = Sums(len(self._init), self.dtype, self._init.device)
        return accumulate(empty, jacobians, data, name, self.loss, self.hessian, self.centred)

    def fit(self, loader: Batches) -> "NTKUnlearner":
        """Sum up the statistics of all data that the model was fine-tuned on; forgets earlier sums and requests.

        Args:
            loader: yields ``(x, y)`` batches, or is one such pair of tensors.

        Raises:
            ValueError: no sample, labels outside ``0..K-1``, a Jacobian that is not finite.

        Reference: li2023fastntk
        """
        self._observe()
        check_frozen(self.model, self.params, self.init_state)
        sums = self._accumulate(loader, "loader")
        if sums.count == 0:
            raise ValueError("loader must hold at least one sample, got none")
        self._sums = sums
        self._of_all = step_of_all(self.form, self._problem(sums, sums, sums, False))
        return self

    def _problem(self, whole: Sums, retain: Sums, forget: Sums, downdated: bool) -> Problem:
        point = self._init if self.at == "init" else self._final
        shift = self._final + self._offset - point
        return Problem(whole, retain, forget, self.weight_decay, point - self._init, shift, downdated)

    def _request(self, forget_loader: Batches, retain_loader: Batches | None) -> tuple[Tensor, float, Sums]:
        if self._sums is None and retain_loader is None:
            raise ValueError("fit must be called first, or retain_loader given")
        if self._sums is None:
            self._observe()
        forget = self._accumulate(forget_loader, "forget_loader")
        if self._sums is None:
            return self._step(self._accumulate(retain_loader, "retain_loader"), forget, False)
        if forget.count > self._sums.count:
            raise ValueError(f"forget_loader must hold at most {self._sums.count} samples, got {forget.count}")
        try:
            return self._step(self._sums.without(forget), forget, True)
        except NotPositive as error:
            if retain_loader is None:
                hint = "if it does, give retain_loader to sum them up afresh"
                raise ValueError(f"forget_loader must hold samples that fit has seen, but {error}; {hint}") from error
            return self._step(self._accumulate(retain_loader, "retain_loader"), forget, False)

    def _step(self, retain: Sums, forget: Sums, downdated: bool) -> tuple[Tensor, float, Sums]:
        if retain.count + forget.count == 0:
            raise ValueError("forget_loader and retain_loader must not both be empty")
        if forget.count == 0 and self.form != "newton":
            return torch.zeros_like(self._init), 1.0, retain
        if retain.count == 0 and self.at == "final":
            raise ValueError("forget_loader must leave at least one sample with at='final', got all of them")
        if retain.count == 0:
            return self._init - self._final - self._offset, 1.0, Sums(len(self._init), self.dtype, self._init.device)
        problem = self._problem(self._sums if downdated else retain.plus(forget), retain, forget, downdated)
        step = delta(self.form, problem, self._of_all if downdated else step_of_all(self.form, problem))
        return step, self._scale_of(step, problem), retain

    def _scale_of(self, step: Tensor, problem: Problem) -> float:
        if self.scale != "trapezium":
            return self.scale
        return trapezium(step, self._final + self._offset - self._init, linear_step(problem.retain, problem))

    def delta(self, forget_loader: Batches, retain_loader: Batches | None = None) -> Tensor:
        """The unlearning direction; :meth:`forget` adds it times ``scale``.

        Args:
            forget_loader: the samples to forget, as ``(x, y)`` batches or one pair of tensors.
            retain_loader: the retained samples; needed only without :meth:`fit`, or where the downdate fails.

        Returns:
            ``(P,)`` in the order of ``params``; exactly zero if there is nothing to forget (but for ``"newton"``).

        Raises:
            TypeError: batches of a wrong type.
            ValueError: neither fitted nor given retained data, more samples than were fitted or samples that were
                not, labels outside ``0..K-1``, nothing retained with ``at="final"``, or a changed model.

        Reference: li2023fastntk
        """
        step, self.last_scale, _ = self._request(forget_loader, retain_loader)
        return step

    def forget(
        self, forget_loader: Batches, retain_loader: Batches | None = None, *, commit: bool = False
    ) -> nn.Module:
        """A copy of the model without what it learnt from some samples; the model itself stays as it is.

        Args:
            forget_loader, retain_loader: see :meth:`delta`.
            commit: serve the request for good: the next one starts from here, with the samples gone from the sums.

        Raises:
            ValueError: see :meth:`delta`.

        Reference: li2023fastntk
        """
        step, self.last_scale, retain = self._request(forget_loader, retain_loader)
        moved = self._offset + self.last_scale * step
        if commit:
            self._sums, self._offset = retain, moved
            self._of_all = (
                step_of_all(self.form, self._problem(retain, retain, retain, False)) if retain.count else None
            )
        return write(copy.deepcopy(self.model), self.params, self._final + moved)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later request needs besides the model: tensors and plain values."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        sums = None if self._sums is None else self._sums.state_dict()
        own = {"init": self._init, "offset": self._offset, "mark": self._mark, "of_all": self._of_all}
        return {"params": list(self.params), "settings": settings, "sums": sums, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the sums of another unlearner with the same settings and model.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            ValueError: a setting or the model differs, or an entry is missing.

        Reference: li2023fastntk
        """
        check_state(state, self.state_dict())
        self._offset = state["offset"].clone()
        self._of_all = None if state["of_all"] is None else state["of_all"].clone()
        self._sums = None if state["sums"] is None else Sums.from_state(state["sums"])
