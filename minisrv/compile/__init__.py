"""Compilation of models by torch.compile: as a whole, or in pieces ahead of time.

`modes` and `decorator` are what the rest of the server sees. `whole` compiles a model in the
process that serves it. `trace`, `split`, `passes` and `inductor` make the pieces, and are imported
by the process that compiles only (`worker`). `artifacts` keeps them, and `program` runs them:
neither imports a compiler.
"""
