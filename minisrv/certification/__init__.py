"""Certification: a captured graph enters service only after it has reproduced eager runs.

`batches`: the batches on which each graph is certified.
`trial`: such a batch as a step with known values, on request indices and blocks of its own.
`compare`: the comparison of a graph with eager runs.
`digest`: the bits of cache entries in few bytes, to compare them by.
`startup`: what a start-up does with every graph: capture, certification, timing, the memory probe.
`sweep`: the certification of installed graphs on every kind of batch.
"""
