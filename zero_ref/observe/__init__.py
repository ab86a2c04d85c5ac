"""What measures the stages from outside: the trace, the memory, the recorder."""
