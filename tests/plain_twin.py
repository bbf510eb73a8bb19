"""A data-plane module's functions as plain Python, beside the compiled ones and in the same process.

Promises: the same source: each kernel's Python function, with every other kernel that it names, and the
accesses, replaced by their plain twins. Never: the compiled code itself.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

from pyvhost.dataplane import plain

_made: dict[str, types.SimpleNamespace] = {}


def plain_twin(module: types.ModuleType, **replaced: Any) -> Any:
    """`module` with plain functions; `replaced` names what has a twin of another kind."""
    if module.__name__ in _made:
        return _made[module.__name__]
    names = dict(vars(module))
    twin = _made[module.__name__] = types.SimpleNamespace()
    for name, value in list(names.items()):
        function = getattr(value, "py_func", None)
        if name in replaced:
            names[name] = replaced[name]
        elif hasattr(plain, name) and (function is not None or _is_intrinsic(value)):
            names[name] = getattr(plain, name)
        elif function is not None and function.__module__ == module.__name__:
            names[name] = types.FunctionType(
                function.__code__, names, function.__name__, function.__defaults__, function.__closure__
            )
        elif function is not None:
            names[name] = getattr(plain_twin(importlib.import_module(function.__module__)), function.__name__)
    twin.__dict__.update(names)
    return twin


def _is_intrinsic(value: Any) -> bool:
    return type(value).__module__.startswith("numba")
