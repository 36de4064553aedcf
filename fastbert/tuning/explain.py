"""Which backend a call would run on, and why the others would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastbert import functional
from fastbert.backend.chooser import Explained, explaining
from fastbert.backend.names import SLUGS
from fastbert.files import quoted


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Print which backend a call of a public op would run on and why the others would not; nothing is computed.

    Returns {backend: None | reason}. Example: `fastbert.explain("layer_norm", x, weight, bias)`.
    """
    if isinstance(op, str) and op not in SLUGS:
        raise ValueError(f"there is no op {quoted(op)}: choose one of {', '.join(SLUGS)}")
    function = getattr(functional, op) if isinstance(op, str) else op
    names: tuple[str, ...] = ()
    fastest: str | None = None
    with explaining() as table:
        try:
            function(*args, **kwargs)
        except Explained as stop:
            names, fastest = stop.args
    if not table:
        raise ValueError(
            f"{quoted(function)} made no choice of backend: explain takes one of the ops"
        )
    chosen = next((name for name in names if table[name] is None), None)
    for name, reason in table.items():
        able = "can run this call" + (", the fastest by fastbert.tune()" if name == fastest else "")
        print(f"{'->' if name == chosen else '  '} {name:<10} {reason or able}")
    return table
