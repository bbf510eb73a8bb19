"""A SCSI target (SAM-5, SPC-4, SBC-3), its stores, and the virtio device that shows it to a guest."""
