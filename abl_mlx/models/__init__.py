"""Models in memory: loading, running, looking inside, finding residual writers."""
