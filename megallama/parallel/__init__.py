"""Who owns what: the linears, norms and buffers that the passes are given."""
