"""What `import keel` gives: runs, their results, reward models, samples, losses. Each name is loaded by
`keel` itself.

Like the command line, these modules hold no logic of training: they parse, call, and hand back values.
Nothing of keel but the command line imports them, and no result of a run depends on them.
"""
