"""Finding, checking and calling the native library (`native/hasten.h`); ctypes mirrors of its structures.

The library is looked for beside this file and in the installed package (an editable install keeps the two apart). Its
absence is no error here: `available()` says so, and why, and models then run on torch.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from hasten.errors import HastenError, UnsupportedError, out_of_range

ABI = 3
LEVELS = ("auto", "amx", "avx512", "avx2", "portable")
PARTS = ("norm", "qkv", "attention", "out", "ffn", "down", "head")
ACTIVATIONS = ("exact", "int8")
KV_TYPES = ("float32", "bfloat16", "int8")

F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q6_K = range(9)  # stored types; blocks as in GGUF


class Matrix(Structure):
    """One packed matrix [rows, cols]."""

    _fields_ = [("layout", c_int32), ("rows", c_int32), ("cols", c_int32), ("data", c_void_p), ("bytes", c_int64)]


class Layer(Structure):
    """One decoder layer."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm", "post_attn_norm", "post_ffn_norm")),
        *((name, c_void_p) for name in ("qkv_bias", "out_bias", "gate_up_bias", "down_bias")),
        ("rope", c_int32),
    ]


class Model(Structure):
    """A decoder stack."""

    _fields_ = [
        *((name, c_int32) for name in ("vocab", "hidden", "heads", "kv_heads", "head_dim", "ffn", "layers", "gelu")),
        *((name, c_int32) for name in ("kv_type", "activations")),
        *((name, c_float) for name in ("norm_eps", "embed_scale", "attn_scale", "attn_softcap", "logit_softcap")),
        ("layer", POINTER(Layer)),
        ("embed", Matrix),
        ("head", Matrix),
        ("norm", c_void_p),
        ("ropes", c_int32),
        ("rope_rows", c_int32),
        ("rotated", c_void_p),
        ("rope_cos", c_void_p),
        ("rope_sin", c_void_p),
    ]


class Sight(Structure):
    """Which slots one query sees."""

    _fields_ = [(name, c_int32) for name in ("lo", "hi", "extra_at", "extra_count")]


class PassInput(Structure):
    """One pass over ragged rows."""

    _fields_ = [
        *((name, c_int32) for name in ("rows", "queries", "kinds", "extra_total", "wanted_total", "taps")),
        *((name, c_void_p) for name in ("tokens", "embeds", "positions", "row_of", "slots", "slabs", "capacity")),
        *((name, c_void_p) for name in ("kind_of_layer", "sight", "extras", "wanted", "logits", "best", "log_sum_exp")),
        ("best_logprob", c_void_p),
        *((name, c_void_p) for name in ("tap_layers", "tap_out", "final_hidden", "part_seconds")),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "hasten_abi": (c_int32, []),
    "hasten_sizeof": (c_int64, [c_int32]),
    "hasten_error": (c_char_p, []),
    "hasten_isa": (c_char_p, []),
    "hasten_set_isa": (c_int32, [c_char_p]),
    "hasten_set_threads": (c_int32, [c_int32]),
    "hasten_threads": (c_int32, []),
    "hasten_layout_of": (c_int32, [c_int32]),
    "hasten_packed_bytes": (c_int64, [c_int32, c_int64, c_int64]),
    "hasten_pack": (c_int32, [c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64]),
    "hasten_unpack_rows": (c_int32, [POINTER(Matrix), c_void_p, c_int64, c_void_p]),
    "hasten_linear": (c_int32, [POINTER(Matrix), c_void_p, c_int32, c_int32, c_void_p]),
    "hasten_topk": (c_int32, [c_void_p, c_int64, c_int64, c_int32, c_void_p, c_void_p]),
    "hasten_read_bytes": (c_double, [c_void_p, c_int64, c_int32]),
    "hasten_open": (c_void_p, [POINTER(Model)]),
    "hasten_run": (c_int32, [c_void_p, POINTER(PassInput)]),
    "hasten_workspace_bytes": (c_int64, [c_void_p]),
    "hasten_close": (None, [c_void_p]),
}


class _Missing(Exception):
    """The library is not there or does not fit; the text says why."""


# An editable install keeps the library in site-packages while the Python files stay in the checkout.
PLACES = [Path(sysconfig.get_path("platlib")) / "hasten" / "kernels", Path(__file__).parent]


@cache
def _load() -> ctypes.CDLL | _Missing:
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    found = [path for path in (place / f"libhasten_native{suffix}" for place in PLACES) if path.is_file()]
    if not found:
        return _Missing("it was not built: the package was installed without a C++ compiler")
    try:
        library = ctypes.CDLL(str(found[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return _Missing(f"{found[0]} cannot be loaded ({error})")
    sizes = [ctypes.sizeof(kind) for kind in (Matrix, Layer, Model, Sight, PassInput)]
    if library.hasten_abi() != ABI or sizes != [library.hasten_sizeof(i) for i in range(len(sizes))]:
        return _Missing(f"{found[0]} belongs to another version of hasten")
    return library


def missing() -> str:
    """Why there is no native library; empty when there is one."""
    library = _load()
    return str(library) if isinstance(library, _Missing) else ""


def available() -> bool:
    """Whether the native library is there."""
    return not missing()


def native() -> ctypes.CDLL:
    """The library; raises UnsupportedError saying why it is missing."""
    library = _load()
    if isinstance(library, _Missing):
        raise UnsupportedError(
            f"the native library is missing: {library}",
            hint="install a C++ compiler and hasten anew, or use backbone torch",
        )
    return library


def check(code: int) -> int:
    """Pass a result through; raises HastenError with the library's message when it tells of a failure."""
    if code < 0:
        raise HastenError(
            f"native stack: {native().hasten_error().decode()}", hint="this is a bug in hasten; please report it"
        )
    return code


def level() -> str:
    """The instruction set in use: amx (with avx512), avx512, avx2 or portable."""
    return str(native().hasten_isa().decode())


def set_level(name: str) -> None:
    """Use this instruction set from now on ("auto": the best there is); raises ConfigError where there is none such."""
    if name not in LEVELS or native().hasten_set_isa(name.encode()) < 0:
        raise out_of_range("level", name, f"one of {', '.join(LEVELS)} that this processor has")


def set_threads(count: int) -> None:
    """Threads of native passes, the caller's included; raises ConfigError outside 1..256."""
    if not 1 <= count <= 256:
        raise out_of_range("threads", count, "in [1, 256]")
    check(native().hasten_set_threads(count))


def matrix_ref(matrix: Matrix) -> Any:
    """A matrix as an argument."""
    return byref(matrix)
