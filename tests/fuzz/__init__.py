"""A fuzzer for everything that the package reads: artifacts, dumps, search states, frontiers.

`python -m tests.fuzz --help`; `make fuzz`. A case is a few edits of the files of a small compiled
model and one command or call that reads them. It ends well if the package accepts the files or
refuses them with an error of its own. A signal, a hang, a traceback, memory out of proportion, an
output that depends on the contents of fresh memory, a file written where none was asked for, and
files that are accepted though their digest is wrong are findings.
"""
