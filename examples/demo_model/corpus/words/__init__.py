"""Word lists: plain data."""
