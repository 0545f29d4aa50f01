"""The source tree as the shape tests see it: parsed files, their imports with aliases resolved, and the rules' findings.

Every rule is a function from a parsed file to a list of findings, so that each can be tried on a file that breaks it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "hasten"

METHOD_FOLDERS = ("draft", "unmask", "logits", "compress", "reduce", "arch", "embed", "privacy")
RANKS = {
    **dict.fromkeys(("errors", "registry", "types", "text", "pass_cost", "budget", "failure", "engine.limits"), 0),
    **dict.fromkeys(("engine", "worlds"), 1),
    **dict.fromkeys(("kernels", "union", "policy", "scoring"), 2),
    "models": 3,
    "combine": 4,
    **dict.fromkeys(("llm", *METHOD_FOLDERS), 5),
    **dict.fromkeys(("train", "bench", "serve"), 6),
    "cli": 7,
}  # an import goes to a lower rank or stays in its own part; rank 0 is one part
ONLY_IN = {
    "transformers": ("models.hf", "bench.peers"),
    "typer": ("cli",),
    "rich": ("cli",),
    "tokenizers": ("models",),
    "gguf": ("models", "bench.peers"),
    "llguidance": ("logits.grammar", "logits._compile"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"), ("serve",)),
    "ray": ("serve.cluster", "serve.replicas", "serve.batch"),
    "lm_eval": ("bench",),
    "reasoning_gym": ("bench.cases",),
}

BANNED_MODULES = frozenset(
    ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "zmq", "multiprocessing")
)
BANNED_CALLS = frozenset(
    (
        *("eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "torch.hub.load"),
        *("torch.package.PackageImporter", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    )
)
BANNED_WORDS = frozenset(("trust_remote_code", "allow_pickle"))
# Libraries that raise bare Exception for bad input, what must not end other requests' rows, and last lines of defence:
# the command's, the server's threads', and that of a process that runs what a model wrote.
BROAD_EXCEPTS = frozenset(
    (
        ("failure.py", "contained"),
        ("models/tokenizer.py", "from_dir"),
        ("models/tokenizer.py", "_bpe"),
        ("models/fetch.py", "from_hub"),
        ("models/hf.py", "load_adapted"),
        ("models/hf.py", "_probe"),
        ("cli/__init__.py", "main"),
        ("bench/confined.py", "main"),
        ("serve/access.py", "__call__"),
        ("serve/worker.py", "_run"),
        ("serve/worker.py", "_turn"),
        ("serve/worker.py", "_add"),
        ("serve/worker.py", "_call"),
        ("serve/worker.py", "_advance"),
        ("serve/sse.py", "_send"),
    )
)


@dataclass(frozen=True)
class Source:
    """One parsed file: path relative to the package, dotted name under `hasten.` ("" is the package itself)."""

    path: str
    name: str
    text: str
    tree: ast.Module


@dataclass(frozen=True)
class Import:
    """One imported name: absolute dotted `target`, the `alias` that stands for it ("" if none does), and its line."""

    target: str
    alias: str
    line: int


def source(path: str, text: str) -> Source:
    """`text` parsed as the package's file `path` ("engine/ar.py")."""
    parts = path.removesuffix(".py").split("/")
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Source(path, name, text, ast.parse(text, path))


def package() -> list[Source]:
    """Every Python file of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [source(f.relative_to(PACKAGE).as_posix(), f.read_text(encoding="utf-8")) for f in files]


def imports(file: Source) -> Iterator[Import]:
    """Every import of a file, inside functions and for type checking too; relative ones are made absolute."""
    parts = ["hasten", *file.name.split(".")] if file.name else ["hasten"]
    base = parts if file.path.endswith("__init__.py") else parts[:-1]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for entry in node.names:
                yield Import(entry.name, entry.asname or "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join([*base[: len(base) - node.level + 1], *filter(None, [node.module])])
            prefix = prefix if node.level else str(node.module)
            for entry in node.names:
                yield Import(f"{prefix}.{entry.name}", entry.asname or entry.name, node.lineno)


def part(name: str) -> str:
    """The part of the package that a dotted name under `hasten.` belongs to; the package itself is the part of `llm`."""
    if name == "engine.limits" or name.startswith("engine.limits."):
        return "engine.limits"
    if name == "__main__":
        return "cli"
    top = name.partition(".")[0]
    return top if top in RANKS else "llm"


def level_findings(file: Source) -> list[str]:
    """Imports that go up, sideways into another method folder, or to a library that belongs elsewhere."""
    found = []
    own = part(file.name)
    if file.name and own == "llm" and file.name != "llm":
        found.append(f"{file.path} belongs to no level; design.md section 3 lists the parts")
    for entry in imports(file):
        library, _, target = entry.target.partition(".")
        if library == "hasten":
            other = part(target)
            if other != own and RANKS[other] >= max(RANKS[own], 1):
                found.append(f"{file.path}:{entry.line} {own} must not import {other} ({entry.target})")
            continue
        places = ONLY_IN.get(library)
        if places and not any(file.name == p or file.name.startswith(p + ".") for p in places):
            found.append(f"{file.path}:{entry.line} {library} is for {', '.join(places)} only")
    return found


def danger_findings(file: Source) -> list[str]:
    """Whatever runs code found in data: pickle and its relatives, eval and its relatives, remote code, process sockets."""
    found = []
    aliases = {entry.alias: entry.target for entry in imports(file) if entry.alias}
    for entry in imports(file):
        if BANNED_MODULES & {entry.target.partition(".")[0]} or entry.target == "torch.multiprocessing":
            found.append(f"{file.path}:{entry.line} import of {entry.target}")
        if entry.target in BANNED_CALLS:
            found.append(f"{file.path}:{entry.line} import of {entry.target}")
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            head, dot, rest = ast.unparse(node).partition(".")
            if aliases.get(head, head) + dot + rest in BANNED_CALLS:
                found.append(f"{file.path}:{node.lineno} use of {aliases.get(head, head)}{dot}{rest}")
        word = node.arg if isinstance(node, (ast.keyword, ast.arg)) else node.id if isinstance(node, ast.Name) else None
        word = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else word
        if word in BANNED_WORDS:
            found.append(f"{file.path}:{node.lineno} use of {word}")
    return found


def undocumented(file: Source) -> list[str]:
    """Public module-level classes and functions, and public methods of public classes, without a docstring."""
    found = [] if ast.get_docstring(file.tree) or not file.tree.body else [f"{file.path} has no module docstring"]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    found.append(f"{file.path}:{node.lineno} {prefix}{node.name}")
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(file.tree.body, "")
    return found


def broad_excepts(file: Source) -> list[tuple[str, str]]:
    """(file, function) of every handler that catches everything and does not raise it again."""
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
            last = node.body[-1]
            if broad and not (isinstance(last, ast.Raise) and last.exc is None):
                found.append((file.path, function))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(file.tree, "<module>")
    return found
