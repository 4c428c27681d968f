"""What a run will take, told before it starts: shapes and memory, without weights or a GPU."""
