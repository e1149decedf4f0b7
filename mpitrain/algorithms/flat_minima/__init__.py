"""Methods that search for wide valleys of the loss."""
