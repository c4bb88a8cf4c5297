"""Unlearning in closed form from sufficient statistics, so that a request needs no retained data."""

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effnb.common import check_choice, check_number
from effnb.unlearn.fast_ntk.closed_form import NotPositive, Sums
from effnb.unlearn.fast_ntk.jacobian import MEMORY_BUDGET, check_model, check_options, flatten, pairs, resolve
from effnb.unlearn.fast_ntk.training import (
    LOSSES,
    Batches,
    State,
    as_mapping,
    batches,
    check_labels,
    curvature_rows,
    initial_values,
    residual,
)

__all__ = ["NTKUnlearner"]


def fingerprint(model: nn.Module) -> Tensor:
    """Return three float64 numbers a parameter or buffer, which change with any realistic change of the values."""
    marks = []
    for value in [*model.parameters(), *model.buffers()]:
        flat = value.detach().double().reshape(-1)
        # The ramp sees values that changed places.
        ramp = torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device)
        marks.append(torch.stack([flat.sum(), flat @ flat, flat @ ramp]).cpu())
    return torch.stack(marks)


def same_fingerprint(a: Tensor, b: Tensor) -> bool:
    """Return whether two fingerprints agree but for the order of summation on another machine."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def unflatten(vector: Tensor, like: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Return a vector ``(P,)`` as named tensors with the shapes and dtypes of ``like``."""
    parts = vector.split([like[name].numel() for name in names])
    return {name: part.view_as(like[name]).to(like[name]) for name, part in zip(names, parts, strict=True)}


