"""The connection to a Ray cluster that somebody else started; ray itself is imported only when it is asked for."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from unittest.mock import patch

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def import_ray() -> ModuleType:
    """Return the module ray.

    Raises:
        ImportError: if it is not installed, naming the extra.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("ray_address needs the extra `ray`: pip install 'effnb[ray]'") from error
    return ray


def listens(host: str, port: int, timeout: float = 3.0) -> bool:
    """Tell whether something accepts connections at ``host:port``."""
    try:
        with socket.create_connection((host, port), timeout):
            return True
    except OSError:
        return False


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return where a cluster's head is, or None for an address that only ray itself can read (``ray://...``).

    Args:
        address: ``"host:port"``, or ``"auto"`` for ``$RAY_ADDRESS``, else the cluster on this machine.

    Raises:
        ConnectionError: for ``"auto"`` where there is no cluster.
    """
    if address == "auto":
        from ray._private import services

        address = services.get_ray_address_from_environment(address, None)
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if port.isdecimal() and "//" not in address else None


def loopback_only(place: tuple[str, int] | None) -> bool:
    """Tell whether a head listens on this machine's loopback address and nowhere else.

    Raises:
        ConnectionError: if nothing listens there; ray itself would go on trying for minutes.
    """
    if place is None:
        return False
    host, port = place
    if not listens(host, port):
        raise ConnectionError(f"nothing listens at {host}:{port}")
    if host not in LOOPBACK:
        return False
    from ray._private import services

    return not listens(services.get_node_ip_address(), port)


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connect to a running cluster for the time of a ``with`` block, which gets the module ray.

    A connection that exists already is used and left open.

    Args:
        address: ``"auto"``, ``"host:port"`` or ``"ray://host:port"``.

    Raises:
        ImportError: if ray is not installed.
        ValueError: if no cluster answers there.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        # Ray replaces 127.0.0.1 by the machine's outer address, where a cluster that was started with
        # --node-ip-address=127.0.0.1 does not listen; this switch makes it keep the address.
        keep = patch("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        with keep if loopback_only(host_and_port(address)) else nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"ray_address {address!r}: no Ray cluster answers there ({error})") from error
    try:
        yield ray
    finally:
        ray.shutdown()
