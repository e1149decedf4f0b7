"""Workers that average with neighbours or random peers."""
