"""`pyvhost bench`: the net device measured against DPDK's own vhost back end, and what it costs besides.

`command` is the way in. Promises: a comparison is a ratio of slices that ran side by side, never a bare figure.
Never: runs inside the process that it measures.
"""
