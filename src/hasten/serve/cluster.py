"""A Ray cluster to work on: one of this machine's own, closed to everybody else, or one that is there already."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hasten.errors import HastenError, MissingExtraError

_STORE_BYTES = 200_000_000  # requests and answers on their way; Ray writes to disk what is beyond
_LOOPBACK = "127.0.0.1"
# Ray listens on every interface and reports its use unless it is told otherwise; it reads most of this when imported.
_CLOSED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what makes it take the loopback address as that of its node
    "RAY_AUTH_MODE": "token",
    "RAY_enable_metrics_collection": "0",
}


def import_ray(address: str | None = None) -> Any:
    """The ray module; without an address, told to keep to this machine. Raises MissingExtraError."""
    if address is None:
        os.environ.update(_CLOSED)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else one is written to the home directory
    else:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise MissingExtraError("Ray is not installed", hint="pip install 'hasten[ray]'", field="ray") from None
    return ray


@contextmanager
def cluster(address: str | None, cpus: int) -> Iterator[Any]:
    """The ray module, connected to the cluster at `address`, or to a new one that ends with the block.

    The new one has `cpus` CPUs to give away, listens on the loopback address only, asks every caller for a token that
    only this process and its children know, has no dashboard, and keeps its files in a folder of its own.
    Raises MissingExtraError, HastenError when Ray does not start or would be reachable from elsewhere.
    """
    ray = import_ray(address)
    folder = None
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        else:
            folder = tempfile.mkdtemp(prefix="hasten-ray-")
            started = ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=folder,
            )
            if started.address_info["node_ip_address"] != _LOOPBACK:
                raise HastenError("Ray does not keep to the loopback address", hint="import ray after hasten.serve.cluster")
        yield ray
    except (ConnectionError, ValueError, RuntimeError) as error:
        if ray.is_initialized() or isinstance(error, HastenError):
            raise
        raise HastenError(f"Ray did not start ({str(error)[:200]})", hint="see --ray-address", field="ray") from None
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
