"""Training on several processes: the ranks of a run, how they start, agree, and end.

`group`: which rank this process is, and what all agree on. `gradients`: a step's gradient, summed over ranks.
`sharded`: weights that no rank has whole (FSDP2). `launch`, `watch`, `records`: local ranks started, watched,
and what is said of one that fails. `nodes`: launchers on several machines. `on_ray`: ranks as workers of Ray
Train (`ray_cluster`), which alone need Ray. `trial`: whether ranks can work
together at all, and how fast.
"""
