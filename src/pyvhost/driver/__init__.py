"""The guest's side: what a hypervisor and a virtio driver do, in plain Python, for tests, tools and the demo.

Front ends bring memory and rings to a back end; rings and device drivers know nothing of how. Shares no ring,
translation or device code with the other side: a bug there would cancel itself here.
"""
