"""Memory that other ranks read and write: windows, locks, blocks, shared vectors and mailboxes."""
