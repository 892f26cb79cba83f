"""Models in memory: loading, running, recording states, finding residual writers."""
