"""The proxies by name, and which direction of each is better."""

from collections.abc import Callable
from dataclasses import dataclass

from ..zico import zico, zico_floor
from .codes import linear_regions, naswot
from .gradient import fisher, grad_norm, plain, snip
from .kernel import grad_sign, knas, ntk_condition
from .saliency import grasp, jacob_cov, synflow
from .size import count_macs, count_params, l2_norm, nn_mass
from .zen import zen_score


@dataclass(frozen=True)
class Proxy:
    """One proxy: its function, which direction is better, how many batches it needs, and whether it reads labels.

    Reference: abdelfattah2021zerocost.

    >>> available_proxies()["zico"].batches
    2
    """

    function: Callable[..., float]
    higher_is_better: bool = True
    batches: int = 1
    labels: bool = False

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__


PROXIES = (
    Proxy(count_params),
    Proxy(count_macs),
    Proxy(l2_norm),
    Proxy(grad_norm, labels=True),
    Proxy(snip, labels=True),
    Proxy(plain, labels=True),
    Proxy(grasp, labels=True),
    Proxy(fisher, labels=True),
    Proxy(synflow),
    Proxy(jacob_cov),
    Proxy(naswot),
    Proxy(zen_score),
    Proxy(ntk_condition, higher_is_better=False),
    Proxy(linear_regions),
    Proxy(grad_sign, labels=True),
    Proxy(knas),
    Proxy(nn_mass),
    Proxy(zico, batches=2, labels=True),
    Proxy(zico_floor, batches=2, labels=True),
)


def available_proxies() -> dict[str, Proxy]:
    """Return all proxies by name.

    Every function is called as ``function(model, batch, loss_fn=..., seed=...)``, with a list of batches in the place
    of the batch where ``batches`` is 2.

    Returns:
        Name to `Proxy`. Scores as they are, without absolute values: a proxy that ranks the wrong way round says so.

    Reference: abdelfattah2021zerocost, li2024zeroshot.

    >>> [name for name, proxy in available_proxies().items() if not proxy.higher_is_better]
    ['ntk_condition']
    """
    return {proxy.name: proxy for proxy in PROXIES}
