"""Numbers of the other byte order: what a legacy guest of another endianness has in its rings and headers.

Promises: each turns its own result back. Never: reads memory.
"""

from __future__ import annotations

from pyvhost.dataplane.policy import inline


@inline
def swap16(value: int) -> int:
    """16 bits with their bytes turned round."""
    return (value & 0xFF) << 8 | (value >> 8) & 0xFF


@inline
def swap32(value: int) -> int:
    """32 bits with their bytes turned round."""
    return (value & 0xFF) << 24 | (value & 0xFF00) << 8 | (value >> 8) & 0xFF00 | (value >> 24) & 0xFF


@inline
def swap64(value: int) -> int:
    """64 bits with their bytes turned round, signed as `load64` has them."""
    high = swap32(value)
    return (high - ((high & 0x80000000) << 1)) << 32 | swap32((value >> 32) & 0xFFFFFFFF)


@inline
def swap_descriptor(word: int) -> int:
    """The second half of struct vring_desc: len, flags and next, each turned round."""
    return swap32(word) | swap16(word >> 32) << 32 | swap16(word >> 48) << 48


@inline
def swap_header(word: int) -> int:
    """The first 8 bytes of struct virtio_net_hdr: flags and gso_type stay, hdr_len, gso_size, csum_start turn."""
    return word & 0xFFFF | swap16(word >> 16) << 16 | swap16(word >> 32) << 32 | swap16(word >> 48) << 48
