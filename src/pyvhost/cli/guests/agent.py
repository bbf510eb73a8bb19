"""What runs inside a guest: an init that reads commands from a serial line and answers with what they printed.

The host writes `<token> <seconds> <script in base64>` and a newline; the guest runs the script with sh, its output
going to the same line as it comes, then writes a newline, the token, a space, the exit status and a newline. The
token is random, so that no output is taken for the end. Each boot announces itself by READY.

Promises: plain POSIX sh, of which dash and busybox's ash are capable; nothing that the scripts need is taken from
the guest's root but a shell and coreutils or busybox. Never: writes to the root file system.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable

#: The line that says that the guest takes commands.
READY = "pyvhost-guest-ready"

# `timeout` is there in coreutils and in busybox; both take the seconds first and answer 124 (busybox: 143).
_LOOP = """\
echo "READY $(cat /proc/sys/kernel/random/boot_id)" >&3
while read -r token seconds script <&3; do
    case "$token" in
    poweroff) poweroff_now ;;
    reboot) reboot_now ;;
    esac
    echo "$script" | base64 -d >"$TMPDIR/command"
    timeout "$seconds" sh "$TMPDIR/command" </dev/null >&3 2>&1 3>&-
    printf '\\n%s %d\\n' "$token" "$?" >&3
done
poweroff_now
"""

_UML = """\
#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/dev/shm TMPDIR=/dev/shm LC_ALL=C.UTF-8
mount -t proc proc /proc 2>/dev/null || busybox mount -t proc proc /proc
mount -t sysfs sys /sys 2>/dev/null || busybox mount -t sysfs sys /sys
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm 2>/dev/null || busybox mount -t tmpfs shm /dev/shm
# What the host has not installed, busybox may bring: it comes last.
if command -v busybox >/dev/null; then
    mkdir /dev/shm/busybox
    busybox --install -s /dev/shm/busybox
    PATH=$PATH:/dev/shm/busybox
fi
python=@PYTHON@
restart() {
    sync
    "$python" -I -c "import ctypes; ctypes.CDLL(None).reboot($1)"
    sleep 60
}
poweroff_now() { restart 0x4321fedc; }
reboot_now() { restart 0x1234567; }
load() {
    insmod "$1" && return
    "$python" -I -c "
import ctypes, sys
with open(sys.argv[1], 'rb') as f:
    sys.exit(ctypes.CDLL(None).syscall(313, f.fileno(), b'', 0))" "$1"
}
# Before any driver: one that fails may take the line's interrupt with it.
if ! (: 3<>@TTY@); then
    echo "pyvhost: cannot open @TTY@"
    poweroff_now
fi
exec 3<>@TTY@
stty raw -echo <&3
for module in @MODULES@; do
    load "$module" || echo "pyvhost: cannot load $module"
done
ip link set lo up
"""

_QEMU = """\
#!/bin/sh
export PATH=/bin HOME=/tmp TMPDIR=/tmp LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /tmp
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
poweroff_now() {
    poweroff -f
    sleep 60
}
reboot_now() {
    reboot -f
    sleep 60
}
# Before any driver: one that fails may take the line's interrupt with it.
if ! (: 3<>@TTY@); then
    echo "pyvhost: cannot open @TTY@"
    poweroff_now
fi
exec 3<>@TTY@
stty raw -echo <&3
for module in @MODULES@; do
    insmod "$module" || echo "pyvhost: cannot load $module"
done
ip link set lo up
"""


def uml_init(tty: str, modules: Iterable[str], python: str) -> str:
    """The init of a guest whose root is the host's, read-only. `python` is an interpreter the guest can reach."""
    return _fill(_UML, tty, modules).replace("@PYTHON@", shlex.quote(python))


def qemu_init(tty: str, modules: Iterable[str]) -> str:
    """The init of an initramfs with nothing but busybox in /bin."""
    return _fill(_QEMU, tty, modules)


def request(token: str, script: str, seconds: float) -> bytes:
    """The line that has the guest run `script`, at most `seconds` long."""
    encoded = base64.b64encode(script.encode()).decode()
    return f"{token} {max(1, round(seconds))} {encoded}\n".encode()


def _fill(text: str, tty: str, modules: Iterable[str]) -> str:
    quoted = " ".join(shlex.quote(module) for module in modules)
    whole = text + _LOOP.replace("READY", READY)
    return whole.replace("@TTY@", shlex.quote(tty)).replace("@MODULES@", quoted)
