"""A fuzzer of random graphs: programs from seeds, plain torch as the oracle, a judge between it and kgraph.

`python -m tests.fuzz --help` runs it. Only `judge` imports kgraph; the oracle runs the programs and nothing else.
"""
