"""Parts together, on real files, servers and processes."""
