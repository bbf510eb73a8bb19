"""SCSI commands, a family a module, and the table by which they are found."""
