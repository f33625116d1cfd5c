"""What runs: layers with seeds, the lattice of their states, grafts, monitoring, fetching, telemetry."""
