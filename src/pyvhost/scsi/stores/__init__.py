"""Where a logical unit's blocks are kept."""
