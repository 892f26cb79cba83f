"""Arrays, time, interrupts and the terminal."""
