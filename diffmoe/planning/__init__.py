"""What a run needs, estimated before it starts: memory, traffic, FLOPs, time; and its refusals."""
