"""Where jobs are done: in this process, or on the workers of a Ray cluster."""
