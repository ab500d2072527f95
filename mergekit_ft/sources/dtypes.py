"""The element types of safetensors: sizes, names and torch's words for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    TORCH: dict[str, torch.dtype]  # "BF16" -> torch.bfloat16
    CODE: dict[torch.dtype, str]  # torch.bfloat16 -> "BF16"

NAME = {  # safetensors code -> torch's name
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
BY_NAME = {name: code for code, name in NAME.items()}
SIZE = {  # bytes an element
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})  # those that merge
SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})  # elements smaller than a byte


def __getattr__(name: str) -> Any:
    """Make the tables that need torch when they are first asked for."""
    if name not in ("TORCH", "CODE"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    table = {code: getattr(torch, word) for code, word in NAME.items()}
    globals()["TORCH"] = table
    globals()["CODE"] = {dtype: code for code, dtype in table.items()}
    return globals()[name]
