"""Everything that only reads: the counters of serving processes, as a table, as JSON, for Prometheus.

Promises: looking at a process costs it nothing and can't disturb it; whatever a file says is checked first.
Never: imports NumPy or Numba, or another room but ``abi``; writes.
"""