def trapezium(step: Tensor, displacement: Tensor, retained_step: Tensor) -> float:
    r"""Return the official heuristic for the length of a step, ``s = 1 + 2 |c| |e| / |delta|``.

    ``e = (w - w0) - w_lin(D_r)``, ``c`` the cosine of the angle between ``delta`` and ``e``. The official code has a
    branch for each sign of ``c``, a sine and a cosine of an angle; both are this formula.
    """
    error = displacement - retained_step
    length, size = torch.linalg.vector_norm(step), torch.linalg.vector_norm(error)
    if length == 0 or size == 0:
        return 1.0
    cosine = (step @ error / (length * size)).clamp(-1, 1)
    return float(1 + 2 * cosine.abs() * size / length)


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
        init_state: State,
        form: str = "newton-diff",
        hessian: str | None = None,
        at: str = "final",
        scale: float | str = 1.0,
        dtype: torch.dtype = torch.float64,
        centred: bool = False,
        method: str = "auto",
        chunk_size: int | str = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        check_choice("loss", loss, LOSSES)
        check_choice("form", form, ("newton-diff", "golatkar", "newton", "influence"))
        check_choice("hessian", hessian, ("identity", "ggn", None))
        check_choice("at", at, ("final", "init"))
        check_choice("dtype", dtype, (torch.float32, torch.float64))
        if centred not in (True, False) or (centred and loss != "mse"):
            raise ValueError(f"centred must be False unless the loss is 'mse', got {centred} with {loss!r}")
        check_options(method, chunk_size, memory_budget)
        check_number("weight_decay", weight_decay, ge=0)
        if scale != "trapezium":
            check_number("scale", scale, ge=0)
        check_model(model)
        self.model, self.params, self.init_state = model, resolve(model, params), init_state
        self.loss, self.form, self.at, self.centred, self.dtype = loss, form, at, centred, dtype
        self.hessian = hessian or ("ggn" if loss == "ce" and form != "golatkar" else "identity")
        self.weight_decay, self.scale = float(weight_decay), scale if scale == "trapezium" else float(scale)
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

    def fit(self, loader: Batches) -> "NTKUnlearner":
        """Sum up the statistics of all data that the model was fine-tuned on; forgets earlier sums and requests.

        Warns if something outside ``params`` differs from ``init_state``: what that learnt cannot be removed.

        Args:
            loader: yields ``(x, y)`` batches, or is one such pair of tensors.

        Raises:
            TypeError: batches of a wrong type.
            ValueError: no sample, labels outside ``0..K-1``, a Jacobian that is not finite.
        """
        self._observe()
        self._sums = self._of_all = None  # a fit that fails must not leave old sums beside new weights
        before, state = as_mapping(self.init_state), self.model.state_dict()
        outside = [name for name in state if name in before and name not in self.params]
        if leaks := [name for name in outside if not torch.equal(state[name], before[name].to(state[name]))]:
            what = f"{leaks[0]!r} is not in params, but differs between model and init_state"
            rule = "running statistics have to stay frozen while fine-tuning"
            warnings.warn(f"{what}: what it learnt from the data cannot be removed ({rule})", stacklevel=2)
        sums = self._accumulate(loader, "loader")
        if sums.count == 0:
            raise ValueError("loader must hold at least one sample, got none")
        self._sums, self._of_all = sums, self._step_of_all(sums)
        return self

    def _accumulate(self, data: Batches, name: str) -> Sums:
        """Return the sums of all samples of ``data`` at the point of linearisation."""
        if not same_fingerprint(self._mark, fingerprint(self.model)):
            raise ValueError("model must be as it was when fit was called, got other values; call fit again")
        point = unflatten(self._init, dict(self.model.named_parameters()), self.params) if self.at == "init" else None
        sums = Sums(len(self._init), self.dtype, self._init.device)
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a shuffling loader draws from the global stream
            for x, y in batches(data, name):
                start = 0
                for out, jac in pairs(self.model, self.params, x, point=point, **self.options):
                    labels = y[start : start + len(out)].to(out.device)
                    check_labels(labels, out.shape[1], name)
                    start += len(out)
                    sums.eps = max(sums.eps, torch.finfo(jac.dtype).eps)
                    out, jac = out.to(sums.grad), jac.to(sums.grad)
                    # The gradient first: curvature_rows overwrites the Jacobian.
                    grad = jac.flatten(0, 1).T @ residual(out, labels, self.loss, self.centred).flatten()
                    sums.add(curvature_rows(jac, out, self.loss, self.hessian).flatten(0, 1), grad, len(out))
        return sums

    def _solve(self, sums: Sums, rhs: Tensor, check: bool = False) -> Tensor:
        """Return ``A^-1 rhs`` with ``A = G + N lam I``: ``N`` counts samples, not samples times outputs."""
        return sums.solve(rhs, sums.count * self.weight_decay, check=check)

    def _gradient(self, sums: Sums) -> Tensor:
        """Return ``J^T r + N lam (v - w0)``: gradient of the summed objective at the linearisation point ``v``."""
        point = self._init if self.at == "init" else self._final
        return sums.grad + sums.count * self.weight_decay * (point - self._init)

    def _step_of_all(self, sums: Sums) -> Tensor | None:
        """Return the part of a step that does not depend on the request, to be kept between requests."""
        if self.form == "golatkar":
            return -self._solve(sums, sums.grad)
        return -self._solve(sums, self._gradient(sums)) if self.form == "newton-diff" else None

    def _step(self, retain: Sums, forget: Sums, downdated: bool) -> tuple[Tensor, float, Sums]:
        """Return the step from the present weights ``u``, its factor, and the sums that stay.

        Under the quadratic model around ``v`` the gradient at ``u`` is ``g(v) + A (u - v)``; this is what makes each
        form exact for a linear model wherever it is linearised, and successive requests add up to the joint one.
        """
        if retain.count + forget.count == 0:
            raise ValueError("forget_loader and retain_loader must not both be empty")
        if forget.count == 0 and self.form != "newton":  # Newton's step also finishes the training
            return torch.zeros_like(self._init), 1.0, retain
        if retain.count == 0 and self.at == "final":
            raise ValueError("forget_loader must leave at least one sample with at='final', got all of them")
        if retain.count == 0:  # the optimum on no data is w0; the downdated sums hold rounding errors
            return self._init - self._final - self._offset, 1.0, Sums(len(self._init), self.dtype, self._init.device)
        shift = self._final + self._offset - (self._init if self.at == "init" else self._final)  # u - v
        if self.form == "newton":
            step = -self._solve(retain, self._gradient(retain), downdated) - shift
        elif self.form == "influence":
            moved = forget.times(shift) + forget.count * self.weight_decay * shift
            step = self._solve(retain, self._gradient(forget) + moved, downdated)
        else:  # A_r (u - v) cancels in the difference of two steps
            of_all = self._of_all if downdated else self._step_of_all(retain.plus(forget))
            gradient = retain.grad if self.form == "golatkar" else self._gradient(retain)
            step = -self._solve(retain, gradient, downdated) - of_all
        if self.scale != "trapezium":
            return step, self.scale, retain
        displacement = self._final + self._offset - self._init
        return step, trapezium(step, displacement, -self._solve(retain, retain.grad)), retain

    def _request(self, forget_loader: Batches, retain_loader: Batches | None) -> tuple[Tensor, float, Sums]:
        """Return what :meth:`_step` does, from the downdated sums where it can be, else from sums of both loaders."""
        if self._sums is None and retain_loader is None:
            raise ValueError("fit must be called first, or retain_loader given")
        if self._sums is None:
            self._observe()
        forget = self._accumulate(forget_loader, "forget_loader")
        if self._sums is not None:
            if forget.count > self._sums.count:
                raise ValueError(f"forget_loader must hold at most {self._sums.count} samples, got {forget.count}")
            try:
                return self._step(self._sums.plus(forget, -1), forget, True)
            except NotPositive as error:
                if retain_loader is None:
                    rule = "forget_loader must hold samples that fit has seen"
                    hint = "if it does, give retain_loader to sum them up afresh"
                    raise ValueError(f"{rule}, but {error}; {hint}") from error
        return self._step(self._accumulate(retain_loader, "retain_loader"), forget, False)

    def delta(self, forget_loader: Batches, retain_loader: Batches | None = None) -> Tensor:
        """Return the unlearning direction ``(P,)``, in the order of ``params``; :meth:`forget` adds it times ``scale``.

        It is exactly zero if there is nothing to forget (but for ``"newton"``).

        Args:
            forget_loader: the samples to forget, as ``(x, y)`` batches or one pair of tensors.
            retain_loader: the retained samples; needed only without :meth:`fit`, or where the downdate fails.

        Raises:
            TypeError: batches of a wrong type.
            ValueError: neither fitted nor given retained data, more samples than were fitted or others, labels outside
                ``0..K-1``, nothing retained with ``at="final"``, or a changed model.
        """
        step, self.last_scale, _ = self._request(forget_loader, retain_loader)
        return step

    def forget(
        self, forget_loader: Batches, retain_loader: Batches | None = None, *, commit: bool = False
    ) -> nn.Module:
        """Return a copy of the model without what it learnt from some samples; the model itself stays as it is.

        Args:
            forget_loader, retain_loader: see :meth:`delta`, also for the errors.
            commit: serve the request for good: the next one starts from here, with the samples gone from the sums.
        """
        step, self.last_scale, retain = self._request(forget_loader, retain_loader)
        moved = self._offset + self.last_scale * step
        if commit:
            self._sums, self._offset = retain, moved
            self._of_all = self._step_of_all(retain) if retain.count else None
        made = copy.deepcopy(self.model)
        known = dict(made.named_parameters())
        with torch.no_grad():
            for name, value in unflatten(self._final + moved, known, self.params).items():
                known[name].copy_(value)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a later request needs besides the model: tensors and plain values."""
        names = ("loss", "weight_decay", "form", "hessian", "at", "scale", "centred")
        settings = {name: getattr(self, name) for name in names}
        sums = None if self._sums is None else dict(vars(self._sums))
        own = {"init": self._init, "offset": self._offset, "mark": self._mark, "of_all": self._of_all}
        return {"params": list(self.params), "settings": settings, "sums": sums, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the sums of another unlearner with the same settings and model.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            ValueError: a setting or the model differs, or an entry is missing.
        """
        mine = self.state_dict()
        if missing := sorted(set(mine) - set(state)):
            raise ValueError(f"state must come from NTKUnlearner.state_dict(), got none of {', '.join(missing)}")
        for name in ("params", "settings"):
            if state[name] != mine[name]:
                raise ValueError(f"state must have the {name} {mine[name]}, got {state[name]}")
        if not torch.equal(state["init"], mine["init"]) or not same_fingerprint(state["mark"], mine["mark"]):
            raise ValueError("state must belong to this model and init_state, got values of another one")
        state = copy.deepcopy(state)
        self._offset, self._of_all, self._sums = state["offset"], state["of_all"], None
        if state["sums"] is not None:
            self._sums = Sums(0)
            vars(self._sums).update(state["sums"])
