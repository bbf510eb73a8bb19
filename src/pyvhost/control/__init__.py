"""A served device's control socket: what its owner may ask of it while guests run.

Promises: the same way for devices of every kind. Never: guest data; a command that a guest could have sent.
"""
