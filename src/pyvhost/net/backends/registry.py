"""All kinds of backends by name, the built-in ones and those that users register.

Promises: `make` has read all of a spec before it answers, and opened nothing. Never: keeps a backend.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvhost.net.backends.base import Backend
from pyvhost.net.backends.generate import GenerateBackend
from pyvhost.net.backends.loop import LoopBackend
from pyvhost.net.backends.null import NullBackend
from pyvhost.net.backends.packet import PacketBackend
from pyvhost.net.backends.spec import KIND, Spec, SpecError, perhaps
from pyvhost.net.backends.stream import StreamBackend
from pyvhost.net.backends.switch import SwitchBackend
from pyvhost.net.backends.tap import TapBackend
from pyvhost.net.backends.user import UserBackend

#: Makes a backend of a spec, taking from it the options that the kind has.
Maker = Callable[[Spec], Backend]

BUILT_IN: dict[str, type[Backend]] = {
    "tap": TapBackend,
    "packet": PacketBackend,
    "switch": SwitchBackend,
    "user": UserBackend,
    "stream": StreamBackend,
    "loop": LoopBackend,
    "null": NullBackend,
    "generate": GenerateBackend,
}

_makers: dict[str, Maker] = {kind: backend.from_spec for kind, backend in BUILT_IN.items()}


def register(kind: str, maker: Maker) -> None:
    """Have specs of `kind` made by `maker(spec)`. ValueError: the name is taken, or can't be one."""
    if not KIND.fullmatch(kind):
        raise ValueError(f"{kind!r} can't name a kind of backend: it is lower-case letters and digits")
    if kind in _makers:
        raise ValueError(f"there is a kind of backend called {kind!r} already")
    _makers[kind] = maker


def unregister(kind: str) -> None:
    """Forget a kind that was registered. KeyError: there is none, or it is built in."""
    if kind in BUILT_IN:
        raise KeyError(f"{kind!r} is built in")
    del _makers[kind]


def kinds() -> list[str]:
    """The names of all kinds."""
    return list(_makers)


def make(text: str) -> Backend:
    """The backend that a spec means, not open yet. SpecError: none; the text says what is wrong."""
    spec = Spec(text)
    maker = _makers.get(spec.kind)
    if maker is None:
        raise SpecError(
            f"no backend is called {spec.kind!r}{perhaps(spec.kind, _makers)}; there are: {', '.join(_makers)}"
        )
    backend = maker(spec)
    spec.done()
    return backend
