"""Methods that tolerate faulty or hostile workers."""
