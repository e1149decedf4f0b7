"""Pages and plots of recorded results."""
