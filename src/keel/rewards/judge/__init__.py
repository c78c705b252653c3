"""A language model as judge: what it is asked, how its answers are read, what they cost, what they become."""
