"""What a run logs, sent to experiment trackers as well, from a process of its own.

    protocol   what a tracker is: one run a stage, frames of numbers, samples and findings
    logs       a stage's log files read as they grow, and how far each tracker has them
    follow     the process: reads the logs, sends them, tries again
    process    the run's side: starts it, tells it of stages, waits for it at the end
    to_*       one file a tool, by its own client

The log files are the queue and the truth. A tracker that fails, hangs or is away costs a run nothing; what it
has not got is sent by a later start.
"""
