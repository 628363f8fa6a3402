"""Process groups and asynchronous collectives; a collective returns a handle to wait for."""
