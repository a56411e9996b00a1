"""What a recipe will take before it runs: memory, time, data and network."""
