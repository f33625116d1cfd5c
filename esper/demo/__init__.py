"""What ``esper demo`` shows: the real parts, on this machine, in temporary folders."""
