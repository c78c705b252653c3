"""One explicit loop per stage. `inputs` opens what a stage starts from, `update` is what the loops share."""
