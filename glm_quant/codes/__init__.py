"""The only place where weights change value: schemes, and the codes that fill them."""
