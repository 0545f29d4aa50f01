"""The web page: one self-contained document, put together at the first use and kept in memory.

The files in `page/` are ordinary HTML, CSS and JavaScript modules, so that they can be read, linted and tested as they
are. Here the modules are joined in the order of their imports into one inline script; nothing is compiled, and the
Content-Security-Policy allows exactly these texts, by hash, and requests to the page's own origin.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter()

_FOLDER = "page"
_IMPORT = re.compile(r'^import \{[\w, ]+\} from "\./([\w.]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const|let) )", re.MULTILINE)
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


@lru_cache(maxsize=1)
def document() -> tuple[bytes, dict[str, str]]:
    """The page as UTF-8 bytes, and the headers to send with it: content type, security policy, no sniffing, no storing."""
    style, theme, script = _file("style.css"), _file("theme.js"), _joined("main.js")
    text = _file("index.html")
    for mark, element in (
        ("<!--style-->", f"<style>{style}</style>"),
        ("<!--theme-->", f"<script>{theme}</script>"),
        ("<!--script-->", f'<script type="module">{script}</script>'),
    ):
        before, after = text.split(mark)
        text = before + element + after
    policy = _POLICY.format(scripts=f"{_hash(theme)} {_hash(script)}", styles=_hash(style))
    return text.encode("utf-8"), {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",
        "Accept-Ranges": "none",
    }


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page itself."""
    body, headers = document()
    return Response(body, headers=headers)


def _file(name: str) -> str:
    return (resources.files("hasten.serve") / _FOLDER / name).read_text(encoding="utf-8")


def _joined(name: str) -> str:
    """The module `name` after everything it imports, each once, as one text without import and export statements."""
    parts: dict[str, str] = {}

    def add(one: str) -> None:
        if one in parts:
            return
        parts[one] = ""  # its place in a circle of imports; functions are hoisted, so circles do no harm
        text = _file(one)
        for other in _IMPORT.findall(text):
            add(other)
        del parts[one]
        parts[one] = _EXPORT.sub("", _IMPORT.sub("", text))

    add(name)
    return "\n".join(parts.values())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
