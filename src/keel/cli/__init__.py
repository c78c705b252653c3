"""The `keel` command: parse, call, print."""
