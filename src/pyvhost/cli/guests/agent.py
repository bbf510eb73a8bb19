"""What runs inside a guest: an init that reads commands from a line to the host and answers with what they printed.

The host writes `<token> <seconds> <characters of what follows> <script in base64>` and a newline; the guest runs the
script with sh, its output going to the same line as it comes, then writes a newline, the token, a space, the exit
status and a newline. The token is random, so that no output is taken for the end. Each boot announces itself by
READY; what is no such request is answered by REFUSED and what is wrong with it.

Promises: plain POSIX sh, of which dash and busybox's ash are capable; nothing that the scripts need is taken from
the guest's root but a shell and coreutils or busybox. Never: writes to the root file system, or runs a request of
which a part was lost.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable

#: The line that says that the guest takes commands.
READY = "pyvhost-guest-ready"
#: The line that says that a request was not understood, and was not run.
REFUSED = "pyvhost-guest-refused"

#: What serves requests on descriptor 3, given the functions poweroff_now, reboot_now and line_gone, and TMPDIR.
# `timeout` is there in coreutils and in busybox; both take the seconds first and answer 124 (busybox: 143).
LOOP = f"""\
refuse() {{ printf '\\n{REFUSED} %s\\n' "$1" >&3; }}
echo "{READY} $(cat /proc/sys/kernel/random/boot_id)" >&3
while :; do
    read -r token seconds length script <&3 || {{
        line_gone
        continue
    }}
    case "$token:$seconds" in
    poweroff:0) poweroff_now ;;
    reboot:0) reboot_now ;;
    :* | *: | *[!0-9a-f:]*)
        refuse "no token and seconds"
        continue
        ;;
    esac
    if [ "${{#token}} ${{#script}}" != "16 $length" ]; then
        refuse "a part was lost"
        continue
    fi
    if ! echo "$script" | base64 -d >"$TMPDIR/command"; then
        refuse "no base64"
        continue
    fi
    timeout "$seconds" sh "$TMPDIR/command" </dev/null >&3 2>&1 3>&-
    printf '\\n%s %d\\n' "$token" "$?" >&3
done
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
line_gone() { poweroff_now; }
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
# The host's end may go and come back: what is read meanwhile is an end of file.
line_gone() { usleep 100000; }
load() { insmod "$1" || echo "pyvhost: cannot load $1"; }
port=
for module in @LINE_MODULES@; do
    load "$module"
done
# The port is announced by the device a moment after its driver is there.
for tenth in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
    for folder in /sys/class/virtio-ports/*; do
        [ "$(cat "$folder/name" 2>&1)" = @TTY@ ] && port=/dev/${folder##*/}
    done
    [ -c "$port" ] && break
    usleep 100000
done
if [ ! -c "$port" ] || ! (: 3<>"$port"); then
    echo "pyvhost: cannot open the port called" @TTY@
    poweroff_now
fi
exec 3<>"$port"
for module in @MODULES@; do
    load "$module"
done
ip link set lo up
"""


def uml_init(tty: str, modules: Iterable[str], python: str) -> str:
    """The init of a guest whose root is the host's, read-only. `python` is an interpreter the guest can reach."""
    return _fill(_UML, tty, modules).replace("@PYTHON@", shlex.quote(python))


def qemu_init(name: str, line_modules: Iterable[str], modules: Iterable[str]) -> str:
    """The init of an initramfs with nothing but busybox in /bin.

    The line is the virtio-serial port called `name`: no byte of it is ever lost. `line_modules` are its drivers,
    `modules` what is loaded after them.
    """
    return _fill(_QEMU, name, modules).replace("@LINE_MODULES@", _quoted(line_modules))


def request(token: str, script: str, seconds: float) -> bytes:
    """The line that has the guest run `script`, at most `seconds` long."""
    encoded = base64.b64encode(script.encode()).decode()
    return f"{token} {max(1, round(seconds))} {len(encoded)} {encoded}\n".encode()


def _fill(text: str, tty: str, modules: Iterable[str]) -> str:
    return (text + LOOP).replace("@TTY@", shlex.quote(tty)).replace("@MODULES@", _quoted(modules))


def _quoted(words: Iterable[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
