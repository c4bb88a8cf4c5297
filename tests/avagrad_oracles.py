"""Slow, independent versions of the update rules, written from the paper and from the official code's behaviour."""

import math

import numpy as np
import torch


class SlowOracle:
    """One parameter group in float64 NumPy, entry by entry as in the description of the algorithm."""

    def __init__(self, lr=0.1, betas=(0.9, 0.999), eps=0.1, weight_decay=0.0, decoupled=False, norm="current", **more):
        self.lr, (self.b1, self.b2), self.eps = lr, betas, eps
        self.wd, self.decoupled, self.norm = weight_decay, decoupled, norm
        self.skip, self.sign = more.get("first_step", "skip") == "skip", -1.0 if more.get("maximize") else 1.0
        self.state, self.gamma = {}, None

    def step(self, params, grads):
        """``params``: dict of arrays, changed in place; ``grads``: dict of arrays for those that have a gradient."""
        etas, lagged, moments = {}, {}, {}
        for name, g in grads.items():
            w = params[name]
            t, m, v = self.state.get(name, (0, np.zeros_like(w), np.zeros_like(w)))
            t += 1
            g = self.sign * g + (0 if self.decoupled else self.wd * w)
            m = self.b1 * m + (1 - self.b1) * g
            root = np.sqrt(v / (1 - self.b2 ** (t - 1))) if t > 1 else np.zeros_like(w)
            etas[name] = 1 / (root + self.eps)
            lagged[name] = 1 / (np.sqrt(v / (1 - self.b2**t)) + self.eps)
            moments[name] = (t, m, self.b2 * v + (1 - self.b2) * g * g)
        gamma = self._gamma(etas)
        for name in grads:
            t, m, _ = moments[name]
            if self.norm is None:  # an entry without a second moment yet has no rate of its own
                v = self.state[name][2] if name in self.state else np.zeros_like(m)
                etas[name] = np.where(v == 0, 0.0 if self.skip else 1.0, etas[name])
            self._move(params[name], t, m, etas[name], gamma)
        self.state.update(moments)
        if self.norm == "lagged":
            self.gamma = self._inverse_rms(lagged)
        else:
            self.gamma = gamma

    @staticmethod
    def _inverse_rms(etas):
        total = sum(float((e * e).sum()) for e in etas.values())
        count = sum(e.size for e in etas.values())
        return 1 / math.sqrt(total / count)

    def _gamma(self, etas):
        if self.norm is None:
            return 1.0
        if self.norm == "current":
            return self._inverse_rms(etas)
        return self.eps if self.gamma is None else self.gamma

    def _move(self, w, t, m, eta, gamma):
        if t == 1 and self.skip:
            return
        if self.decoupled:
            w *= 1 - self.lr * self.wd
        w -= self.lr * gamma * eta * m / (1 - self.b1**t)


class OfficialRule(torch.optim.Optimizer):
    """What the official code computes, restated with today's torch calls; ``decoupled`` is its AvaGradW."""

    def __init__(self, params, lr=0.1, betas=(0.9, 0.999), weight_decay=0.0, eps=0.1, decoupled=False):
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, gamma=None, decoupled=decoupled)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            total, count = 0.0, 0
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                t, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
                g = p.grad
                if group["weight_decay"] and not group["decoupled"]:
                    g = g + group["weight_decay"] * p
                m.copy_(b1 * m + (1 - b1) * g)
                root = v.sqrt()
                if t > 1:
                    if group["weight_decay"] and group["decoupled"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                    rate = group["gamma"] * group["lr"] / (1 - b1**t)
                    p.sub_(rate * m / (root / math.sqrt(1 - b2 ** (t - 1)) + group["eps"]))
                v.copy_(b2 * v + (1 - b2) * g * g)
                total += ((root / math.sqrt(1 - b2**t) + group["eps"]) ** -2).sum().item()
                count += p.numel()
            group["gamma"] = 1 / math.sqrt(total / count)
