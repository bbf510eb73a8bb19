"""Spreading a packet socket group's frames over its first sockets, a flow staying with one (PACKET_FANOUT_CBPF).

The kernel's own PACKET_FANOUT_HASH spreads over all sockets that have joined, and one can't leave without being
closed; a program can be replaced at any time, by any of them.

Promises: frames of one flow (addresses, and ports of TCP and UDP) go to one socket; what is no IP, to the first.
Never: drops a frame.
"""

from __future__ import annotations

import ctypes
import struct

# linux/bpf_common.h and linux/filter.h
_LD, _ST, _ALU, _JMP, _RET, _MISC = 0x00, 0x02, 0x04, 0x05, 0x06, 0x07
_W, _H, _B = 0x00, 0x08, 0x10
_ABS, _IND, _MEM = 0x20, 0x40, 0x60
_AND, _LSH, _RSH, _MUL, _MOD, _XOR = 0x50, 0x60, 0x70, 0x20, 0x90, 0xA0
_JA, _JEQ, _JSET = 0x00, 0x10, 0x40
_K, _X, _A = 0x00, 0x08, 0x10
_TAX = 0x00
_AD_PROTOCOL = 0xFFFFF000  # SKF_AD_OFF + SKF_AD_PROTOCOL
_NET = 0xFFF00000  # SKF_NET_OFF: the network header, whatever lies before it

_TCP, _UDP = 6, 17
#: Knuth's multiplier: neighbouring ports and addresses end up far apart.
_SPREAD = 2654435761

_Line = tuple[str, int, str, str, int]


def flow_program(sockets: int) -> bytes:
    """The classic BPF program, as an array of struct sock_filter, that answers 0 to `sockets` - 1."""
    return _assemble(
        [
            ("", _LD | _H | _ABS, "", "", _AD_PROTOCOL),
            ("", _JMP | _JEQ, "ipv4", "", 0x0800),
            ("", _JMP | _JEQ, "ipv6", "none", 0x86DD),
            ("ipv4", _LD | _W | _ABS, "", "", _NET + 12),
            ("", _MISC | _TAX, "", "", 0),
            ("", _LD | _W | _ABS, "", "", _NET + 16),
            ("", _ALU | _XOR | _X, "", "", 0),
            ("", _ST, "", "", 0),
            # Of a packet in fragments only the first has ports: none is looked at.
            ("", _LD | _H | _ABS, "", "", _NET + 6),
            ("", _JMP | _JSET, "spread", "", 0x3FFF),
            ("", _LD | _B | _ABS, "", "", _NET + 9),
            ("", _JMP | _JEQ, "ports4", "", _TCP),
            ("", _JMP | _JEQ, "ports4", "spread", _UDP),
            ("ports4", _LD | _B | _ABS, "", "", _NET),
            ("", _ALU | _AND, "", "", 0xF),
            ("", _ALU | _LSH, "", "", 2),
            ("", _MISC | _TAX, "", "", 0),
            ("", _LD | _W | _IND, "", "", _NET),
            ("", _JMP | _JA, "ports", "", 0),
            ("ipv6", _LD | _W | _ABS, "", "", _NET + 8),
            *(
                line
                for word in (12, 16, 20, 24, 28, 32, 36)
                for line in (
                    ("", _MISC | _TAX, "", "", 0),
                    ("", _LD | _W | _ABS, "", "", _NET + word),
                    ("", _ALU | _XOR | _X, "", "", 0),
                )
            ),
            ("", _ST, "", "", 0),
            ("", _LD | _B | _ABS, "", "", _NET + 6),
            ("", _JMP | _JEQ, "ports6", "", _TCP),
            ("", _JMP | _JEQ, "ports6", "spread", _UDP),
            ("ports6", _LD | _W | _ABS, "", "", _NET + 40),
            ("ports", _MISC | _TAX, "", "", 0),
            ("", _LD | _W | _MEM, "", "", 0),
            ("", _ALU | _XOR | _X, "", "", 0),
            ("", _ST, "", "", 0),
            ("spread", _LD | _W | _MEM, "", "", 0),
            ("", _ALU | _MUL, "", "", _SPREAD),
            ("", _ALU | _RSH, "", "", 16),
            ("", _ALU | _MOD, "", "", sockets),
            ("", _RET | _A, "", "", 0),
            ("none", _RET | _K, "", "", 0),
        ]
    )


def fprog(program: bytes) -> tuple[bytes, object]:
    """A struct sock_fprog of the program, and what has to live as long as that is used."""
    buffer = ctypes.create_string_buffer(program, len(program))
    return struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)), buffer


def _assemble(lines: list[_Line]) -> bytes:
    """(label, code, where to if true, if false, constant) each; no place means: the next line."""
    places = {label: number for number, (label, *_) in enumerate(lines) if label}

    def distance(number: int, label: str) -> int:
        return places[label] - number - 1 if label else 0

    program = bytearray()
    for number, (_, code, true, false, constant) in enumerate(lines):
        if code == _JMP | _JA:
            constant, true = distance(number, true), ""
        program += struct.pack("HBBI", code, distance(number, true), distance(number, false), constant)
    return bytes(program)
