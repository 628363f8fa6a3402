"""Every layout against one process: the equivalence table, and the fuzz of compositions.

A `Case` names a layout, a model and its batches; `problem` computes what one process would make of
them, with autograd and an optimizer of its own; `pool` runs the case on forked workers; `compare`
holds every number of every step against the reference, and where pipeline ranks are alone, every
bit against our own single process. `walks` watches what the ranks of a pipeline do.

`python -m tests.layouts` runs one case, the whole table, or a fuzz campaign.
"""
