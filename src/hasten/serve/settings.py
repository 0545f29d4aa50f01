"""What a server is told when it starts: where it listens, who may ask, which models it has under which names."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, out_of_range

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")  # of a model, as requests spell it
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z|\[?[0-9a-fA-F:.]+\]?\Z")
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Settings:
    """How one server behaves; checked on construction.

    `keys`: API keys, any of which opens every route (none: no key is asked for, on loopback only). `hosts`: names besides
    localhost and the address itself under which the server may be called. `aliases`: further names of models.
    `method`: how requests decode that do not say. `open_network`: listen off loopback without a key all the same.

    Raises ConfigError naming the field.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    method: tuple[str, ...] = ("auto",)
    open_network: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise out_of_range("port", self.port, "an integer in [0, 65535]")
        for name in (self.host, *self.hosts):
            if not _HOST.match(name):
                raise out_of_range("host", name, "a host name or an address")
        for key in self.keys:
            if len(key) < LIMITS.key_chars or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"a key of {len(key)} characters is not allowed; keys have at least {LIMITS.key_chars}, printable "
                    "ASCII without spaces",
                    hint="make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
                    field="key",
                )
        for name in (*self.aliases, *self.aliases.values()):
            if not NAME.match(name):
                raise out_of_range("alias", name, "letters, digits, '.', '_' and '-'")
        if not self.loopback and not self.keys and not self.open_network:
            raise ConfigError(
                f"host = {self.host!r} is reachable from other machines, and no key is set",
                hint="give --key-file (or HASTEN_KEY), or --i-know to serve everybody who can reach it",
                field="host",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host in LOCAL:
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def names_host(self, host: str) -> bool:
        """Whether a request's Host header (with or without a port) names this server.

        Off loopback an address always does: a foreign page cannot make a browser send one it did not mean to.
        """
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        if name in LOCAL or name == self.host.lower() or name in (known.lower() for known in self.hosts):
            return True
        if self.loopback:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
