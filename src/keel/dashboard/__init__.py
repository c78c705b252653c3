"""`keel dashboard`: runs watched live in a browser.

It reads the files that runs leave and writes none. The one thing it can do to a run is to end it kindly.

    tail → table → reduce      a file of metrics as columns that grow, and as few points as a screen can show
    tfevents, transformers_run  what TensorBoard and TRL leave, in the same columns
    discovery → keel_run        which runs there are, and what a run of keel says of its stages
    samples, findings           replies by step or model, a page at a time; what diagnosis says
    runs → live → app           everything of a folder of runs, what is new of it, and the pages
"""
