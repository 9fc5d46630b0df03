"""Commands that measure, explain or check an engine, above all other parts; only the command line
and the benchmarks import them.

`plan` prints the graph by which each batch runs, `bench` measures steps in each mode, `certify`
compares every graph with eager runs, and `environment` describes the machine and the versions of a
measurement.
"""
