"""Rows that do not fit in memory: validated and tokenised once, kept in Arrow files, read where they lie.

`arrow` are blocks of rows in a file that is mapped into memory; `cache` the folders of such files, named by
what they are made from; `records` validated rows as a sequence of records; `tokens` the same rows as tokens,
which worker processes (`worker`) make. None of these imports torch, so that a worker is small.
"""
