"""What a run will need, before it starts: memory, traffic, operations, time; and whether it can."""
