"""All compiled code: how it is compiled, ordered access to shared memory, rings, one loop a device.

Promises: a kernel takes integers and NumPy records, never objects; it runs without the GIL; every loop over
what a guest wrote is bounded; every address that a guest wrote is looked up in the regions first.
Never: imports another room but ``abi``; holds a reference to a Python object inside a loop.
"""
