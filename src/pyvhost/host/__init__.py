"""Thin Linux: descriptors, eventfds, memory files, the control loop, taps, packet sockets, passt.

Promises: each module is one facility of the kernel (or one program), with errors that say what to do.
Never: knows what a device, a ring or a front end is; imports another room but ``abi``.
"""
